"""The check of adapters and a base: every command that joins them calls it, and judges its findings alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from composer.checks.bases import contradicting_bases
from composer.checks.duplicates import same_adapters
from composer.checks.vocabulary import differing_tokenizers, new_embeddings
from composer.findings import Finding
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.inspection import Inspection
from composer.formats.adapters.placement.missing import CODE as MISSING_MODULES
from composer.formats.adapters.placement.result import OTHER_PATHS, PlacementResult

_OF_KEYS = {OTHER_PATHS, MISSING_MODULES, "no_prefix", "pattern_unused", "raw_keys"}
"""Findings of the placement that matter in a result too: losses, and keys that other tools read differently."""


class Member(Protocol):
    """An adapter in a check: its name for messages, its directory, its config, and its placement on the base."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> AdapterConfig: ...
    @property
    def placed(self) -> PlacementResult: ...


def check(members: Sequence[Member], base_names: Sequence[str] = ()) -> list[Finding]:
    """The findings on these adapters together, and on a base of these names.

    contradicting_bases  they state different bases, or another one than this
    same_adapter         one takes part twice
    tokenizers_differ    an error: their tokenizers or templates do not fit into one model
    new_embeddings       rows for new tokens that nothing reads
    missing_modules, …   what their placement on the base found

    `composer/checks/results.py` has the findings on what they result in. Reads their files' headers, and tensors only
    of adapters that may be the same.
    """
    directories = [(member.name, member.path) for member in members]
    return [
        *differing_tokenizers(directories),
        *contradicting_bases([(m.name, m.config.base_model_name_or_path) for m in members], base_names),
        *same_adapters(directories),
        *new_embeddings(directories),
        *(finding for member in members for finding in member.placed.findings if finding.code in _OF_KEYS),
    ]


def check_one(seen: Inspection, base_names: Sequence[str] = ()) -> list[Finding]:
    """The findings of an adapter's inspection, and of the check on it alone."""
    return list(dict.fromkeys([*seen.findings, *check([seen], base_names)]))
