"""Fill MLflow's registry with model versions, by its own models: `python mlflow_fill.py URI` in MLflow's environment.

Reads JSON lines [name, version, tags] on stdin. Inserts rows, since MLflow's API takes 20 ms for each.
"""

import json
import sys

from mlflow.store.model_registry.dbmodels.models import (  # pyright: ignore[reportMissingImports]
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
)
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore  # pyright: ignore[reportMissingImports]

ALIAS = "prod"


def main() -> None:
    store = SqlAlchemyStore(sys.argv[1])  # creates the tables
    versions = [json.loads(line) for line in sys.stdin]
    names = list(dict.fromkeys(name for name, _, _ in versions))
    rows = {
        SqlRegisteredModel: [{"name": name, "creation_time": 1, "last_updated_time": 1} for name in names],
        SqlModelVersion: [_version(number, name, version) for number, (name, version, _) in enumerate(versions)],
        SqlModelVersionTag: [
            {"name": name, "version": version, "key": key, "value": value}
            for name, version, tags in versions
            for key, value in tags.items()
        ],
        SqlRegisteredModelAlias: [{"name": name, "alias": ALIAS, "version": 1} for name in names],
    }
    with store.ManagedSessionMaker() as session:
        for table, values in rows.items():
            session.bulk_insert_mappings(table, values)


def _version(number: int, name: str, version: int) -> dict[str, object]:
    return {
        "name": name,
        "version": version,
        "creation_time": number,
        "last_updated_time": number,
        "description": "Trained again on last week's tickets.",
        "current_stage": "None",
        "source": f"s3://models/{name}/{version}",
        "storage_location": f"s3://models/{name}/{version}",
        "status": "READY",
    }


if __name__ == "__main__":
    main()
