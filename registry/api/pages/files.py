"""A release's files, as a browser saves them."""

from urllib.parse import quote

from fastapi import APIRouter, Response

from registry.api.http.request import ResourcesOf
from registry.api.http.threads import in_store_threads
from registry.api.pages.paths import RepositoryOf, VersionOf
from registry.api.pages.wire import PageReader, PageRoute
from registry.api.routes.blobs import file_response
from registry.domain.catalog import releases

router = APIRouter(route_class=PageRoute)


@router.get("/{namespace}/{name}/{version}/files/{path:path}")
@in_store_threads
def download(named: RepositoryOf, version: VersionOf, path: str, resources: ResourcesOf, actor: PageReader) -> Response:
    """The bytes, or a redirect to the store. Always an attachment: no browser shows what somebody has published."""
    with resources.read() as session:
        release = releases.find(session, named, version)
        full_name = f"{named}:{version}"
        file = releases.find_revision_file(session, release.revision_id, path, full_name)
    saved_as = quote(path.rpartition("/")[2], safe="")
    disposition = f"attachment; filename*=UTF-8''{saved_as}"
    response = file_response(resources, file, f"{path} of {full_name}", None, disposition)
    response.headers["Content-Disposition"] = disposition
    return response
