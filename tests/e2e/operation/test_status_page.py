"""The status page in a real browser, of a real daemon with real loads."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.server.config.units import parse_size, show_size

from ...ports import free_port
from ..conftest import StartDaemon
from ..support import (
    DaemonProcess,
    RawLoad,
    random_tensors,
    running_daemon,
    wait_until,
    write_checkpoint,
)
from .browser import Browser

MIB = 1 << 20
HOSTILE = "<img src=x onerror=document.title='pwned'>"
LONG = "a_name_without_a_space_" * 8
STATES = ("leased", "reading", "warm", "free")

# Every number that has one right answer, as the page shows it.
SHOWN = """
const rows = (selector, row) => [...document.querySelectorAll(selector)].map(row);
const whole = document.getElementById("buffer").getBoundingClientRect().width;
return {
  amounts: Object.fromEntries(rows("[id][data-value]", (node) => [node.id, Number(node.dataset.value)])),
  texts: Object.fromEntries(rows("[id][data-value]", (node) => [node.id, node.innerText])),
  blocks: rows(".block", (node) => [
    node.dataset.key, node.dataset.state, Number(node.dataset.bytes), node.classList.contains("pinned"),
    node.getBoundingClientRect().width / whole,
  ]),
  loads: rows(".load", (node) => [
    node.dataset.key, node.dataset.state, Number(node.dataset.delivered),
    node.querySelector("progress").value,
  ]),
  stages: rows("#stages tr", (node) => [
    Number(node.dataset.key), node.dataset.state, node.querySelector(".pin").innerText,
    node.querySelectorAll(".holders li").length,
  ]),
  errors: rows(".error b", (node) => node.innerText),
  totals: Object.fromEntries(rows("#totals > div", (node) => [node.dataset.key, Number(node.dataset.value)])),
  configuration: Object.fromEntries(
    rows("#configuration > div", (node) => [node.dataset.key, node.querySelector("dd").textContent])
  ),
  host: document.title,
};
"""

# The lowest contrast of a text with what is behind it, and that text.
CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = ([red, green, blue]) => {
  const linear = [red, green, blue].map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const behind = (node) => {
  for (; node !== null; node = node.parentElement) {
    const color = channels(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let worst = [99, ""];
for (let text = walker.nextNode(); text !== null; text = walker.nextNode()) {
  const node = text.parentElement;
  if (text.data.trim() === "" || !node.checkVisibility() || node.closest("noscript")) continue;
  const [one, other] = [channels(getComputedStyle(node).color), behind(node)].map(luminance);
  const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (contrast < worst[0]) worst = [contrast, text.data];
}
return worst;
"""

# In place of the clock: what the page wants to do later is kept, with its delay, until a test does it.
HAND_CLOCK = """
window.later = [];
window.asked = 0;
const ask = window.fetch;
window.fetch = (...request) => { window.asked += 1; return ask(...request); };
window.setTimeout = (work, delay) => window.later.push({ work, delay });
window.clearTimeout = (number) => { if (number) window.later[number - 1].work = null; };
let hidden = false;
Object.defineProperty(document, "hidden", { get: () => hidden });
window.hide = (value) => { hidden = value; document.dispatchEvent(new Event("visibilitychange")); };
"""


@pytest.fixture(scope="module")
def start_browser(require_tool: Callable[[str], str]) -> Iterator[Callable[[], Browser]]:
    chromium, driver = require_tool("chromium"), require_tool("chromedriver")
    browsers: list[Browser] = []

    def start() -> Browser:
        browsers.append(Browser(chromium, driver))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.close()


@pytest.fixture(scope="module")
def browser(start_browser: Callable[[], Browser]) -> Browser:
    return start_browser()


