"""The file of an adapter set: `adapter_set.json`.

{"format": 1,
 "members": {"sql": {"repository": "acme/sql", "version": "1.2.0", "commit": "40 hex digits"}, ...},
 "router": {"ngrams": [3, 5], "classes": {"sql": {"sel": 0.31, ...}, ..., "base": {...}}}}

A prompt of the class `base` is for the base alone. A member's release is found by its commit, which never changes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from composer.errors import InvalidFile
from composer.formats.adapters.layouts import SET_FILE
from composer.formats.recipes.documents import LISTED, Document, RefusedValues, problem_of
from composer.formats.sets.router import BASE, LONGEST, SHORTEST, Router
from composer.formats.untrusted import read_bytes, reject_duplicate_keys

MAX_BYTES = 16 << 20
MAX_MEMBERS = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_Share = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class SetMember(Document):
    """A release that the set serves some prompts with."""

    repository: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,95}/[a-z0-9][a-z0-9._-]{0,95}$")]
    version: Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,79}$")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class _RouterDocument(Document):
    ngrams: Annotated[tuple[Literal[3], Literal[5]], LISTED] = (SHORTEST, LONGEST)
    classes: dict[str, dict[str, _Share]]


class AdapterSet(Document):
    """The members by their class, which is a short name of each, and the router."""

    format: Literal[1] = 1
    members: Annotated[dict[str, SetMember], Field(min_length=1, max_length=MAX_MEMBERS)]
    router: _RouterDocument

    @model_validator(mode="after")
    def _refuse_unknown_classes(self) -> Self:
        for name in self.members:
            if not _NAME.fullmatch(name) or name == BASE:
                raise RefusedValues(f"{name[:40]!r} cannot name a member", path=("members",))
        if self.router.classes.keys() != self.members.keys() | {BASE}:
            raise RefusedValues(f"it needs a class for each member and for {BASE}", path=("router", "classes"))
        return self

    @classmethod
    def of(cls, members: Mapping[str, SetMember], router: Router) -> Self:
        """The set of the members; a router that was fitted without prompts for the base sends it only prompts that
        share nothing with any class."""
        classes = {name: dict(weights) for name, weights in router.weights.items()}
        return cls(members=dict(members), router=_RouterDocument(classes={BASE: {}, **classes}))

    @property
    def routes(self) -> Router:
        return Router(self.router.classes)

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False).encode()


def read_set(path: Path) -> AdapterSet:
    """Reads the file. Raises InvalidFile naming the field that is wrong."""
    return parse_set(read_bytes(path, MAX_BYTES), path.name)


def parse_set(content: bytes, subject: str = SET_FILE) -> AdapterSet:
    """Parses the file's content. Raises InvalidFile naming the field that is wrong."""
    try:
        document: object = json.loads(content, object_pairs_hook=reject_duplicate_keys)
        return AdapterSet.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        raise _bad(problem.at(subject), problem.why) from error
    except (ValueError, RecursionError) as error:
        raise _bad(subject, f"it is not JSON: {error}") from error


def _bad(where: str, why: str) -> InvalidFile:
    return InvalidFile("bad_set", f"{where}: {why}.", subject=where)


def set_card(made: AdapterSet) -> str:
    """The README.md of a set."""
    rows = [f"| `{name}` | {member.repository} | {member.version} |" for name, member in sorted(made.members.items())]
    lines = [
        "---\nlibrary_name: adaptory\n---",
        f"# A set of {len(made.members)} adapters",
        "No weights are combined: a router sends each prompt to the adapter whose fitting prompts it resembles most, "
        "or to the base.",
        "| prompts of | adapter | version |\n|---|---|---|\n" + "\n".join(rows),
        f"`{SET_FILE}` has the members by commit and the router. `adaptory mirror` loads the members of a set that a "
        "channel serves, and `adaptory route` chooses one of them for each request.",
    ]
    return "\n\n".join(lines) + "\n"
