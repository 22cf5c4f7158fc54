"""Finds the checkpoint of a base: on this machine, downloaded to it, or in a bucket."""

from collections.abc import Callable, Sequence
from pathlib import Path

from composer.errors import Mismatch
from composer.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from composer.formats.checkpoints.hashing import verify_checkpoint
from registry.environment.settings import Settings
from registry.errors import Invalid, NotFound, Unavailable
from registry.formats.addresses import S3_SCHEME, parse_s3_address
from registry.storage.base_cache import BaseCache
from registry.storage.hub import bases as hub_bases


class Bases:
    """The bases on this machine. Those downloaded from buckets stay until `release`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache = BaseCache(settings.home_directory / "cache" / "bases", settings.base_cache_bytes)

    def find(
        self, locations: Sequence[str], size_bytes: int, check: Callable[[], None] = lambda: None
    ) -> tuple[Path | None, list[str]]:
        """A base's checkpoint, downloaded if necessary; or None, and the reason for each location. `size_bytes`
        is the size of its tensors, which bounds a download; `check` is called often while one goes on.
        Raises Unavailable if a hub or a bucket does not answer, and what `check` raises."""
        outage: Unavailable | None = None
        try:
            trusted = self._settings.hub_token_organisations
            directory, reasons = hub_bases.find_base(locations, size_bytes, trusted, check)
        except Unavailable as error:
            directory, reasons, outage = None, [error.detail], error
        for url in in_buckets(locations) if directory is None else ():
            from registry.storage.s3.checkpoint import download_checkpoint  # boto3 is imported only where it is used

            address = parse_s3_address(url)
            try:
                return download_checkpoint(self._settings.storage, address, self._cache, size_bytes, check), []
            except (Invalid, NotFound) as error:
                reasons.append(error.detail)
        if outage is not None:
            raise outage
        return directory, reasons

    def open(
        self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[], None] = lambda: None
    ) -> Checkpoint:
        """The checkpoint that `find` finds. Its weights are not verified. Raises NotFound with `base_not_here`, and
        what `find` raises."""
        directory, reasons = self.find(locations, size_bytes, check)
        if directory is None:
            missing = f"This host cannot find the base at any location ({', '.join(locations) or 'it has none'})."
            raise NotFound(
                "base_not_here",
                " ".join([missing, *reasons]),
                subject=digest,
                next_step="Add one on that host (`adaptory base add DIR`), or an hf:// or s3:// address. The nodes of "
                "a cluster name the bases in their directories with --resources.",
            )
        return open_checkpoint(directory)

    def open_verified(
        self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[int], None] = lambda _done: None
    ) -> Checkpoint:
        """The checkpoint that `open` finds, with its weights verified: the files at a location may have changed.
        Differing weights are read again, and downloaded again if they are a copy from a bucket: one wrong read may be
        the network's or the memory's fault. Raises Mismatch with `base_changed`, and what `open` raises."""
        checkpoint = self.open(digest, locations, size_bytes, lambda: check(0))
        try:
            verify_checkpoint(checkpoint, digest, check)
        except Mismatch:
            self._cache.discard(checkpoint.path)
            checkpoint = self.open(digest, locations, size_bytes, lambda: check(0))
            verify_checkpoint(checkpoint, digest, check)
        return checkpoint

    def open_in_bucket(self, location: str, directory: Path) -> Checkpoint:
        """Opens the checkpoint at an s3:// location, whose weights stay there. Its small files go into a directory
        below `directory`."""
        from registry.storage.s3.checkpoint import open_remote_checkpoint

        address = parse_s3_address(location)
        return open_remote_checkpoint(self._settings.storage, address, directory / address.name)

    def release(self) -> None:
        """Stops using the bases found so far."""
        self._cache.release()


def in_buckets(locations: Sequence[str]) -> list[str]:
    """The locations that are in a bucket."""
    return [url for url in locations if url.startswith(S3_SCHEME)]
