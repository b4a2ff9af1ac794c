"""Other people's interfaces on top of the client: the Run:ai Model Streamer's, vLLM's, SGLang's.

Nothing of the client imports this but the lazy names of `penstock.client`.
"""
