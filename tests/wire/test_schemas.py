"""The schemas that editors read: a change of what a document may say is a line in a diff."""

import json

import pytest

from composer.formats.recipes.schemas import schema_of
from tests.wire import snapshots


@pytest.mark.parametrize("kind", ["recipe", "suite", "policy"])
def test_the_published_schema_is_that_of_the_model(kind: str) -> None:
    snapshots.check(f"../../docs/schemas/{kind}.schema.json", json.dumps(schema_of(kind), indent=2, ensure_ascii=False))
