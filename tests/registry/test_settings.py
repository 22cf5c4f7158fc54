"""The environment's settings and their consequences."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.environment.settings import LocalStorage, S3Storage, Settings
from tests.scenarios.test_bad_input import refused
from tests.scenarios.world import Cli


def test_the_kind_of_storage_follows_from_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings().storage == LocalStorage()
    monkeypatch.setenv("ADAPTORY_STORAGE__DIRECTORY", str(tmp_path))
    assert Settings().storage == LocalStorage(directory=tmp_path)
    monkeypatch.delenv("ADAPTORY_STORAGE__DIRECTORY")
    monkeypatch.setenv("ADAPTORY_STORAGE__BUCKET", "adapters")
    assert Settings().storage == S3Storage(bucket="adapters")


@pytest.mark.parametrize("prefix", ["abs//../x/", "/team/", "team//", "../team", "a/./b", "/"])
def test_a_prefix_that_other_programs_would_read_as_another_place_is_refused(tmp_path: Path, prefix: str) -> None:
    storage = {"ADAPTORY_STORAGE__BUCKET": "adapters", "ADAPTORY_STORAGE__PREFIX": prefix}
    refused(Cli({"ADAPTORY_HOME": str(tmp_path), **storage})("list"), 2, "ADAPTORY_STORAGE__PREFIX", "team/adapters/")


@pytest.mark.parametrize("prefix", ["", "team", "team/", "team/..adapters/v1."])
def test_a_prefix_is_names_with_slashes_between_them(prefix: str) -> None:
    assert S3Storage(bucket="adapters", prefix=prefix).prefix == prefix


def test_an_environment_variable_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    settings = {"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_MAX_FILE_BYTES": "plenty"}
    refused(Cli(settings)("list"), 2, "ADAPTORY_MAX_FILE_BYTES")
    for address in ("nonsense", "ftp://example.org", "https://", "adapters.example:8470"):
        ran = Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_URL": address})("list")
        refused(ran, 2, "ADAPTORY_URL", "https://adapters.example")
        assert ".." not in ran.err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ADAPTORY_ACESS", "ADAPTORY_ACCESS"),
        ("ADAPTORY_STORAGE__ENDPOINT", "ADAPTORY_STORAGE__ENDPOINT_URL"),
        ("adaptory_tokens", "ADAPTORY_TOKEN"),
        ("ADAPTORY_STORAGE_BUCKET", "ADAPTORY_STORAGE__BUCKET"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_one_that_is_meant(tmp_path: Path, name: str, meant: str) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), name: "tokens"})
    for command in ("list", "migrate", "serve"):
        refused(cli(command), 2, f"Unknown setting {name}", f"Set {meant} ")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "name", ["ADAPTORY_PORT", "ADAPTORY_SERVICE_HOST", "ADAPTORY_PORT_80_TCP_ADDR", "MY_ADAPTORY_URLS"]
)
def test_variables_that_others_make_of_the_name_are_let_pass(tmp_path: Path, name: str) -> None:
    assert Cli({"ADAPTORY_HOME": str(tmp_path / "home"), name: "1"})("list").code == 0


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("", ("ADAPTORY_ENGINE must be a JSON object", "ADAPTORY_ENGINE__KIND")),
        ("__ADDRESS", ("ADAPTORY_ENGINE__ADDRESS", "neither `auto` nor HOST:PORT")),
        ("__KIND", ("ADAPTORY_ENGINE__KIND", "'local' or 'ray'")),
    ],
)
def test_an_engine_that_makes_no_sense_is_named(tmp_path: Path, engine: str, words: tuple[str, ...]) -> None:
    refused(Cli({"ADAPTORY_HOME": str(tmp_path), f"ADAPTORY_ENGINE{engine}": "rai"})("list"), 2, *words)


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ({"KIND": "s4"}, ("ADAPTORY_STORAGE", "is not one of")),
        ({"BUCKET": "b", "ENDPOINT_URL": "s3.example"}, ("ADAPTORY_STORAGE__ENDPOINT_URL", "https://s3.example")),
    ],
)
def test_a_store_that_makes_no_sense_is_named(tmp_path: Path, storage: dict[str, str], words: tuple[str, ...]) -> None:
    stated = {f"ADAPTORY_STORAGE__{name}": value for name, value in storage.items()}
    refused(Cli({"ADAPTORY_HOME": str(tmp_path), **stated})("list"), 2, *words)


def test_a_directory_that_cannot_be_used_is_named_with_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"ADAPTORY_HOME": str(tmp_path / "home")}
    store = {"ADAPTORY_STORAGE__DIRECTORY": str(tmp_path / "file")}
    refused(Cli(home | store)("list"), 7, str(tmp_path / "file"), "Set ADAPTORY_STORAGE__DIRECTORY")
    refused(Cli({"ADAPTORY_HOME": str(tmp_path / "file")})("list"), 7, str(tmp_path / "file"), "Set ADAPTORY_HOME")


def test_a_token_is_taken_without_the_white_space_around_it_and_never_shown(tmp_path: Path) -> None:
    far = {"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_URL": "http://127.0.0.1:9"}
    refused(Cli(far | {"ADAPTORY_TOKEN": "adp_secret\r\n"})("list"), 7, "does not answer")
    for odd in ("adp secret", "adp_secret\nadp_secret", "adp_s\u00e9cret"):
        ran = Cli(far | {"ADAPTORY_TOKEN": odd})("list")
        refused(ran, 2, "ADAPTORY_TOKEN", "a token consists of ASCII characters")
        assert "cret" not in ran.err


@pytest.mark.parametrize(
    "address", ["mysql://x", "sqlite", "postgresql://h:port/x", "postgresql+psycopg2://h/x", "sqlite+aiosqlite:///x"]
)
def test_a_database_that_is_neither_sqlite_nor_postgresql_is_named(tmp_path: Path, address: str) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_DATABASE_URL": address})
    for command in ("list", "migrate", "serve"):
        refused(cli(command), 2, "ADAPTORY_DATABASE_URL", "sqlite", "postgresql://user@host/name")


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_that_would_end_with_the_command_is_refused(tmp_path: Path, address: str) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_DATABASE_URL": address})
    for command in ("list", "migrate", "doctor"):
        refused(cli(command), 2, "ADAPTORY_DATABASE_URL", "names no file")


@pytest.mark.parametrize("rate", ["foo", "0/minute", "-1/minute", "10/minute;5/second", " ", "10"])
def test_what_is_no_rate_is_refused(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("ADAPTORY_RATE_LIMIT", rate)
    with pytest.raises(ValidationError, match="6000/minute"):
        Settings()


@pytest.mark.parametrize("rate", ["", "6000/minute", "10 per 2 hours", "30/minute"])
def test_a_rate_is_so_many_in_a_time_or_no_limit(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("ADAPTORY_RATE_LIMIT", rate)
    assert Settings().rate_limit == rate


def test_proxies_are_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().trusted_proxies == ""
    for good in ("127.0.0.1", "10.0.0.7, 10.1.0.0/16,::1"):
        monkeypatch.setenv("ADAPTORY_TRUSTED_PROXIES", good)
        assert Settings().trusted_proxies == good
    for bad in ("*", "proxy.example", "10.1.0.1/16", "10.0.0.7,"):
        monkeypatch.setenv("ADAPTORY_TRUSTED_PROXIES", bad)
        with pytest.raises(ValidationError, match="addresses or networks"):
            Settings()


@pytest.mark.parametrize("name", ["ADAPTORY_RATE_LIMIT", "ADAPTORY_TRUSTED_PROXIES"])
def test_a_server_whose_settings_make_no_sense_says_which_and_does_not_start(tmp_path: Path, name: str) -> None:
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), name: "foo"})("serve", "--port", 0)
    assert refused.code == 2
    assert name in refused.err
    assert "listening" not in refused.err
    assert not (tmp_path / "home").exists()
