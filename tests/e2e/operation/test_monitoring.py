"""The rules, the dashboard and the kustomize component: valid, tested, and about metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import promql_parser as promql
import pytest
import yaml

from penstock.server.watch.metrics import METRICS

from ..deployment.manifests import OVERLAYS, Object, render
from .monitoring import MONITORING, alerts, dashboard, dashboard_queries, recorded, rules

TARGET_LABELS = {"job", "instance", "namespace", "pod", "container", "node"}
"""What Prometheus gives to every series of a target."""
LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")
TEMPLATE = re.compile(r"\$labels\.(\w+)")

RequireTool = Callable[[str], str]
Labels = dict[str, tuple[str, ...]]


def declared() -> dict[str, Labels]:
    """Every series that a scrape has, with its labels and all their values; () is any value."""
    series: dict[str, Labels] = {"up": {}}
    for metric in METRICS:
        labels = dict(metric.labels)
        if metric.kind == "histogram":
            series[f"{metric.full_name}_bucket"] = {**labels, "le": ()}
            series[f"{metric.full_name}_sum"] = series[f"{metric.full_name}_count"] = labels
        else:
            series[metric.full_name] = labels
    return series


def all_queries() -> list[tuple[str, str, str]]:
    """Where it stands, the query, and the text that speaks of its labels as `{{ label }}`."""
    found = list(dashboard_queries())
    for rule in rules():
        texts = TEMPLATE.findall(json.dumps(rule.get("annotations", {})))
        legend = " ".join(f"{{{{{label}}}}}" for label in texts)
        found.append((rule.get("alert") or rule["record"], rule["expr"], legend))
    return found


def selectors(query: str) -> list[promql.VectorSelector]:
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(promql.parse(query), visit)
    return found


def labels_of(node: promql.Expr) -> set[str]:
    """Labels that the result may have. Fails where something is grouped by a label that is not there."""
    if isinstance(node, promql.VectorSelector):
        expression = recorded().get(str(node.name))
        if expression is not None:
            return labels_of(promql.parse(expression))
        return TARGET_LABELS | set(declared()[str(node.name)])
    if isinstance(node, promql.MatrixSelector):
        return labels_of(node.vector_selector)
    if isinstance(node, promql.AggregateExpr):
        inside = labels_of(node.expr)
        if node.modifier is None:
            return set()
        named = set(node.modifier.labels)
        assert named <= inside, f"no label {named - inside} in {node.expr}"
        return named if node.modifier.type == promql.AggModifierType.By else inside - named
    if isinstance(node, promql.BinaryExpr):
        left, right = labels_of(node.lhs), labels_of(node.rhs)
        matching = node.modifier.matching if node.modifier is not None else None
        named = set(matching.labels) if matching is not None else set()
        assert named <= left & right, f"{named} not on both sides of {node}"
        return left or right
    if isinstance(node, promql.Call):
        inside = set().union(*(labels_of(argument) for argument in node.args))
        return inside - {"le"} if node.func.name == "histogram_quantile" else inside
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        return labels_of(node.expr)
    return set()


@pytest.mark.parametrize(("where", "query", "legend"), all_queries())
def test_every_query_names_metrics_labels_and_values_that_exist(where: str, query: str, legend: str) -> None:
    series, found = declared(), selectors(query)
    assert found, query
    for selector in found:
        assert selector.name in series or selector.name in recorded(), f"{where}: no metric {selector.name}"
        values = series.get(selector.name, {})
        for matcher in selector.matchers.matchers:
            if matcher.name in TARGET_LABELS:
                continue
            assert matcher.name in values, f"{where}: {selector.name} has no label {matcher.name}"
            for value in matcher.value.split("|"):
                assert value in values[matcher.name], f"{where}: {matcher.name} is never {value}"
    assert set(LEGEND.findall(legend)) <= labels_of(promql.parse(query)), where


@pytest.mark.parametrize(
    "query",
    [
        "sum by (stat) (penstock_staging_bytes)",
        "sum by (source) (sum by (reason) (penstock_read_retries_total))",
        "penstock_loads_active * on (source) penstock_read_bytes_total",
        "1 - sum without (source) (penstock_loads_active)",
    ],
)
def test_grouping_by_a_label_that_is_not_there_is_noticed(query: str) -> None:
    with pytest.raises(AssertionError):
        labels_of(promql.parse(query))


def test_promtool_accepts_the_rules_and_their_tests_pass(require_tool: RequireTool) -> None:
    promtool = require_tool("promtool")
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for firing in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) is firing} == set(alerts())


def test_every_alert_says_what_is_wrong_how_bad_it_is_and_what_to_read() -> None:
    """That docs/troubleshooting.md has the section is tested with the other documents."""
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert rule["annotations"]["runbook"] == f"docs/troubleshooting.md#{name.lower()}"


def test_every_panel_asks_the_chosen_data_source_and_says_what_it_shows() -> None:
    document = dashboard()
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    assert {variable["name"] for variable in document["templating"]["list"]} == {"datasource", "instance"}
    for panel in document["panels"]:
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            for target in panel["targets"]:
                assert target["datasource"]["uid"] == "${datasource}"
                assert "$instance" in target["expr"]


def test_the_dashboard_shows_where_bytes_came_from_and_every_metric_of_the_tier() -> None:
    shown = {str(selector.name) for _, query, _ in dashboard_queries() for selector in selectors(query)}
    tier = {metric.full_name for metric in METRICS if metric.name.startswith("tier_")}
    assert {*tier, "penstock_delivered_from_bytes_total"} <= shown


def test_the_operator_gets_the_same_rules() -> None:
    made = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())
    assert made["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text()), (
        "run deploy/monitoring/make_prometheus_rule.py"
    )


@pytest.fixture
def monitor(require_tool: RequireTool) -> Object:
    require_tool("kubectl")
    return next(found for found in render("monitoring") if found["kind"] == "PodMonitor")


def test_the_component_holds_the_monitor_the_rules_and_the_dashboard(monitor: Object) -> None:
    rendered = {found["kind"]: found for found in render("monitoring")}
    assert set(rendered) == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    assert json.loads(rendered["ConfigMap"]["data"]["penstock.json"]) == dashboard()
    # The rules and the dashboard select by this name.
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": "penstock"} in endpoint["relabelings"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_monitor_finds_the_port_of_every_daemon_and_no_other(monitor: Object, overlay: str) -> None:
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for workload in render(f"overlays/{overlay}"):
        if workload["kind"] not in ("Deployment", "DaemonSet"):
            continue
        template = workload["spec"]["template"]
        parts = [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]
        found = {
            part["name"]
            for part in parts
            for port in part.get("ports", ())
            if port["name"] == endpoint["port"]
        }
        assert found == {"penstock"} & {part["name"] for part in parts}
        assert not found or wanted <= template["metadata"]["labels"].items()
