"""`create_app(resources)`: the ASGI application, in a server or in the command line's own process."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from registry.api.http import problems
from registry.api.http.callers import ActorCache
from registry.api.http.exchanges import AccessLog, Exchanges, Observe
from registry.api.http.feed import Feed, OpenStreams
from registry.api.http.file_origin import FileOrigin
from registry.api.http.guards import BodyLimit, CallerLimits, HeaderLimit, OwnHost, SameSite
from registry.api.http.loopback import AskForSecret, Secret
from registry.api.http.threads import UploadThreads
from registry.api.routes.documents import RenderedReleaseCache
from registry.transfer.openid import OpenIdProvider
from registry.transfer.resources import Resources
from registry.transfer.sign_in import SignIn
from registry.transfer.token_exchange import TokenExchange

if TYPE_CHECKING:
    from registry.api.http.metrics import Metrics

DESCRIPTION = "The release registry for LoRA adapters."
DOWNLOAD_THREADS = 32
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class RouterEntry(NamedTuple):
    """A router of a module in `registry.api.routes`; each of its paths contains one of the `parts`."""

    module: str
    router: str
    parts: tuple[str, ...]


ROUTERS = tuple(RouterEntry(*entry) for entry in (
    # Tried in order, most used first. Suites before bases: /v1/bases/{base:path} matches everything.
    ("search", "router", ("releases", "resolve")),
    ("channels", "repository_routes", ("channels", "gates", "moves")),
    ("follow", "router", ("follow",)),
    ("fleet", "router", ("fleet",)),
    ("fleet", "repository_routes", ("rollout",)),
    ("attestations", "repository_routes", ("attestations", "evidence")),
    ("attestations", "router", ("worker-keys",)),
    ("canaries", "repository_routes", ("canary", "watch")),
    ("releases", "repository_routes", ("adapters", "models", "sets")),
    ("suites", "repository_routes", ("scores", "target-suite")),
    ("suites", "router", ("suites", "bases")),
    ("bases", "router", ("bases",)),
    ("bases", "upgrade_router", ("upgrades",)),
    ("suites", "evaluations_router", ("evaluations",)),
    ("blobs", "router", ("uploads", "blobs", "files")),
    ("compositions", "router", ("compositions",)),
    ("conflicts", "router", ("conflicts",)),
    ("operations", "router", ("jobs", "healthz", "readyz", "metrics")),
    ("audit", "router", ("audit", "audit.jsonl")),
    ("policies", "router", ("policies",)),
    ("changes", "router", ("changes", "inbox")),
    ("access", "router", ("whoami", "tokens", "namespaces", "users")),
    ("sign_in", "router", ("sign-in",)),
    ("publishers", "router", ("publishers",)),
    ("webhooks", "router", ("webhooks",)),
))  # fmt: skip
HUB: tuple[str, ...] = ("oauth", "xet", "files", "push", "models")
"""Modules of the hub API, which only servers have. They come late: their paths begin with a namespace, or with /api."""
PAGES: tuple[str, ...] = (
    "catalog.search", "html.assets",
    *(f"accounts.{module}" for module in ("login", "provider", "account", "settings", "webhooks")),
    "catalog.bases",
    *(f"jobs.{module}" for module in ("conflicts", "compose", "jobs")),
    *(f"channels.{module}" for module in ("inbox", "moving", "waiting", "policy", "withdrawing", "channel")),
    *("catalog.compare", "channels.history", "catalog.release", "catalog.repository"),
)  # fmt: skip
"""Modules of the pages, which only servers have. They come last, since they answer every path of one to three parts.
Search is the exception and comes first: its two paths get the most requests and match no other route."""


def create_app(
    resources: Resources,
    *,
    tokens: bool = False,
    secret: str | None = None,
    on_demand: bool = False,
    access_log: AccessLog = "off",
) -> FastAPI:
    """Creates the application: for one user or, with `tokens`, for the holders of tokens. On loopback, where others of
    the machine are too, the one user has a `secret`.

    With `on_demand`, the first request that may need a router loads it, and pages are left out: a command uses only a
    few paths, and loading all routers adds 0.25 s to the 1.0 s of `adaptory list`.
    """
    app = _application(resources, tokens=tokens)
    _ask_for(app, resources, secret)
    if on_demand:
        app.add_middleware(RoutesOnDemand, routes=app.router.routes)
        observe = None
    else:
        search, *pages = page_routers()
        for router in (search, *routers(), *hub_routers(), *pages):
            app.router.routes.extend(router.routes)  # `include_router` would build each route again, 4 ms each
        app.state.error_page = import_module("registry.api.pages.html.wire").error_page
        observe = _metrics(app, resources)
    _guard(app, resources, tokens=tokens)
    app.add_middleware(Exchanges, access_log=access_log, observe=observe)
    return app


def create_worker_app(resources: Resources, metrics: "Metrics", *, tokens: bool, secret: str | None = None) -> FastAPI:
    """Creates the application of a worker: `/metrics` with its own numbers, and `/healthz`."""
    app = _application(resources, tokens=tokens)
    _ask_for(app, resources, secret)
    app.state.metrics = metrics
    _guard(app, resources, tokens=tokens)
    served = (route for router in routers() for route in router.routes)
    app.router.routes.extend(route for route in served if getattr(route, "path", "") in ("/metrics", "/healthz"))
    return app


def _application(resources: Resources, *, tokens: bool) -> FastAPI:
    """An application without routes. The framework's API browsing pages are disabled: they load scripts from other
    sites."""
    app = FastAPI(
        title="Adaptory",
        version=version("adaptory"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.resources = resources
    app.state.draining = False
    app.state.secret = None
    app.state.file_origin = FileOrigin.of(resources.settings) if tokens else None
    app.state.uploads = UploadThreads(resources.settings.max_concurrent_uploads if tokens else None)
    app.state.open_streams = OpenStreams(resources.settings.streams_per_token, resources.settings.streams)
    app.state.feed = Feed(resources, app.state)
    app.state.downloads_limiter = CapacityLimiter(DOWNLOAD_THREADS)
    app.state.callers = ActorCache(resources, single_user=not tokens)
    app.state.token_exchange = TokenExchange(resources)
    provider = resources.settings.sign_in
    app.state.sign_in = SignIn(resources, OpenIdProvider(provider) if provider is not None else None)
    app.state.documents = RenderedReleaseCache()
    problems.install(app)
    return app


def _ask_for(app: FastAPI, resources: Resources, secret: str | None) -> None:
    if secret is not None:
        app.state.secret = Secret(resources.settings.home_directory, secret)
        app.add_middleware(AskForSecret, secret=app.state.secret)


def _guard(app: FastAPI, resources: Resources, *, tokens: bool) -> None:
    """Adds the middleware that limits requests and callers."""
    app.add_middleware(BodyLimit, limit_bytes=resources.settings.max_document_bytes)
    if tokens:
        app.add_middleware(CallerLimits, callers=app.state.callers)
        files = app.state.file_origin.host if app.state.file_origin else ""
        app.add_middleware(OwnHost, names=resources.settings.host_names, files=files)
    else:
        app.add_middleware(SameSite, names=LOOPBACK_NAMES)
    app.add_middleware(HeaderLimit, limit_bytes=resources.settings.max_header_bytes)


class RoutesOnDemand:
    """Loads the routers that may match the path of a request, before it goes on."""

    def __init__(self, app: ASGIApp, routes: list[BaseRoute]) -> None:
        self.app, self._routes = app, routes
        self._unloaded = list(ROUTERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parts = set(str(scope["path"]).split("/"))
            for entry in [entry for entry in self._unloaded if not parts.isdisjoint(entry.parts)]:
                self._unloaded.remove(entry)
                self._routes.extend(_router(entry).routes)
        await self.app(scope, receive, send)


def routers() -> list[APIRouter]:
    """The routers of REST."""
    return list(map(_router, ROUTERS))


def _router(entry: RouterEntry) -> APIRouter:
    return getattr(import_module(f"registry.api.routes.{entry.module}"), entry.router)


def hub_routers() -> list[APIRouter]:
    """The routers of the hub API."""
    return [import_module(f"registry.api.hub.{module}").router for module in HUB]


def _metrics(app: FastAPI, resources: Resources) -> Observe:
    from registry.api.http.metrics import ServerMetrics  # only servers are scraped

    app.state.metrics = ServerMetrics(resources)
    return app.state.metrics.observe


def page_routers() -> list[APIRouter]:
    """The routers of the pages."""
    return [import_module(f"registry.api.pages.{module}").router for module in PAGES]
