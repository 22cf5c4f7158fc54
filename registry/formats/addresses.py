"""Addresses of checkpoints in buckets, and of repositories of a Hugging Face Hub."""

import re
from dataclasses import dataclass, replace

from registry.errors import Usage

# Checkpoints in a bucket: s3://BUCKET/PREFIX.

S3_SCHEME = "s3://"
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]"
_S3_ADDRESS = re.compile(rf"s3://({_BUCKET})/([^\x00-\x20\x7f?#\\]{{1,700}}?)/?")


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
        return f"{S3_SCHEME}{self.bucket}/{self.prefix}"


def parse_s3_address(text: str) -> S3Address:
    """Raises Usage for anything else, and for a prefix with a part that is empty or dots: clients and proxies that
    normalize addresses would request another key."""
    match = _S3_ADDRESS.fullmatch(text)
    if match is None or any(part in ("", ".", "..") for part in match.group(2).split("/")):
        raise Usage(
            "bad_location",
            f"{text[:120]!r} does not name a checkpoint in a bucket.",
            subject=text[:120],
            next_step="Write s3://BUCKET/PREFIX, the prefix of the objects config.json and *.safetensors.",
        )
    return S3Address(*match.groups())


# Repositories of a Hugging Face Hub: hf://ORG/NAME, or hf://ORG/NAME@REVISION.

HUB_SCHEME = "hf://"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ADDRESS = re.compile(rf"hf://({_PART}(?:/{_PART})?)(?:@([A-Za-z0-9][A-Za-z0-9._/+-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository of models, and a branch, a tag or a commit of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether the address names a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def organisation(self) -> str:
        """The organisation in lower case, since hubs ignore the case."""
        return self.repository.partition("/")[0].lower()

    def at(self, revision: str) -> "HubAddress":
        """The same repository at another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        return f"{HUB_SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_address(text: str) -> HubAddress:
    """Raises Usage for anything else."""
    match = _HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text or "--" in match.group(1):
        raise Usage(
            "bad_hub_address", f"{text[:200]!r} does not name a repository of a Hugging Face Hub.", subject=text[:200]
        )
    return HubAddress(*match.groups())
