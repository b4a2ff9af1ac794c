"""What deploy/monitoring holds, read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from ..deployment.manifests import DEPLOY

MONITORING = DEPLOY / "monitoring"
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "1h"}


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return document


def dashboard_queries() -> Iterator[tuple[str, str, str]]:
    """The panel's title, a query with Grafana's variables replaced, and the legend."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query, target["legendFormat"]
