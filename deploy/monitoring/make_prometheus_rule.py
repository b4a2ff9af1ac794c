"""Makes prometheus-rule.yaml, for the Prometheus operator, from rules.yaml, the only place to edit rules."""

from pathlib import Path

HERE = Path(__file__).parent

HEADER = """\
# Made by make_prometheus_rule.py from rules.yaml: edit that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: penstock
  labels:
    app.kubernetes.io/name: penstock
spec:
"""


def prometheus_rule() -> str:
    lines = (HERE / "rules.yaml").read_text().splitlines()
    rules = lines[lines.index("groups:") :]
    return HEADER + "".join(f"  {line}\n" if line else "\n" for line in rules)


if __name__ == "__main__":
    (HERE / "prometheus-rule.yaml").write_text(prometheus_rule())
