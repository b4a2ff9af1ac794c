"""The command line, `penstock`.

arguments  parses the command line
commands   runs the commands: start here. `bench`, `demo`, `health`, `verify`, `status_text` are longer

Nothing of the client imports this.
"""
