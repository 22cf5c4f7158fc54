"""The part of a path that names a line of releases: /v1/adapters or /v1/models, /{namespace}/{name}."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from registry.names import RepositoryName, parse_part
from registry.repositories import Kind

LINE_PREFIXES = {"/v1/adapters": Kind.ADAPTER, "/v1/models": Kind.MODEL}


@dataclass(frozen=True, slots=True)
class Line:
    name: RepositoryName
    kind: Kind


def kind_of(request: Request) -> Kind:
    return next(kind for prefix, kind in LINE_PREFIXES.items() if request.url.path.startswith(prefix))


KindOf = Annotated[Kind, Depends(kind_of)]


def line_of(namespace: str, name: str, kind: KindOf) -> Line:
    return Line(RepositoryName(parse_part(namespace, "namespace"), parse_part(name, "repository name")), kind)


LineOf = Annotated[Line, Depends(line_of)]
