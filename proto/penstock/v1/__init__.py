"""The wire contract, version 1: messages and stubs generated from `streamer.proto`.

`make proto` writes `streamer_pb2.py`, `streamer_pb2.pyi` and `streamer_pb2_grpc.py`; they are committed,
and `make check-proto` fails when they differ from what the contract generates.
"""
