"""The views for people, probes and Prometheus: HTTP, metrics, status, health, the page.

It shows and never decides: nothing in `loads` or below knows of it. The logic counts in `system/counts`.

Start with `endpoints`, which answers `/metrics`, `/status` and `/healthz`. `metrics` declares every metric,
`exposition` writes their values out.

May import: loads, and what lies below it.
"""
