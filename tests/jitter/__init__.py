"""Finds tests, and code, that are right only as long as nothing lags behind; see `__main__.py`."""
