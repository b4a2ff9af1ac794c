"""The daemon's flags for S3 alone. botocore itself reads boto3's variables and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import values
from ...config.options import Option
from ...config.settings import Config
from ...errors import ConfigError


def addressing(text: str) -> str:
    """A value of --s3-addressing. The Run:ai variable says only whether virtual-hosted style is used."""
    word = text.strip().lower()
    word = {"0": "path", "false": "path", "1": "virtual", "true": "virtual"}.get(word, word)
    if word not in ("auto", "path", "virtual"):
        raise ValueError(f"{text!r} is none of auto, path, virtual; choose one")
    return word


OPTIONS = (
    Option(
        "--s3-addressing",
        "auto",
        addressing,
        "how a bucket is named: path, virtual (as a host name), or auto, as botocore does",
        "STYLE",
        ("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING",),
    ),
    Option(
        "--s3-unsigned",
        "0",
        values.switch,
        "1: ask S3 without credentials, for public buckets",
        "0|1",
        ("RUNAI_STREAMER_S3_UNSIGNED",),
    ),
    Option(
        "--s3-requester-pays",
        "0",
        values.switch,
        "1: agree to pay for requests to requester-pays buckets",
        "0|1",
    ),
)


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where flags contradict each other."""
    if given["s3_unsigned"] and given["s3_requester_pays"]:
        raise ConfigError(
            "--s3-requester-pays: S3 cannot charge a requester that it does not know; leave out --s3-unsigned"
        )


@dataclass(frozen=True, slots=True)
class S3Settings:
    addressing: str = "auto"
    unsigned: bool = False
    requester_pays: bool = False

    @classmethod
    def of(cls, config: Config) -> S3Settings:
        return cls(
            addressing=config.store_options["s3_addressing"],
            unsigned=config.store_options["s3_unsigned"],
            requester_pays=config.store_options["s3_requester_pays"],
        )
