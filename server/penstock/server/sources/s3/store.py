"""S3 with its threads and flags."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ..objects import ObjectSettings
from ..objects.store import ObjectStore
from .settings import OPTIONS, S3Settings, check
from .source import S3Source


class S3Store(ObjectStore):
    kind = S3Source.kind
    schemes = S3Source.schemes
    flags = StoreFlags(Locators(("s3://",), "an s3:// URI"), OPTIONS, check)

    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> S3Source:
        return S3Source(settings, S3Settings.of(config), workers, on_retry)
