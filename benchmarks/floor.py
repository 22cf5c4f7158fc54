"""What the same libraries cost when they do next to nothing: one FastAPI route, one SQL query by primary key.

`python -m benchmarks.floor DATABASE PORT` serves it.
"""

import sys

import uvicorn
from fastapi import FastAPI
from sqlalchemy import create_engine, text


def create_app(database_url: str) -> FastAPI:
    app = FastAPI()
    engine = create_engine(database_url)
    query = text("SELECT version FROM releases WHERE id = :id")

    @app.get("/releases/{number}")
    def show(number: int) -> dict[str, str]:
        with engine.connect() as connection:
            return {"version": connection.execute(query, {"id": number}).scalar_one()}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
