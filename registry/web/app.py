"""`create_app(resources)`: the one ASGI application, in a server or in the command line's own process."""

from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI

from registry.http import problems
from registry.http.callers import Callers
from registry.http.exchanges import AccessLog, Exchanges
from registry.http.guards import BodyLimit, CallerLimits, HeaderLimit, SameSite
from registry.resources import Resources
from registry.web import access, bases, blobs, channels, compositions, operations, releases, search, suites
from registry.web.documents import Documents
from registry.web.repository import REPOSITORY_PREFIXES

DESCRIPTION = "The release registry for LoRA adapters."
UPLOAD_THREADS = 32
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")

ROUTERS: tuple[tuple[str, APIRouter], ...] = (
    # They are tried in turn: first what is asked most. Suites before bases: /v1/bases/{base:path} takes all.
    ("", search.router),
    *((prefix, part.repository_routes) for part in (channels, releases, suites) for prefix in REPOSITORY_PREFIXES),
    *(("", part.router) for part in (suites, bases, blobs, compositions, operations, access)),
)


def create_app(resources: Resources, *, tokens: bool = False, access_log: AccessLog = "off") -> FastAPI:
    """For one user on loopback; with `tokens` for everybody, as far as their tokens let them.

    There are no pages for browsing the API: those of the framework load scripts from elsewhere.
    """
    app = FastAPI(
        title="Adaptory",
        version=version("adaptory"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.resources = resources
    app.state.uploads_limiter = CapacityLimiter(UPLOAD_THREADS)
    app.state.callers = Callers(resources, single_user=not tokens)
    app.state.documents = Documents()
    problems.install(app)
    app.add_middleware(BodyLimit, limit_bytes=resources.settings.max_document_bytes)
    if tokens:
        app.add_middleware(CallerLimits, callers=app.state.callers)
    else:
        app.add_middleware(SameSite, names=LOOPBACK_NAMES)
    app.add_middleware(HeaderLimit, limit_bytes=resources.settings.max_header_bytes)
    app.add_middleware(Exchanges, access_log=access_log)
    for prefix, router in ROUTERS:
        app.include_router(router, prefix=prefix)
    return app
