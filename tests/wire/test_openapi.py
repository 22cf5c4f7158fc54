"""The REST contract as OpenAPI says it."""

import json
from pathlib import Path

from registry.api.app import create_app
from registry.settings import Settings
from registry.transfer.resources import open_resources
from tests.wire import snapshots


def test_the_rest_contract_is_the_one_in_the_snapshot(tmp_path: Path) -> None:
    resources = open_resources(Settings(home=tmp_path))
    document = create_app(resources).openapi()
    resources.close()
    document["info"].pop("version")  # every release has another
    snapshots.check("openapi.json", json.dumps(document, indent=1, sort_keys=True))


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
