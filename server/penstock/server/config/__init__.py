"""From flags and environment variables to one frozen `Config`.

options    declares every flag and its variable; `values` parses their texts, `units` are sizes in them
settings   `Config`, validated once
variables  variables that look meant for penstockd and mean nothing to it

May import: system.
"""
