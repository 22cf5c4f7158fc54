"""Traces as a collector gets them: a request, its statements and its requests to S3; a job and its steps."""

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests import services
from tests.durability.processes import wait_for_port
from tests.eventually import eventually
from tests.scenarios.conftest import stocked_embedded, templates, world
from tests.scenarios.world import Cli, World

__all__ = ["stocked_embedded", "templates", "world"]


class Collector(ThreadingHTTPServer):
    """Keeps the spans that are sent to it, by service."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[tuple[str, Span]] = []

    def names(self, service: str) -> set[str]:
        return {span.name for one, span in self.spans if one == service}

    def attributes(self, name: str) -> list[dict[str, str]]:
        spans = [span for _, span in self.spans if span.name == name]
        return [{attribute.key: attribute.value.string_value for attribute in span.attributes} for span in spans]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            assert isinstance(self.server, Collector)
            self.server.spans += [
                (named["service.name"], span) for scope in resource.scope_spans for span in scope.spans
            ]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name in the base class)
        pass


@pytest.fixture
def collector() -> Generator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_a_collector_gets_requests_with_their_statements_and_the_steps_of_jobs(
    stocked_embedded: Cli, world: World, collector: Collector, tmp_path: Path
) -> None:
    cli, port = stocked_embedded, services.free_port()
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("inputs: [acme/sql]\nmethod: stack\nadapter: acme/copy:1.0.0\nprobe: 0\n")
    values = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    environment = values | cli.environment | {"ADAPTORY_TRACES": "true", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    environment["ADAPTORY_LOOPBACK_OPEN"] = "true"
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.server_port}"
    command = [sys.executable, "-m", "registry.cli.start", "serve", "--port", str(port)]
    serving = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_port(port)
        assert httpx2.get(f"{url}/readyz", timeout=60).status_code == 200
        assert httpx2.get(f"{url}/v1/resolve?ref=acme/sql", timeout=60).status_code == 200
        served = Cli({"ADAPTORY_HOME": str(tmp_path / "client"), "ADAPTORY_URL": url, "ADAPTORY_USER": "mia"})
        served.ok("compose", recipe)
        eventually(lambda: "composition" in collector.names("adaptory-server"), every_s=0.1)
    finally:
        serving.terminate()
        serving.wait(30)
    names = collector.names("adaptory-server")
    assert {"GET /v1/resolve", "SELECT", "composition publish"} <= names, names
    assert not any("/readyz" in name for name in names)
    statements = [attribute["db.query.text"] for attribute in collector.attributes("SELECT")]
    assert any("releases" in text for text in statements)
    assert not any("acme" in text for text in statements), "values are not in them"
    resolved = next(span for _, span in collector.spans if span.name == "GET /v1/resolve")
    assert [span for _, span in collector.spans if span.parent_span_id == resolved.span_id]
    if "AWS_ACCESS_KEY_ID" in cli.environment:
        assert any(name.startswith("S3.") for name in names), names
