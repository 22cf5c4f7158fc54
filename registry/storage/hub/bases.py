"""Checkpoints in the hub's own cache, which transformers and vLLM share: one copy on a machine.

A base's location `hf://ORG/NAME@COMMIT` is read from there, and downloaded if it is not there yet.
"""

import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from composer.errors import ComposerError
from composer.formats.checkpoints.checkpoint import local_directory, open_checkpoint
from composer.formats.checkpoints.header import CONVERT, PICKLE_SUFFIXES
from composer.formats.checkpoints.staging import ADAPTER_FILE
from registry.errors import Invalid, RegistryError
from registry.formats.addresses import HUB_SCHEME, HubAddress, parse_hub_address
from registry.storage.hub.remote import Hub, Snapshot

_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_WEIGHTS = ".safetensors"
_HEADER_SHARE, _HEADER_BYTES = 1.1, 100 << 20
"""The overhead allowed for files beyond their tensors."""
_WITHHELD = "No token was sent, since ADAPTORY_HUB_TOKEN_ORGS does not name its organisation on this host."


def download_base(
    address: HubAddress,
    at_most_bytes: int | None = None,
    *,
    with_token: bool = True,
    check: Callable[[], None] = lambda: None,
) -> tuple[HubAddress, Path]:
    """The checkpoint at the address in the hub's own cache, complete, and its pinned address.

    `at_most_bytes` is the size of its tensors, if known; `with_token` sends the token of this host's user; `check` is
    called often, and ends the download by raising. Raises NotFound, NotAllowed or Unavailable, Invalid before a
    download of more than that, and for a repository that has its weights only as pickles."""
    hub = Hub(with_token=with_token, check=check)
    if address.pinned and (directory := hub.cached(address)) and _is_complete(directory):
        return address, directory
    snapshot = hub.snapshot(address)
    paths = list(_checkpoint_files(snapshot))
    if at_most_bytes is not None:
        _refuse_larger(snapshot, paths, at_most_bytes)
    return snapshot.address, hub.bring_into_cache(snapshot, paths)


def find_base(
    locations: Sequence[str], size_bytes: int, token_for: Collection[str], check: Callable[[], None] = lambda: None
) -> tuple[Path | None, list[str]]:
    """A base's checkpoint on this machine: in a directory, in the hub's cache, or downloaded into the cache; or None,
    and the reason for each address on a hub. `size_bytes` is the size of its tensors. Others wrote the locations: this
    host's token is sent only for the organisations in `token_for`. Raises what `check` raises, and Unavailable if no
    location has it and a hub did not answer, which may be temporary."""
    if directory := local_directory(locations):
        return directory, []
    reasons: list[str] = []
    trusted = False
    outage: RegistryError | None = None
    for url in locations:
        if not url.startswith(HUB_SCHEME):
            continue
        try:
            address = parse_hub_address(url)
            if not address.pinned:
                reasons.append(f"{url} names no commit")
                continue
            trusted = address.organisation in token_for
            return download_base(address, size_bytes, with_token=trusted, check=check)[1], []
        except RegistryError as error:
            withheld = error.code in ("hub_repository_unknown", "hub_access") and not trusted
            reasons.append(f"{error.detail} {_WITHHELD}" if withheld else error.detail)
            outage = error if error.code == "hub_unavailable" else outage
    if outage is not None:
        raise outage
    return None, reasons


def may_find_base(locations: Sequence[str]) -> bool:
    """Whether `find_base` is likely to succeed: in a directory, in the hub's cache, or at a commit on a permitted hub.
    Contacts no server."""
    if local_directory(locations):
        return True
    addresses = [url for url in locations if url.startswith(HUB_SCHEME)]
    if not addresses or importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub.constants import HF_HUB_OFFLINE

    for url in addresses:
        try:
            address = parse_hub_address(url)
            kept = Hub().cached(address) if HF_HUB_OFFLINE else None
            if address.pinned and (not HF_HUB_OFFLINE or (kept is not None and _is_complete(kept))):
                return True
        except RegistryError:  # `find_base` raises the error for it
            continue
    return False


def _is_complete(directory: Path) -> bool:
    """Whether all files that it names exist: a download may have been interrupted."""
    try:
        open_checkpoint(directory)
    except ComposerError:
        return False
    return True


def _checkpoint_files(snapshot: Snapshot) -> Iterator[str]:
    """The files of a checkpoint. Weights under other names, or in directories, are copies for other programs."""
    here = [path for path in snapshot.files if "/" not in path and not path.startswith(".") and path != ADAPTER_FILE]
    weights = [path for path in here if path.startswith("model") and path.endswith(_WEIGHTS)]
    if not weights:
        _refuse_pickles(snapshot, here)
    yield from weights
    yield from (path for path in here if path.lower().endswith(_TEXTS) or path.lower().startswith("licen"))


def _refuse_pickles(snapshot: Snapshot, paths: Sequence[str]) -> None:
    if pickled := sorted(path for path in paths if Path(path).suffix in PICKLE_SUFFIXES):
        message = f"{snapshot.address} has its weights only as a pickle ({pickled[0]}), which runs code when opened."
        raise Invalid("pickle", message, subject=pickled[0], next_step=CONVERT)
    raise Invalid(
        "missing_weights",
        f"{snapshot.address} has no model.safetensors.",
        subject="model.safetensors",
        next_step="Name a repository that has its weights as safetensors.",
    )


def _refuse_larger(snapshot: Snapshot, paths: Sequence[str], at_most_bytes: int) -> None:
    total = sum(snapshot.files[path].size_bytes for path in paths)
    if total > at_most_bytes * _HEADER_SHARE + _HEADER_BYTES:
        raise Invalid(
            "too_large",
            f"{snapshot.address} has {total:,} bytes, and the base's tensors have {at_most_bytes:,}.",
            subject=str(snapshot.address),
            next_step="This is another base: register the commit that has the right one.",
        )
