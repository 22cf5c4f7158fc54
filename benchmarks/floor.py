"""Cost of the same libraries when they do almost nothing: FastAPI routes with one SQL query each.

`/releases/{number}` reads one row by its key. `/resolve` runs the statement that a resolve of a channel runs and
returns its row. `python -m benchmarks.floor DATABASE PORT` serves them.
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import text

from registry.database.engine import Database
from registry.domain.channels.resolve import OF_CHANNEL


def create_app(database_url: str) -> FastAPI:
    app = FastAPI()
    engine = Database(database_url).reading  # the registry's pragmas and pool, and no BEGIN, as the registry reads
    one_row = text("SELECT version FROM releases WHERE id = :id")

    @app.get("/releases/{number}")
    def show(number: int) -> dict[str, str]:
        with engine.connect() as connection:
            return {"version": connection.execute(one_row, {"id": number}).scalar_one()}

    @app.get("/resolve")
    def resolve(namespace: str, repository: str, channel: str) -> dict[str, Any]:
        given = {"in_namespace": namespace, "in_repository": repository, "named": channel}
        with engine.connect() as connection:
            return dict(connection.execute(OF_CHANNEL, given).mappings().one())

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
