"""The command line, `penstock`.

Start with `commands`, which runs the commands, and `arguments`, which parses them. Nothing of the client
imports this.
"""
