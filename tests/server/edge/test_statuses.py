"""An error of any text as the status of a call."""

from __future__ import annotations

import pytest

from penstock.server.edge.statuses import MAX_MESSAGE_BYTES, to_status
from penstock.server.errors import CheckpointNotFoundError


@pytest.mark.parametrize("text", ["x", "%", "\n", "é", "\U0001f600", "\udcff"])
def test_an_error_of_any_text_fits_into_trailers(text: str) -> None:
    error = CheckpointNotFoundError(text * 5000, **{f"key{number}": text * 5000 for number in range(20)})
    status = to_status(error, "12345678")
    encoded = sum(1 if 32 <= byte < 127 and byte != 37 else 3 for byte in status.message.encode())
    assert 400 < encoded <= MAX_MESSAGE_BYTES
    assert encoded + len(status.SerializeToString()) * 4 / 3 < 7500
