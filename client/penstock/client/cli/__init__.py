"""The command line, `penstock`.

Start with `commands`. Nothing of the client imports this.
"""
