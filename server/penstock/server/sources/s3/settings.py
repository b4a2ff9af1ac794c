"""What the daemon's flags say about S3. What boto3's own variables and files say, botocore reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...config import Config


@dataclass(frozen=True, slots=True)
class S3Settings:
    retries: int
    """Attempts in a row without a byte after which a read fails."""
    timeout_seconds: float
    """To connect, and without a byte."""
    connections: int
    """Most that are kept open while nothing is read."""
    addressing: str = "auto"
    unsigned: bool = False
    requester_pays: bool = False

    @classmethod
    def of(cls, config: Config) -> S3Settings:
        return cls(
            retries=config.s3_retries,
            timeout_seconds=config.s3_timeout_seconds,
            connections=config.s3_concurrency,
            addressing=config.s3_addressing,
            unsigned=config.s3_unsigned,
            requester_pays=config.s3_requester_pays,
        )
