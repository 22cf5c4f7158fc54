"""`create_app(resources)`: the one ASGI application, in a server or in the command line's own process."""

from importlib.metadata import version

from fastapi import FastAPI

from registry.http import problems
from registry.http.guards import BodyLimit, SameSite
from registry.resources import Resources
from registry.web import bases, blobs, channels, compositions, operations, releases, suites
from registry.web.repository import REPOSITORY_PREFIXES

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


def create_app(resources: Resources) -> FastAPI:
    app = FastAPI(title="Adaptory", version=version("adaptory"), description="The release registry for LoRA adapters.")
    app.state.resources = resources
    problems.install(app)
    app.add_middleware(BodyLimit, limit_bytes=resources.settings.max_document_bytes)
    app.add_middleware(SameSite, names=LOOPBACK_NAMES)
    for part in (
        suites,
        bases,
        blobs,
        releases,
        compositions,
        operations,
    ):  # suites first: /v1/bases/{base:path} takes all
        app.include_router(part.router)
    for part in (releases, channels, suites):
        for kinds in REPOSITORY_PREFIXES:
            app.include_router(part.repository_routes, prefix=kinds)
    return app
