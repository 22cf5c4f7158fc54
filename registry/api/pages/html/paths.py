"""What the address of a page names, parsed once for every page."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from registry.api.http.request import ResourcesOf
from registry.api.pages.html.render import link
from registry.formats.references import RepositoryName, Version, parse_name, parse_repository, parse_version
from registry.transfer.resources import Resources

CHANNEL = "/{namespace}/{name}@{channel}"


async def _repository(namespace: str, name: str) -> RepositoryName:
    return parse_repository(f"{namespace}/{name}")


async def _channel(channel: str) -> str:
    return parse_name(channel, "channel")


async def _version(version: str) -> Version:
    return parse_version(version)


RepositoryOf = Annotated[RepositoryName, Depends(_repository)]
ChannelOf = Annotated[str, Depends(_channel)]
VersionOf = Annotated[Version, Depends(_version)]


@dataclass(frozen=True, slots=True)
class ChannelRequest:
    """A request about one channel."""

    named: RepositoryName
    channel: str
    request: Request
    resources: Resources

    @property
    def address(self) -> str:
        """The address of the channel's page."""
        return link(str(self.named), channel=self.channel)


async def _channel_request(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf
) -> ChannelRequest:
    # Asynchronous, like the dependencies above: FastAPI would call the class itself in a thread.
    return ChannelRequest(named, channel, request, resources)


ChannelRequestOf = Annotated[ChannelRequest, Depends(_channel_request)]
