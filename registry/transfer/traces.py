"""OpenTelemetry traces: requests, SQL statements, requests to S3, and steps of jobs.

OpenTelemetry's own environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT, set their destination. A statement
is recorded without its values.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine, ExceptionContext

from registry.database.prepared import Prepared
from registry.errors import Unavailable

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.trace import Span

QUIET = "healthz,readyz,metrics"
"""Paths that are polled continually."""
MAX_STATEMENT = 2_000
_NAME = "adaptory"


def begin(service: str) -> None:
    """Sends this process's spans as those of `service`. Raises Unavailable without the extra `otel`."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation import botocore  # pyright: ignore[reportMissingTypeStubs]
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise Unavailable(
            "extra_missing", "ADAPTORY_TRACES needs packages.", next_step="Install adaptory with its extra `otel`."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    botocore.BotocoreInstrumentor().instrument()
    Prepared.watch = staticmethod(_watched)
    event.listen(Engine, "before_cursor_execute", _before_statement)
    event.listen(Engine, "after_cursor_execute", _after_statement)
    event.listen(Engine, "handle_error", _failed_statement)


def trace_requests(app: "FastAPI") -> None:
    """Makes each request of the application a span, named by its route."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(app, excluded_urls=QUIET, exclude_spans=["send", "receive"])


def trace_work(kind: str, step: str | None, state: str, seconds: float) -> None:
    """A span for a step that has ended or, without a step, for a job."""
    from opentelemetry import trace

    now = time.time_ns()
    name = f"{kind} {step}" if step else kind
    span = trace.get_tracer(_NAME).start_span(name, start_time=now - int(seconds * 1e9))
    span.set_attributes({"adaptory.job.kind": kind, "adaptory.job.state": state})
    span.end(now)


@contextmanager
def _watched(connection: Connection, text: str) -> Generator[None]:
    """A span around a statement that goes directly to the driver."""
    span = _begun(connection, text)
    try:
        yield
    except Exception as error:
        _end(span, error)
        raise
    _end(span)


def _before_statement(connection: Connection, _cursor: Any, text: str, *_: Any) -> None:
    connection.info["span"] = _begun(connection, text)


def _after_statement(connection: Connection, *_: Any) -> None:
    _end(connection.info.pop("span", None))


def _failed_statement(context: ExceptionContext) -> None:
    if context.connection is not None:
        _end(context.connection.info.pop("span", None), context.original_exception)


def _begun(connection: Connection, text: str) -> "Span | None":
    """A new span, within a request only: an idle worker polls for jobs continually."""
    from opentelemetry import trace

    if not trace.get_current_span().is_recording():
        return None
    span = trace.get_tracer(_NAME).start_span(text.split(None, 1)[0].upper(), kind=trace.SpanKind.CLIENT)
    span.set_attributes({"db.system.name": connection.dialect.name, "db.query.text": text[:MAX_STATEMENT]})
    return span


def _end(span: "Span | None", error: BaseException | None = None) -> None:
    from opentelemetry.trace import StatusCode

    if span is not None:
        if error is not None:
            span.set_status(StatusCode.ERROR, type(error).__name__)
        span.end()
