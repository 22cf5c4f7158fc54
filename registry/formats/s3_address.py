"""Addresses of checkpoints in a bucket: s3://BUCKET/PREFIX."""

import re
from dataclasses import dataclass

from registry.errors import Usage

SCHEME = "s3://"
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]"
_ADDRESS = re.compile(rf"s3://({_BUCKET})/([^\x00-\x20\x7f?#\\]{{1,700}}?)/?")


@dataclass(frozen=True, slots=True)
class S3Address:
    """The objects right below a prefix; `prefix` has no slash at its ends."""

    bucket: str
    prefix: str

    @property
    def name(self) -> str:
        """The last part of the prefix, for messages."""
        return self.prefix.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"


def parse_s3_address(text: str) -> S3Address:
    """Raises Usage for anything else, and for a prefix with a part that is empty or dots: clients and proxies that
    normalize addresses would request another key."""
    match = _ADDRESS.fullmatch(text)
    if match is None or any(part in ("", ".", "..") for part in match.group(2).split("/")):
        raise Usage(
            "bad_location",
            f"{text[:120]!r} does not name a checkpoint in a bucket.",
            subject=text[:120],
            next_step="Write s3://BUCKET/PREFIX, the prefix of the objects config.json and *.safetensors.",
        )
    return S3Address(*match.groups())
