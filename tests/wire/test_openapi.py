"""The REST contract in OpenAPI."""

from pathlib import Path

from registry.api.app import create_app
from registry.environment.settings import Settings
from registry.transfer.resources import open_resources
from tests.wire import snapshots
from tests.wire.outline import kind, outline


def test_the_rest_contract_is_the_one_in_the_snapshot(tmp_path: Path) -> None:
    resources = open_resources(Settings(home=tmp_path))
    document = create_app(resources).openapi()
    resources.close()
    document["info"].pop("version")  # every release has another
    snapshots.check("openapi.txt", outline(document))


def test_every_route_of_adapters_exists_for_models_too(tmp_path: Path) -> None:
    resources = open_resources(Settings(home=tmp_path))
    paths = create_app(resources).openapi()["paths"]
    resources.close()
    adapters, models = (
        {path.removeprefix(prefix): set(item) for path, item in paths.items() if path.startswith(prefix)}
        for prefix in ("/v1/adapters", "/v1/models")
    )
    assert adapters == models
    assert "/{namespace}/{name}/channels/{channel}/rollback" in models


def test_a_limit_that_changes_for_a_client_is_a_line_of_the_outline() -> None:
    assert kind({"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}], "title": "Name"}) == (
        "string maxLength=9|null"
    )
    assert kind({"type": "array", "items": {"$ref": "#/components/schemas/FileOut"}, "minItems": 1}) == (
        "[FileOut] minItems=1"
    )
