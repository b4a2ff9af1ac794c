"""From the daemon's slabs to tensors: the two sockets, the mapping, the views and copies of it.

Start with `stream` for the conversation of one load, `mapping` for its memory, `tensors` for the tensors in
it.

May import: nothing of the client but errors and other plain helpers.
"""
