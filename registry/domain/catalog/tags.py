"""Tags, by which clients of the Hugging Face Hub show and filter models.

peft | transformers      adapters and merged models
adaptory                 sets of adapters
base_model:NAME          the base, by its name and each alias; base_model:adapter:NAME for adapters alone
license:NAME             the licence, in lower case
"""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.orm import Session

from registry.domain.catalog import bases
from registry.domain.catalog.repositories import Kind, RepositoryFilter
from registry.errors import NotFound, Usage
from registry.formats.licenses import spdx, spellings

LIBRARIES = {Kind.ADAPTER: "peft", Kind.MODEL: "transformers", Kind.SET: "adaptory"}
_BASE, _OF_ADAPTER, _LICENSE = "base_model:", "base_model:adapter:", "license:"


def list_tags(kind: Kind, base_names: Sequence[str], license_: str | None) -> list[str]:
    """The tags of a release."""
    prefixes = (_BASE, _OF_ADAPTER) if kind is Kind.ADAPTER else (_BASE,)
    of_base = [f"{prefix}{name}" for prefix in prefixes for name in base_names]
    return [LIBRARIES[kind], *of_base, *([_LICENSE + spdx(license_).lower()] if license_ else [])]


def narrow(session: Session, wanted: RepositoryFilter, tags: Sequence[str]) -> RepositoryFilter | None:
    """Adds to the conditions that a repository has all these tags. None if no repository can have them."""
    for tag in tags:
        if tag in LIBRARIES.values():
            wanted = _of_kind(wanted, next(kind for kind, library in LIBRARIES.items() if library == tag))
        elif tag.startswith(_LICENSE):
            names = (*spellings(tag.removeprefix(_LICENSE)),)
            wanted = replace(wanted, licenses=(*wanted.licenses, names))
        elif tag.startswith(_BASE):
            wanted = _of_kind(wanted, Kind.ADAPTER) if tag.startswith(_OF_ADAPTER) else wanted
            try:
                digest, _ = bases.identify(session, tag.removeprefix(_OF_ADAPTER).removeprefix(_BASE))
            except (NotFound, Usage):
                return None
            wanted = replace(wanted, base_digests=(*wanted.base_digests, digest))
        else:
            return None
    return wanted


def _of_kind(wanted: RepositoryFilter, kind: Kind) -> RepositoryFilter:
    return replace(wanted, kinds=(*wanted.kinds, kind))
