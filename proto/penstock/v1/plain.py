"""Messages as dicts, lists, numbers and strings: the JSON of `/status` and of `penstock status --json`.

Not protobuf's own JSON, which writes 64-bit numbers as strings and leaves out what is 0.
"""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from typing import Any

from google.protobuf.message import Message


def to_plain(message: Message) -> dict[str, Any]:
    """Every field under its name in the .proto file; an absent optional one is None."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if isinstance(value, MutableMapping):
        return dict(sorted(value.items()))
    if isinstance(value, MutableSequence):
        return [to_plain(item) for item in value] if field.message_type else list(value)
    if field.message_type:
        return to_plain(value)
    return None if field.has_presence and not message.HasField(field.name) else value
