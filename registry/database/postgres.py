"""PostgreSQL through psycopg: an engine whose statements always end, even if the server hangs.

The server ends a statement that takes too long, but a hanging server ends nothing, and its kernel keeps acknowledging
packets, so that no TCP timeout fires. Therefore the client has a timeout too.
"""

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any, TypeVar, cast

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util.queue import Empty

T = TypeVar("T")
_GRACE_S = 2.0
"""Extra time for the server's own timeout, whose message is more specific."""
IDLE_S = 60.0
"""Idle time after which a connection is closed, so that other processes can have it."""
BUSY_S = 30.0
"""How long to wait for one of the process's own connections."""
_RETRY_S = 0.25
TOO_MANY = "53300"
_LIMITS = ("too many clients", "remaining connection slots", "too many connections", "no more connections allowed")
"""Messages of PostgreSQL and PgBouncer at their limits. Before a session exists, psycopg has no SQLSTATE."""


class TimedConnection(psycopg.Connection[Any]):
    """Waits `longest_wait_s` for an answer, then closes: a later answer could not be assigned to its statement."""

    longest_wait_s: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits at most `longest_wait_s` for the server. Raises OperationalError, and closes the connection, if it does
        not answer by then."""
        try:
            return super().wait(gen, interval, self.longest_wait_s if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.pgconn.finish()
            raise psycopg.OperationalError(f"it did not answer within {self.longest_wait_s} s") from error


def is_limit(error: BaseException | None) -> bool:
    """Whether a connection failed because the server, the database or the user has reached its limit."""
    return isinstance(error, psycopg.OperationalError) and (
        error.sqlstate == TOO_MANY or any(limit in str(error) for limit in _LIMITS)
    )


class PatientPool(QueuePool):
    """A pool that waits for one of its own connections if the server accepts no more, and closes idle ones. It hands
    out the most recently returned one first, so that others become idle when the load is low."""

    connect_s = 5.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"use_lifo": True, "timeout": BUSY_S}))
        self._disposed = threading.Event()
        self._closing: threading.Thread | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        """Opens a connection. With none of its own, it retries until `connect_s` is over: another process may close
        one."""
        began = time.monotonic()
        while True:
            try:
                return super()._do_get()
            except psycopg.OperationalError as error:
                patience_s = BUSY_S if self.checkedout() > 0 else self.connect_s
                if not is_limit(error) or time.monotonic() - began > patience_s:
                    raise
            with suppress(Empty):
                return self._pool.get(True, _RETRY_S)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        record.info["idle_since"] = time.monotonic()
        super()._do_return_conn(record)
        if self._closing is None:
            self._closing = threading.Thread(target=self._close_idle, name="idle connections", daemon=True)
            self._closing.start()

    def _close_idle(self) -> None:
        while not self._disposed.wait(IDLE_S / 4):
            while (record := self._longest_idle()) is not None:
                record.close()
                self._dec_overflow()

    def _longest_idle(self) -> Any:
        """Removes the longest idle connection from the queue; None if none has been idle for long."""
        waiting: Any = self._pool
        with waiting.mutex:
            if waiting.queue and waiting.queue[0].info.get("idle_since", 0) < time.monotonic() - IDLE_S:
                return waiting.queue.popleft()
        return None

    def recreate(self) -> "PatientPool":
        pool = cast(PatientPool, super().recreate())
        pool.connect_s = self.connect_s
        return pool

    def dispose(self) -> None:
        self._disposed.set()
        super().dispose()


def postgresql_engine(url: URL, pool_size: int, connect_s: int, statement_s: float | None, role: str = "") -> Engine:
    """An engine. `connect_s` is at least 2 (libpq's rule); with `statement_s` None, statements have no limit.
    Connections commit automatically: a BEGIN and COMMIT for each read would cost as much as a statement. They have the
    name of the process and its `role`, unless the URL or PGAPPNAME names them."""
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    # JIT compilation of a plan takes 100 ms or more, and none of our statements runs long enough to profit.
    options = f"{url.query.get('options', '')} -c jit=off"
    if statement_s is not None:
        # A process that hangs within a transaction must not keep its locks either.
        limit_ms = int(statement_s * 1000)
        options += f" -c statement_timeout={limit_ms} -c idle_in_transaction_session_timeout={limit_ms}"
    engine = create_engine(
        url,
        poolclass=PatientPool,
        pool_size=pool_size,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        hide_parameters=True,
        connect_args={"options": options, "connect_timeout": connect_s, "fallback_application_name": _name(role)},
    )

    engine.pool.connect_s = connect_s  # pyright: ignore[reportAttributeAccessIssue]  (it is a PatientPool)

    @event.listens_for(engine, "do_connect")
    def _connect(  # pyright: ignore[reportUnusedFunction]
        _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> TimedConnection:
        connection = TimedConnection.connect(*arguments, **parameters)
        connection.longest_wait_s = None if statement_s is None else statement_s + _GRACE_S
        return connection

    @event.listens_for(engine, "handle_error")
    def _hide_row(context: ExceptionContext) -> None:  # pyright: ignore[reportUnusedFunction]
        """Removes the detail of an error: that of a violated constraint has the row, with any secret in it."""
        original, wrapped = context.original_exception, context.sqlalchemy_exception
        if isinstance(original, psycopg.Error) and original.diag.message_detail and wrapped is not None:
            original.args = (original.diag.message_primary,)
            wrapped.args = (f"({type(original).__name__}) {original.diag.message_primary}",)

    @event.listens_for(engine, "checkout")
    def _look(connection: TimedConnection, _record: object, _proxy: object) -> None:  # pyright: ignore[reportUnusedFunction]
        if connection.closed or _has_news(connection):
            raise DisconnectionError  # the pool then tries another connection

    return engine


def _name(role: str) -> str:
    """`adaptory serve host 4711`: at most 63 bytes, PostgreSQL's limit."""
    return " ".join(filter(None, ("adaptory", role, socket.gethostname()[:40], str(os.getpid()))))


def _has_news(connection: TimedConnection) -> bool:
    """Whether the server has closed the connection: it sends nothing else unsolicited. Looking at the socket is free;
    SQLAlchemy's `pool_pre_ping` makes a round trip each time, which costs as much as resolving a channel."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))
