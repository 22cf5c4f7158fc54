"""A channel's move that is asked for again when its answer was lost, and then undoes nobody else's."""

from registry.client.api import Api, Json
from registry.client.parallel import PAUSES_S, patiently
from registry.errors import NotFound, Stale, Unavailable


def channel_path(release: Json, channel: str) -> str:
    """Of a channel in the repository of a release as the wire shows it."""
    return f"/v1/{release['kind']}s/{release['repository']}/channels/{channel}"


def promote_patiently(api: Api, release: Json, channel: str) -> tuple[Json, list[Json]]:
    """The move that puts the release on the channel, and those that the channel has made since, the newest first.

    There are such only where an answer was lost: a request that failed may have moved the channel all the same, and
    somebody may have rolled it back by now. So it is repeated only as long as the channel is where it was; what was
    done otherwise, the history tells. Raises Stale when others moved the channel meanwhile, and this push did not.
    """
    path, version = channel_path(release, channel), release["version"]
    before = patiently(lambda: _last_move(api, path), iter(PAUSES_S))
    unmoved = {"If-Match": f'"{before}"'} if before else {"If-None-Match": "*"}
    headers: dict[str, str] = {}

    def ask() -> tuple[Json, list[Json]]:
        nonlocal headers
        try:
            return api.put(path, {"version": version}, headers), []
        except Stale:
            since = _moves_since(api, path, before)
            made = next((at for at in reversed(range(len(since))) if since[at]["to_version"] == version), None)
            if made is None:
                raise
            return since[made], since[:made]
        except Unavailable as error:
            if error.code != "registry_unreachable":  # that one was never sent
                headers = unmoved
            raise

    return patiently(ask, iter(PAUSES_S))


def _last_move(api: Api, path: str) -> int:
    """Its id; 0 for a channel that is not there yet."""
    try:
        return api.get(path)["move"]
    except NotFound:
        return 0


def _moves_since(api: Api, path: str, before: int) -> list[Json]:
    """The newest first."""
    found: list[Json] = []
    for move in api.pages(f"{path}/history"):
        if move["id"] <= before:
            break
        found.append(move)
    return found
