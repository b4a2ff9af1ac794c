"""What the documentation says of the code is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from penstock.server.errors import reasons
from penstock.server.watch.metrics import METRICS

ROOT = Path(__file__).parents[1]


def test_the_page_of_metrics_is_what_the_code_declares() -> None:
    command = [sys.executable, str(ROOT / "docs/build_metrics.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_metric_in_its_queries_exists() -> None:
    text = (ROOT / "docs/metrics.md").read_text().partition("## Questions")[2]
    names = {
        metric.full_name + suffix
        for metric in METRICS
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    used = set(re.findall(r"penstock_\w+", text))
    assert used
    assert used <= names


def test_every_reason_is_explained_with_a_remedy_and_no_other_is() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    by_reason = text.partition("## Errors by reason")[2].partition("## Without a reason")[0]
    sections = {
        head: body for head, _, body in (part.partition("\n") for part in by_reason.split("### ")[1:])
    }
    assert set(sections) == set(reasons())
    assert len(sections) == by_reason.count("### ")
    for body in sections.values():
        meaning, remedy = body.split("**Remedy:** ")
        assert meaning.strip()
        assert remedy.strip()


def test_every_alert_leads_to_its_section() -> None:
    rules = (ROOT / "deploy/monitoring/rules.yaml").read_text()
    text = (ROOT / "docs/troubleshooting.md").read_text().partition("## Alerts")[2]
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert alerts
    assert re.findall(r"^### (\w+)", text, re.MULTILINE) == alerts
    runbooks = re.findall(r"docs/troubleshooting.md#(\w+)", rules)
    assert runbooks == [alert.lower() for alert in alerts]


def test_every_file_that_the_design_page_names_exists() -> None:
    text = (ROOT / "docs/design.md").read_text()
    server, client = ROOT / "server/penstock/server", ROOT / "client/penstock/client"
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)) - {"page/"}
    assert len(named) > 30
    places = (server, server / "sources", client, ROOT)
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
