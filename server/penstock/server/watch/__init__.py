"""What people, probes and Prometheus see: HTTP, metrics, status, health, the page.

It looks and never decides: nothing in `loads` or below knows of it. What the logic counts is in
`system/counts`; here is how it is shown.

Start with `endpoints` for what answers `/metrics`, `/status`, `/healthz`; `metrics` declares every metric.

May import: loads, and what lies below it.
"""
