"""Text for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """In one line and without control characters. Names of files may hold any, which could move the cursor or
    forge a line."""
    return "".join(character if character.isprintable() else "?" for character in text)
