"""From the daemon's slabs to tensors: the two sockets, calls on them, the mapping, the views and copies of
it.

Start with `calls` for how a call reaches the daemon, `stream` for the messages of one load, `mapping` for its
memory, `tensors` for the tensors in it.

May import: nothing of the client but errors and other plain helpers.
"""
