"""The log: one line for each event, its name and then its fields, as text or as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any


def event(
    logger: logging.Logger, name: str, fields: Mapping[str, object], *, level: int = logging.INFO
) -> None:
    """Logs `name` with fields, which must be JSON values."""
    logger.log(level, name, extra={"fields": fields})


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{moment}.{int(record.msecs):03d}Z"
        fields: dict[str, Any] = getattr(record, "fields", {})
        error = self.formatException(record.exc_info) if record.exc_info else ""
        message = record.getMessage()
        if self._as_json:
            line = {"time": stamp, "level": record.levelname.lower(), "event": message, **fields}
            return json.dumps({**line, "error": error} if error else line, default=str)
        pairs = "".join(f" {key}={_text(value)}" for key, value in fields.items())
        if not message.isprintable():
            message = json.dumps(message)
        # Indented, a traceback whose message holds a line break cannot be taken for another event.
        trace = "".join(f"\n  {line}" for line in error.splitlines())
        return f"{stamp} {record.levelname.lower()} {message}{pairs}{trace}"


def _text(value: Any) -> str:
    """Quoted if it could be taken for more than one field: text that clients chose must not forge lines."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(" \"'=") and text else json.dumps(text)


def set_up(*, as_json: bool, level: str) -> None:
    """Sends everything to standard error.

    Call it before gRPC is imported, to silence its core. The core would write there past the formatter, with
    line breaks that clients sent, such as those of a GOAWAY's text. GRPC_VERBOSITY in the environment wins.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
