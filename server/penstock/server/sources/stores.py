"""The list of stores. A new store is a package beside `s3`, and an entry here."""

from __future__ import annotations

from . import scheme_of
from .azure.store import AzureStore
from .file.store import FileStore
from .gcs.store import GcsStore
from .hub.store import HubStore
from .s3.store import S3Store
from .store import Store
from .web.store import WebStore

STORES: tuple[type[Store], ...] = (FileStore, S3Store, GcsStore, AzureStore, HubStore, WebStore)
"""The first store also has the sources without a scheme: paths."""
FLAGS = tuple(store.flags for store in STORES)
KINDS = tuple(store.kind for store in STORES)
_KIND_OF = {scheme: store.kind for store in STORES for scheme in store.schemes}


def kind_of(uri: str) -> str:
    """The name of a URI's store, which is the label `source` in metrics and status."""
    return _KIND_OF.get(scheme_of(uri), KINDS[0])
