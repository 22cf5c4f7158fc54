"""What the address of a page names, parsed once for every page."""

from typing import Annotated

from fastapi import Depends

from registry.formats.references import RepositoryName, Version, parse_name, parse_repository, parse_version


async def _repository(namespace: str, name: str) -> RepositoryName:
    return parse_repository(f"{namespace}/{name}")


async def _channel(channel: str) -> str:
    return parse_name(channel, "channel")


async def _version(version: str) -> Version:
    return parse_version(version)


RepositoryOf = Annotated[RepositoryName, Depends(_repository)]
ChannelOf = Annotated[str, Depends(_channel)]
VersionOf = Annotated[Version, Depends(_version)]
