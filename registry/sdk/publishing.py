"""The end of every push: hashes, signs and sends the files, and publishes the release."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from registry.sdk.display import Display

if TYPE_CHECKING:
    from registry.client.api import Api
    from registry.client.selection import Selection
    from registry.client.signing import Publication
    from registry.wire.catalog import PublishedOut


def publish(
    api: "Api", selection: "Selection", publication: "Publication", display: Display, key: Path | None = None
) -> "tuple[PublishedOut, int]":
    """Publishes the files as the release, signed with the private key if there is one. Returns the registry's answer,
    and the number of files that the store lacked."""
    from registry.client.push import collect, push
    from registry.client.signing import push_signed

    version = publication.request["version"]
    label = f"push {publication.target}" + (f":{version}" if version else "")
    with TemporaryDirectory() as staging:
        with display.progress("hash", selection.size_bytes) as done:
            files = collect(selection, done)
        with display.progress(label, sum(file.manifest.size_bytes for file in files)) as done:
            if key:
                return push_signed(api, files, publication, key, Path(staging), done)
            return push(api, files, publication.target, publication.kind, publication.request, done)
