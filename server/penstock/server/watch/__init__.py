"""The views for people, probes and Prometheus: HTTP, metrics, status, health, the page.

It shows and never decides: nothing in `loads` or below knows of it. The logic counts in `system/counts`.

endpoints   the answers to `/metrics`, `/status`, `/healthz` and `/readyz`: start here
http        the HTTP server, in a thread of its own
metrics     declares every metric; `exposition` writes their values out
status      the state of the daemon as a message; `history` is that of the last minutes
health      whether the daemon is alive and ready
page/       the page that draws the status

May import: loads, and what lies below it.
"""
