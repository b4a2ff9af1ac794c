"""The edge: the sockets that clients open, and protobuf.

It bounds the cost of what clients send, and translates between messages of the wire and the requests and
events of `loads`. It has no policy of memory or storage, and nothing that people or probes look at.

Start with `service` for the calls, `requests` and `events` for their messages, `gate` for the bounds of
connections, `handoff` for sessions and tokens, `unix` for the uid of a peer.

May import: watch, loads, and what lies below them.
"""
