"""The path prefix that names a repository: /v1/adapters, /v1/models or /v1/sets, then /{namespace}/{name}."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from registry.database.engine import Session
from registry.database.tables import Release, Repository
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.repositories import Kind
from registry.formats.references import RepositoryName, parse_name, parse_version

REPOSITORY_PREFIXES = {"/v1/adapters": Kind.ADAPTER, "/v1/models": Kind.MODEL, "/v1/sets": Kind.SET}


class RepositoryRouter(APIRouter):
    """Adds each of its routes below each prefix."""

    def add_api_route(self, path: str, *args: Any, **options: Any) -> None:
        for prefix in REPOSITORY_PREFIXES:
            super().add_api_route(prefix + path, *args, **options)


@dataclass(frozen=True, slots=True)
class NamedRepository:
    """The repository that a path names, not yet looked up."""

    name: RepositoryName
    kind: Kind

    def find(self, session: Session) -> Repository:
        """Raises NotFound."""
        return repositories.find(session, self.name, self.kind)

    def release(self, session: Session, version: str) -> Release:
        """The repository's release of a version. Raises NotFound."""
        return releases.find(session, self.name, parse_version(version), self.kind)


async def kind_of(request: Request) -> Kind:
    """The kind of repository, from the first part of the path."""
    return next(kind for prefix, kind in REPOSITORY_PREFIXES.items() if request.scope["path"].startswith(prefix))


KindOf = Annotated[Kind, Depends(kind_of)]


async def repository_of(namespace: str, name: str, kind: KindOf) -> NamedRepository:
    """The repository of the path. Raises Usage for a part that is not a name."""
    return NamedRepository(
        RepositoryName(parse_name(namespace, "namespace"), parse_name(name, "repository name")), kind
    )


RepositoryOf = Annotated[NamedRepository, Depends(repository_of)]
