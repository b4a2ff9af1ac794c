"""The edge: the sockets that clients open, and protobuf.

It bounds the cost of what clients send, and translates between messages of the wire and the requests and
events of `loads`. It has no policy of memory or storage, and nothing that people or probes look at.

handoff       the handoff socket: sessions, tokens, slabs; `unix` asks the kernel for the uid of a peer
gate          how many connections a user may have, and what they may cost
passage       one connection through the gate; `ends` are its two ends, `streams` its requests
frame_filter  which HTTP/2 frames pass, and which wait; `allowance` is the work that a user may cause
frames        headers of frames; `fields` are header blocks (both pure)
rpc           the gRPC server behind the gate
service       the methods of the service: start here. `calls` takes their messages and sends their answers,
              `answers` bounds what clients have not received
requests      messages as requests of `loads`; `events` are events as messages, `fetching` both of a fetch
health        gRPC's health service
statuses      errors as statuses of gRPC

May import: watch, loads, and what lies below them.
"""
