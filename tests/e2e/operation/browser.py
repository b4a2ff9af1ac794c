"""A headless Chromium, for what people see."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    # Whatever a browser likes to ask its makers stays on this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """One window of a fresh profile."""

    def __init__(self, chromium: str, driver: str) -> None:
        """Paths of both programs: where selenium has to look for one it may download it."""
        self._profile = tempfile.TemporaryDirectory(prefix="penstock-browser-")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={self._profile.name}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            self._driver = webdriver.Chrome(options=options, service=Service(driver))
        except BaseException:
            self._profile.cleanup()
            raise

    def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Width in CSS pixels; the scheme that the user prefers."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def before_load(self, script: str) -> None:
        """Runs in every page opened from now on, before its own scripts."""
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def open(self, url: str) -> None:
        self._driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns, as JSON."""
        found = self._driver.execute_script(f"return JSON.stringify((() => {{{script}}})())", *arguments)
        return None if found is None else json.loads(found)

    def text(self, selector: str) -> str:
        """What is to be read in the first that matches; empty where it is hidden."""
        node = f"document.querySelector({json.dumps(selector)})"
        found: str = self.run(f"return {node}.checkVisibility() ? {node}.innerText : ''")
        return found.replace("\N{NO-BREAK SPACE}", " ")

    def complaints(self) -> list[str]:
        """What the console has shown since the last call: errors of scripts, refusals of the policy. Not
        that a busy daemon could not tell its status."""
        shown = [entry["message"] for entry in self._driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [message for message in shown if "/status - " not in message or " 503 " not in message]

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told of."""
        nodes = self._driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def screenshot(self) -> bytes:
        """PNG of what the window shows."""
        return self._driver.get_screenshot_as_png()

    def close(self) -> None:
        self._driver.quit()
        self._profile.cleanup()
