"""The edge: who may speak, and protobuf.

Here are the sockets that clients open, the bounds on what their bytes may cost, and the translation between
messages of the wire and the requests and events of `loads`. No policy of memory or storage, and nothing that
people or probes look at.

Start with `service` for what a call does, `gate` for what a connection may do, `handoff` for who somebody is.

May import: watch, loads, and what lies below them.
"""
