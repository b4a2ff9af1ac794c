"""Buckets in another region than expected."""

from __future__ import annotations

import pytest

from penstock.server.errors import (
    SourceUnavailableError,
)

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    Sources,
    always,
    lists,
    read,
)


@pytest.mark.parametrize("first", ["object", "prefix"])
def test_a_bucket_elsewhere_is_asked_there_and_remembered(
    first: str, server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT)

    def elsewhere(asked: Asked) -> bool:
        if "/us-west-2/" in asked.headers["authorization"]:
            return False
        asked.fail(301, "PermanentRedirect", x_amz_bucket_region="us-west-2")
        return True

    server.hooks += [elsewhere, lists("m/", "m/a")]
    source = sources()
    for what in ("object", "prefix") if first == "object" else ("prefix", "object"):
        if what == "object":
            assert read(source.open("s3://bucket/k", ROOT), 0, 9) == CONTENT[:9]
        else:
            assert source.list("s3://bucket/m/", ROOT) == ["a"]
    assert len(server.asked) == 3


def test_a_redirect_in_circles_ends(server: ObjectServer, sources: Sources) -> None:
    regions = iter(["us-west-1", "us-west-2", "us-west-1"])
    server.hooks.append(
        always(lambda asked: asked.fail(301, "PermanentRedirect", x_amz_bucket_region=next(regions)))
    )
    with pytest.raises(SourceUnavailableError, match="elsewhere"):
        sources().open("s3://bucket/k", ROOT)
    assert len(server.asked) == 2