@pytest.fixture(scope="module")
def busy_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """48 MiB with one checkpoint pinned, one warm, one leased and one being read, and an error. Names are
    hostile and long; all stands still."""
    top = tmp_path_factory.mktemp("page")

    def write(name: str, count: int) -> Path:
        return write_checkpoint(top / f"{name}.safetensors", random_tensors(count, MIB // 4))

    with running_daemon("--memory-limit", "48MiB") as daemon, daemon.client() as client:
        client.prefetch(write("pinned", 3), pin=True)
        client.load_state_dict(write("warm", 6))
        held = client.load_state_dict(write(HOSTILE, 10))
        reading = RawLoad(
            daemon, write(LONG, 40), memory_limit_bytes=12 * MIB, client_name=f"{HOSTILE}{LONG}"
        )
        with reading:
            reading.next("manifest")
            missing = RawLoad(daemon, f"/nowhere/{HOSTILE}/{LONG}")
            with missing, pytest.raises(grpc.RpcError):
                missing.next("manifest")
            release = "its client to release what it has"
            states = ["leased", "reading", "warm", "warm"]

            def stands_still() -> bool:
                status = daemon.http_status()
                found = sorted(stage["state"] for stage in status["stages"])
                return (found, status["loads"][0]["waits_for"]) == (states, release)

            wait_until(stands_still, "the window to be full and the others to be as they are named")
            yield daemon
        assert held
        del held


def url(daemon: DaemonProcess) -> str:
    return f"http://{daemon.http_address}/"


def open_page(browser: Browser, daemon: DaemonProcess) -> None:
    browser.open(url(daemon))

    def told() -> bool:
        # The daemon was too busy, and with a hand clock the page does not ask again.
        if browser.text("#health").endswith("No answer"):
            browser.open(url(daemon))
        return browser.text("#updated") != "never"

    wait_until(told, "the page to be told")


def expected_of(status: dict[str, Any]) -> dict[str, Any]:
    """What `SHOWN` should find, without shares and texts."""
    staging, totals = status["staging"], status["totals"]
    of_others = totals["memory_bytes"] + totals["tier_bytes"]
    states = {state: staging[f"{state}_bytes"] for state in STATES}
    blocks = {
        f"stage-{stage['id']}": (stage["state"], stage["capacity_bytes"], stage["pinned"])
        for stage in status["stages"]
    }
    if staging["free_bytes"]:
        blocks["free"] = ("free", staging["free_bytes"], False)
    return {
        "amounts": {
            **states,
            "buffer-held": staging["reading_bytes"] + staging["leased_bytes"],
            "readers": status["readers"]["busy"],
            "read-rate": status["readers"]["bytes_per_second"],
            "active": len(status["loads"]),
        },
        "blocks": blocks,
        "loads": {
            load["load_id"]: (
                load["state"],
                load["delivered_bytes"],
                load["delivered_bytes"] / load["total_bytes"],
            )
            for load in status["loads"]
        },
        "stages": {
            stage["id"]: (stage["state"], "pinned" if stage["pinned"] else "", len(stage["holders"]))
            for stage in status["stages"]
        },
        "errors": [error["reason"] for error in status["errors"]],
        "totals": {**totals, "storage_bytes": totals["delivered_bytes"] - of_others},
        "configuration": status["configuration"],
        "host": f"Penstock on {status['host']}",
    }


def test_every_number_is_that_of_status(browser: Browser, busy_daemon: DaemonProcess) -> None:
    open_page(browser, busy_daemon)

    def agrees() -> dict[str, Any] | None:
        before, shown, after = busy_daemon.http_status(), browser.run(SHOWN), busy_daemon.http_status()
        found = {
            **shown,
            "amounts": {name: value for name, value in shown["amounts"].items() if name != "lease"},
            "blocks": {key: (state, size, pinned) for key, state, size, pinned, _ in shown["blocks"]},
            "loads": {key: tuple(rest) for key, *rest in shown["loads"]},
            "stages": {key: tuple(rest) for key, *rest in shown["stages"]},
        }
        found.pop("texts")
        return shown if found in (expected_of(before), expected_of(after)) else None

    shown = wait_until(agrees, "the page to show what /status says")
    texts = {name: text.replace("\N{NO-BREAK SPACE}", " ") for name, text in shown["texts"].items()}
    for state in STATES:
        assert texts[state] == show_size(shown["amounts"][state])
    assert {state for _, state, *_ in shown["blocks"]} == {"leased", "reading", "warm", "free"}
    assert [state for _, state, *_ in shown["blocks"]] == ["leased", "reading", "warm", "warm", "free"]
    for _, _, size, _, share in shown["blocks"]:
        assert share == pytest.approx(size / (48 * MIB), abs=0.01)
    assert browser.complaints() == []


def test_each_load_says_where_its_bytes_came_from(browser: Browser, busy_daemon: DaemonProcess) -> None:
    open_page(browser, busy_daemon)
    script = """
return Object.fromEntries([...document.querySelectorAll('.load')].map((node) =>
  [node.dataset.key, node.querySelector('[data-field=origins]').textContent]
));
"""

    def origins(load: dict[str, Any]) -> str:
        memory, tier = load["memory_bytes"], load["tier_bytes"]
        storage = load["delivered_bytes"] - memory - tier
        parts = {"memory": memory, "local disk": tier, "storage": storage}
        return ", ".join(f"{show_size(count)} from {name}" for name, count in parts.items() if count)

    def agrees() -> dict[str, str] | None:
        told = {load["load_id"]: origins(load) for load in busy_daemon.http_status()["loads"]}
        shown = {key: text.replace("\N{NO-BREAK SPACE}", " ") for key, text in browser.run(script).items()}
        return shown if shown == told else None

    shown = wait_until(agrees, "the page to show what /status says")
    assert any("from storage" in text for text in shown.values())


@pytest.mark.parametrize("kind", ["read", "delivered", "memory"])
def test_the_chart_draws_the_throughput(browser: Browser, busy_daemon: DaemonProcess, kind: str) -> None:
    browser.look()
    open_page(browser, busy_daemon)

    def complete() -> dict[str, Any] | None:
        status = busy_daemon.http_status()
        found: dict[str, Any] = status["throughput"]
        return found if sum(found[f"{kind}_bytes"]) == status["totals"][f"{kind}_bytes"] else None

    throughput = wait_until(complete, "the last interval to end")
    most = max(throughput[f"{kind}_bytes"]) / throughput["interval_seconds"]
    says = {"read": "were read", "delivered": "delivered", "memory": "from memory"}
    words = f"{show_size(round(most))}/s {says[kind]}"

    def label() -> str:
        text: str = browser.run("return document.getElementById('chart').getAttribute('aria-label')")
        return text.replace("\N{NO-BREAK SPACE}", " ")

    wait_until(lambda: words in label(), "the page to show it")
    scale = browser.text("#chart-top").removesuffix("/s")
    path = browser.run(f"return document.getElementById('line-{kind}').getAttribute('d')")
    points = [tuple(map(float, point.split())) for point in path.removeprefix("M").split("L")]
    assert len(points) >= 2
    assert (points[0][0], points[-1][0]) == (0, 100)
    highest = 100 - min(y for _, y in points)
    assert highest / 100 * parse_size(scale) == pytest.approx(most, rel=0.02)


def test_what_clients_chose_is_shown_as_text_and_runs_nothing(
    browser: Browser, busy_daemon: DaemonProcess
) -> None:
    open_page(browser, busy_daemon)
    for place in ("#buffer", "#loads", "#stages", "#errors"):
        assert HOSTILE in browser.text(place), place
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.text("#loads .waits").startswith("Waits for its client to release what it has")
    assert "pwned" not in browser.run("return document.title")
    assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_and_is_legible(
    browser: Browser, busy_daemon: DaemonProcess, width: int, scheme: str
) -> None:
    browser.look(width=width, scheme=scheme)
    open_page(browser, busy_daemon)
    browser.run("document.querySelector('details').open = true")
    assert browser.run("return document.scrollingElement.scrollWidth") == width
    contrast, text = browser.run(CONTRAST)
    assert contrast >= 4.5, text
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) is (scheme == "dark")


def test_a_screen_reader_is_told_the_same(browser: Browser, busy_daemon: DaemonProcess) -> None:
    browser.look()
    open_page(browser, busy_daemon)
    told = browser.accessible()
    for role in ("link", "progressbar", "image", "list", "table", "region"):
        names = [name for told_role, name in told if told_role == role]
        assert names, role
        assert role == "list" or all(names), role
    assert ("list", "What occupies the buffer, in proportion") in told
    assert ("columnheader", "Held by") in told
    assert ("link", "pinned 4.2\N{NO-BREAK SPACE}MB, pinned") in told


def test_a_load_that_waits_says_for_what_and_in_which_place(
    browser: Browser, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "8MiB")
    path = write_checkpoint(tmp_path / "a.safetensors", random_tensors(7, MIB // 4))
    other = write_checkpoint(tmp_path / "b.safetensors", random_tensors(7, MIB // 4, seed=1))
    with daemon.client() as client:
        held = client.load_state_dict(path)
        with RawLoad(daemon, other) as waiting:
            waiting.next("queued")
            open_page(browser, daemon)
            wait_until(lambda: "place 1" in browser.text("#loads"), "the page to show the place")
            assert "waiting" in browser.text("#loads .badge")
            assert browser.text("#active-more") == "1 waiting for memory"
        assert held
        del held
    daemon.wait_idle()
    wait_until(lambda: browser.text("#loads-empty"), "the page to show that nobody loads")
    wait_until(lambda: browser.text("#lease") == "none", "the page to show no lease")
    assert browser.complaints() == []


def test_without_a_limit_the_bar_shows_what_exists(
    browser: Browser, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    open_page(browser, daemon)
    assert browser.run("return document.querySelectorAll('.block').length") == 0
    assert "no limit" in browser.text("#buffer-size")
    path = write_checkpoint(tmp_path / "a.safetensors", random_tensors(7, MIB // 4))
    with daemon.client() as client:
        held = client.load_state_dict(path)

        def blocks() -> list[Any]:
            """Once it is no longer being read, and holds what the load held while it read."""
            found: list[Any] = browser.run(SHOWN)["blocks"]
            return found if [state for _, state, *_ in found] == ["leased"] else []

        [[_, _, size, _, share]] = wait_until(blocks, "the page to show the checkpoint")
        assert size == 64 * MIB
        assert share == pytest.approx(1)
        assert held


def test_a_daemon_that_is_gone_is_told_and_one_that_is_back_too(
    start_browser: Callable[[], Browser], start_daemon: StartDaemon
) -> None:
    """Asks less and less often meanwhile."""
    browser = start_browser()
    address = f"127.0.0.1:{free_port()}"
    daemon = start_daemon("--http-address", address)
    browser.before_load(HAND_CLOCK)
    open_page(browser, daemon)
    assert browser.text("#notice") == ""
    wait_until(lambda: asks_again(browser) == (1000, "Ready"), "the page to be told")
    daemon.kill()
    delays = [next_delay(browser) for _ in range(6)]
    assert delays == [1000, 2000, 4000, 8000, 15000, 15000]
    assert "has not told its status since" in browser.text("#notice")
    assert browser.text("#health").endswith("No answer")
    assert any(role == "alert" for role, _ in browser.accessible())
    again = start_daemon("--http-address", address)
    wait_until(lambda: asks_again(browser) == (1000, "Ready"), "the page to be told")
    assert f"pid {again.process.pid}" in browser.text("#daemon")
    assert browser.text("#notice") == ""


def test_a_daemon_that_hangs_is_told_with_what_hangs(
    browser: Browser, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = (str(Path(__file__).with_name("hanging.py")), str(pipe), "loop")
    daemon = start_daemon("--memory-limit", "8MiB", "--stall-timeout", "0.5", program=program)
    open_page(browser, daemon)
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(
        lambda: "the event loop has made no progress" in browser.text("#notice"), "the page to tell of it"
    )
    os.close(os.open(pipe, os.O_WRONLY))
    wait_until(
        lambda: browser.text("#health").endswith("Ready") and browser.text("#notice") == "",
        "the page to recover",
    )


def test_only_the_latest_errors_are_listed(
    browser: Browser, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon()
    for number in range(10):
        with RawLoad(daemon, tmp_path / f"{number}.safetensors") as load, pytest.raises(grpc.RpcError):
            load.next("manifest")
    open_page(browser, daemon)
    wait_until(lambda: browser.text("#errors-more") == "the latest 8 of 10", "the page to count the errors")
    assert "/9.safetensors does not exist" in browser.text(".error .message")
    assert browser.run("return document.querySelectorAll('.error').length") == 8


def test_it_asks_nothing_while_nobody_looks(
    start_browser: Callable[[], Browser], start_daemon: StartDaemon
) -> None:
    browser = start_browser()
    browser.before_load(HAND_CLOCK)
    open_page(browser, start_daemon())
    browser.run("window.hide(true)")
    asked = browser.run("return window.asked")
    browser.run("window.later.at(-1).work()")
    assert browser.run("return [window.asked, window.later.length]") == [asked, 1]
    browser.run("window.hide(false)")
    wait_until(lambda: browser.run("return window.later.length") == 2, "the page to ask again")
    assert browser.run("return window.asked") == asked + 1


def next_delay(browser: Browser) -> int:
    """Lets the page do what it put off; the milliseconds for which it puts off the next."""
    count = browser.run("window.later.at(-1).work(); return window.later.length")
    wait_until(lambda: browser.run("return window.later.length") > count, "the page to have asked")
    delay: int = browser.run("return window.later.at(-1).delay")
    return delay


def asks_again(browser: Browser) -> tuple[int, str]:
    """The next delay, and the last word of what the page then says of the daemon's health."""
    return next_delay(browser), browser.text("#health").split()[-1]


def test_the_warm_set_is_shown_with_its_states_and_the_faults_of_its_file(
    browser: Browser, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", random_tensors(3, MIB // 4))
    here = {"name": "here", "source": str(path), "pin": True}
    file = tmp_path / "set.yaml"
    file.write_text(json.dumps({"checkpoints": [here, {"name": "gone", "source": "/<b>nothing"}]}))
    daemon = start_daemon("--memory-limit", "16MiB", "--warm-set", str(file))
    open_page(browser, daemon)
    wishes = "return [...document.querySelectorAll('#warm .wish')].map((node) => node.innerText)"

    def shown() -> list[str]:
        """Once the second line of each is its state. The path has the name of this test in it."""
        found: list[str] = browser.run(wishes)
        return found if [text.splitlines()[1] for text in found] == ["warm", "failed"] else []

    warm, gone = wait_until(shown, "both entries")
    assert "pinned" in warm
    assert "3.1 MB of 3.1 MB" in warm.replace("\N{NO-BREAK SPACE}", " ")
    assert "/<b>nothing does not exist" in gone
    file.write_text("[]")
    problems = "return document.getElementById('warm-problems').innerText"
    wait_until(lambda: "not in force: line 1: the file" in browser.run(problems), "the fault")
