"""From the daemon's slabs to tensors: the two sockets, calls on them, the mapping, the views and copies of
it.

calls       the calls of one client: start here. `reconnect` repeats them at the next daemon
rpc         a session: gRPC's channel, and `handoff` for token and slabs; `socket_dir` has both sockets
stream      the messages of one load; `receiver` receives them, `name_parts` cuts long lists of names
mapping     the slabs in this process's memory; `written` says which pages it wrote to
tensors     the tensors in them; `copies` is memory for those that are copied
progress    a bar, and a line while a load waits

May import: nothing of the client but errors and other plain helpers.
"""
