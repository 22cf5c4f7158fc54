"""PostgreSQL through psycopg: an engine whose statements come to an end, whatever the server does.

The server ends a statement that takes too long, but one that hangs ends nothing: its kernel goes on acknowledging
packets, so that no timeout of TCP runs out either. Therefore the client counts too.
"""

import select
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DisconnectionError

T = TypeVar("T")
_GRACE_S = 2.0
"""The server's own timeout says more: it gets the chance to."""


class Connection(psycopg.Connection[Any]):
    """Waits `longest_wait_s` for any answer, then closes: what a late answer would belong to is unknown by then."""

    longest_wait_s: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.longest_wait_s if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.pgconn.finish()
            raise psycopg.OperationalError(f"it did not answer within {self.longest_wait_s} s") from error


def postgresql_engine(url: URL, pool_size: int, connect_s: int, statement_s: float | None) -> Engine:
    """`connect_s` is 2 at least (libpq's rule); with `statement_s` None statements may take as long as they need.

    A connection commits by itself: to be told so for each read would cost as much as a statement.
    """
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    # Compiling a plan takes 100 ms and more, which no statement of ours is long enough to win back.
    options = f"{url.query.get('options', '')} -c jit=off"
    if statement_s is not None:
        # A process that hangs in the middle of a transaction must not keep its locks either.
        limit_ms = int(statement_s * 1000)
        options += f" -c statement_timeout={limit_ms} -c idle_in_transaction_session_timeout={limit_ms}"
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        connect_args={"options": options, "connect_timeout": connect_s},
    )

    @event.listens_for(engine, "do_connect")
    def _connect(  # pyright: ignore[reportUnusedFunction]
        _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> Connection:
        connection = Connection.connect(*arguments, **parameters)
        connection.longest_wait_s = None if statement_s is None else statement_s + _GRACE_S
        return connection

    @event.listens_for(engine, "checkout")
    def _look(connection: Connection, _record: object, _proxy: object) -> None:  # pyright: ignore[reportUnusedFunction]
        if connection.closed or _has_news(connection):
            raise DisconnectionError  # the pool tries another one

    return engine


def _has_news(connection: Connection) -> bool:
    """A server says nothing unasked but farewell. To look for that is free; SQLAlchemy's `pool_pre_ping` asks each
    time, which costs as much as resolving a channel."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))
