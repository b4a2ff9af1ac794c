"""The environment's settings for the Hub: huggingface_hub's own variables, as it reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import SourceUnavailableError
from ..objects.reach import WebPath

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = ("1", "ON", "YES", "TRUE")
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class HubSettings:
    endpoint: str
    """Without a slash at its end."""
    cache: Path
    """The directory of `models--org--repo`."""
    offline: bool
    """Whether the Hub is never asked, and only the cache is used."""
    token_file: Path | None
    """The token file. None: no token is sent unless HF_TOKEN names one."""
    token: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> HubSettings:
        """Raises SourceUnavailableError for an endpoint that is no URL."""
        home = environment.get("HF_HOME") or os.path.join(
            environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
        )
        cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
        offline = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
        implicit = not _is_true(environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", ""))
        token_file = _path(environment.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
        return cls(
            endpoint=_endpoint(environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT),
            cache=_path(cache or os.path.join(home, "hub")),
            offline=_is_true(offline),
            token_file=token_file if implicit else None,
            token=_clean(environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN") or ""),
        )

    def current_token(self) -> str:
        """The present token; a program that renews it rewrites the file. Empty if there is none. Raises
        SourceUnavailableError, whose text does not hold it."""
        token, place = self.token, "HF_TOKEN"
        if not token and self.token_file is not None:
            place = f"the token file {self.token_file}"
            try:
                with self.token_file.open("rb") as file:
                    token = _clean(file.read(MAX_TOKEN_BYTES).decode("latin-1"))
            except (FileNotFoundError, NotADirectoryError):
                return ""
            except OSError as error:
                raise SourceUnavailableError(
                    f"{place} of the Hub cannot be read: {error.strerror}; correct it, or set HF_TOKEN"
                ) from None
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise SourceUnavailableError(
                f"{place} holds no token of the Hub: it has characters that no token has; write one there"
            )
        return token


def _clean(text: str) -> str:
    return text.replace("\r", "").replace("\n", "").strip()


def _path(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(text)))


def _is_true(text: str) -> bool:
    return text.strip().upper() in _TRUE


def _endpoint(text: str) -> str:
    try:
        return WebPath.parse(text.strip()).url.rstrip("/")
    except ValueError as error:
        raise SourceUnavailableError(
            "HF_ENDPOINT, the Hub that penstockd asks, cannot be used: it "
            f"{str(error).replace('netrc file', 'HF_TOKEN')}"
        ) from None
