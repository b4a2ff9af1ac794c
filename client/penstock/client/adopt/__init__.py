"""The interfaces of other projects on top of the client: the Run:ai Model Streamer's, vLLM's, SGLang's,
safetensors'.

Nothing in the client imports this, except the lazy names of `penstock.client`.
"""
