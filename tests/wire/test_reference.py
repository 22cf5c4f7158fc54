"""The pages of docs/reference follow from the code: a change of a command, a route, a setting, a field or a docstring
is a line in a diff of the page that people read."""

from pathlib import Path

from registry.api.app import create_app
from registry.environment.settings import STORAGES, EngineSettings, PrometheusSettings, Settings, SignInSettings
from registry.transfer.resources import open_resources
from tests.wire import snapshots
from tests.wire.reference import cli, python, rest, schemas, settings
from tests.wire.test_schemas import KINDS, schema_of

PAGES = "../../docs/reference"


def test_the_documentation_lists_every_command_with_its_options() -> None:
    snapshots.check(f"{PAGES}/cli.md", cli.page())


def test_the_documentation_lists_every_route_and_who_may_call_it(tmp_path: Path) -> None:
    resources = open_resources(Settings(home=tmp_path))
    document = create_app(resources).openapi()
    resources.close()
    snapshots.check(f"{PAGES}/rest.md", rest.page(document))


def test_the_documentation_lists_every_setting() -> None:
    snapshots.check(f"{PAGES}/settings.md", settings.page())


def test_every_setting_has_a_text_that_the_documentation_shows() -> None:
    silent = {
        f"{model.__name__}.{name}"
        for model in (Settings, SignInSettings, EngineSettings, PrometheusSettings, *STORAGES)
        for name in model.model_fields.keys() - settings.texts_of(model).keys()
    }
    assert silent == set()


def test_the_documentation_has_the_python_api() -> None:
    snapshots.check(f"{PAGES}/python.md", python.page())


def test_the_documentation_lists_the_fields_of_every_document() -> None:
    snapshots.check(f"{PAGES}/schemas.md", schemas.page({kind: schema_of(kind) for kind in KINDS}))
