"""Semver for adapters: the changes that break users of a range, and the version that such a change requires. A server
that is set up for one release (its base, its highest rank, the modules it adapts) must be able to load the next one
that `^version` resolves to. A change that it could not load is breaking and belongs outside that range: in a new major
number. For 0.y.z, which semver leaves open, this follows npm and Cargo: a new minor number (in 0.0.z a new patch
number).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from composer.findings import Finding, Severity
from composer.formats.adapters.layouts import SET_FILE
from registry.formats.manifest import ManifestFile
from registry.formats.references import Version

Bump = Literal["major", "minor", "patch"]

_WEIGHT_FILES = ("adapter_config.json", "config.json", SET_FILE)
_WEIGHT_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Surface:
    """The requirements of a release on a server, and the digests of its weights. Facts are None for a model.
    `touched` has the last path components of every module it adapts or replaces."""

    base: str
    type: str | None
    variant: str | None
    rank_max: int | None
    touched: frozenset[str]
    weights: frozenset[tuple[str, str]]


def surface(base_digest: str, facts: Mapping[str, Any], files: Iterable[ManifestFile]) -> Surface:
    """The surface of a release: base, type, rank, adapted modules and weight files."""
    replaced = [module.rpartition(".")[2] for module in facts.get("modules_to_save", ())]
    return Surface(
        base=base_digest,
        type=facts.get("type"),
        variant=facts.get("variant"),
        rank_max=facts.get("rank_max"),
        touched=frozenset([*facts.get("targets", ()), *replaced]),
        weights=frozenset(
            (file.path, file.sha256)
            for file in files
            if file.path.endswith(_WEIGHT_SUFFIX) or file.path in _WEIGHT_FILES
        ),
    )


def breaking_changes(old: Surface, new: Surface) -> list[Finding]:
    """The reasons why a server that could load `old` may not be able to load `new`; none for a compatible change."""
    changes: list[Finding] = []

    def say(code: str, message: str, measure: float | None = None) -> None:
        changes.append(Finding(code, Severity.ERROR, code, message, measure))

    if new.base != old.base:
        say("new_base", f"Its base is {new.base[:12]}, not {old.base[:12]}.")
    if (new.type, new.variant) != (old.type, old.variant):
        say("other_type", f"It is {_kind(new)}, not {_kind(old)}.")
    if (new.rank_max or 0) > (old.rank_max or 0):
        say("larger_rank", f"Its largest rank is {new.rank_max}, not {old.rank_max}.", new.rank_max)
    if more := sorted(new.touched - old.touched):
        named = ", ".join(more[:8]) + (f" and {len(more) - 8} more" if len(more) > 8 else "")
        say("more_targets", f"It adapts {named}, which was not adapted before.", len(more))
    return changes


def outside_caret_range(old: Version, new: Version) -> bool:
    """Whether `new` is outside `^old`, so that users of that range do not get it."""
    numbers = (new.major, new.minor, new.patch)
    kept = _kept(old)
    return numbers[: len(kept)] != kept


def required_bump(change: Literal["breaking", "weights", "files"], version: Version) -> Bump:
    """The part of `version` that such a change must increment."""
    parts: tuple[Bump, ...] = ("major", "minor", "patch")
    leading = len(_kept(version)) - 1
    return parts[min(leading + ("breaking", "weights", "files").index(change), 2)]


def _kept(version: Version) -> tuple[int, ...]:
    """The numbers that `^version` fixes: up to the first that is not zero."""
    if version.major:
        return (version.major,)
    return (0, version.minor) if version.minor else (0, 0, version.patch)


def _kind(surface: Surface) -> str:
    return surface.type or "unknown" if surface.type == surface.variant else f"{surface.type} ({surface.variant})"
