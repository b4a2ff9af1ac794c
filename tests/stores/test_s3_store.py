"""S3 passes what every store has to, against a real HTTP server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import parse_qs, quote, urlsplit
from xml.sax.saxutils import escape

import pytest

from penstock.server.sources import SourceFile
from penstock.server.sources.s3.store import S3Store
from penstock.server.sources.store import Store

from ..server.objects import Asked, ObjectServer
from ..server.support import make_config
from .conformance import ObjectStoreTests, Storage, closing
from .hooked import HookedStorage
from .proxied import without_settings

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Bucket(HookedStorage):
    def __init__(self, store: Store, server: ObjectServer) -> None:
        super().__init__(store, "s3://bucket/top", server.hooks)
        self._server = server
        server.hooks.append(self._list)

    def put(self, name: str, content: bytes) -> str:
        self._server.put(f"top/{name}", content)
        return f"{self.top}/{name}"

    def fail(self, file: SourceFile) -> contextlib.AbstractContextManager[object]:
        def hook(asked: Asked) -> bool:
            asked.fail(500, "InternalError")
            return True

        return self.hooked(hook)

    def cut_off(self, times: int) -> None:
        left = [times]

        def hook(asked: Asked) -> bool:
            if not left[0]:
                return False
            left[0] -= 1
            start, last = asked.range
            content = self._server.objects[asked.key]
            asked.answer(
                206,
                content[start : (start + last) // 2],
                Content_Length=str(last + 1 - start),
                Content_Range=f"bytes {start}-{last}/{len(content)}",
                ETag=self._server.etags[asked.key],
                Connection="close",
            )
            asked.handler.close_connection = True
            return True

        self._server.hooks.append(hook)

    def _list(self, asked: Asked) -> bool:
        """Answers what lies below a prefix; with a delimiter what lies directly below it."""
        query = parse_qs(urlsplit(asked.target).query)
        if "list-type" not in query:
            return False
        prefix = query.get("prefix", [""])[0]
        keys = [key for key in self._server.objects if key.startswith(prefix)]
        if "delimiter" in query:
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(self._server.objects[key])}</Size>"
            f"<ETag>{escape(self._server.etags[key])}</ETag></Contents>"
            for key in keys
        )
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{NAMESPACE}"><Name>bucket</Name>'
            f"<Prefix>{quote(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        )
        asked.answer(200, body.encode(), Content_Type="application/xml")
        return True


class TestS3Store(ObjectStoreTests):
    @pytest.fixture
    def storage(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
        without_settings(monkeypatch)
        with contextlib.closing(ObjectServer()) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
            options = {"s3_addressing": "path", "s3_unsigned": True, "s3_requester_pays": False}
            config = make_config(object_retries=2, object_timeout_seconds=20.0, store_options=options)
            yield from closing(Bucket(S3Store(config), server))
