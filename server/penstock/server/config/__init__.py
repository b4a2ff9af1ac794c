"""What the daemon was told: flags and variables to one frozen `Config`.

Start with `options` for every flag, `settings` for what they become.

May import: system.
"""
