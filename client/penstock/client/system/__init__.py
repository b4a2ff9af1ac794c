"""Plain helpers of the client.

sizes        sizes and sources as people write them
descriptors  the limit on open files
process      the id of this process; `interpreter` starts another one
trees        directories that are complete or do not exist
latch        a flag that is set once
shield       work that Ctrl-C does not break off in the middle
unix         connections to the daemon's sockets
missing      says which package to install
printable    text for a terminal
version      this distribution's version

May import: nothing of the client but errors.
"""
