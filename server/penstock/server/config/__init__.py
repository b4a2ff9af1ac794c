"""From flags and environment variables to one frozen `Config`.

Start with `options`, which declares every flag, and `settings`, which has `Config`.

May import: system.
"""
