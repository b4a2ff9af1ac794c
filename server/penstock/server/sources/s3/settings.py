"""What the daemon's flags say about S3 alone. What boto3's own variables and files say, botocore reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...config.settings import Config


@dataclass(frozen=True, slots=True)
class S3Settings:
    addressing: str = "auto"
    unsigned: bool = False
    requester_pays: bool = False

    @classmethod
    def of(cls, config: Config) -> S3Settings:
        return cls(
            addressing=config.s3_addressing,
            unsigned=config.s3_unsigned,
            requester_pays=config.s3_requester_pays,
        )
