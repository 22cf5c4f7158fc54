"""The registry that a command uses: profiles made by `login`, their precedence, and their display."""

import io
import json
import os
import stat
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from registry.environment.network import registry_url
from tests.scenarios.world import Cli, Ran, server


@pytest.fixture
def company(tmp_path: Path) -> Generator[tuple[str, str]]:
    """A server with tokens: its URL and a token whose scope is narrower than its user's role."""
    beside = Cli({"ADAPTORY_HOME": str(tmp_path / "server"), "ADAPTORY_USER": "root"})
    beside.ok("namespace", "grant", "acme", "mia", "releaser")
    token = beside.ok("token", "create", "--user", "mia", "--scope", "acme=reader").out.strip()
    with server(tmp_path / "server", ADAPTORY_ACCESS="tokens") as (url, _):
        yield url, token


def with_stdin(cli: Cli, text: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> Ran:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli(*words)


def test_login_saves_a_profile_that_every_later_command_uses(
    company: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, token = company
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "local-user"})
    refused = with_stdin(cli, "adp_wrong", "login", url, "--name", "work", monkeypatch=monkeypatch)
    assert refused.code == 5
    assert cli.json("profile", "list")["items"][0]["profile"] == "local", "a wrong token is not saved"
    logged_in = with_stdin(cli, f"{token}\n", "login", f"{url}/", "--name", "work", monkeypatch=monkeypatch)
    assert logged_in.out == f"logged in to {url} as mia (profile work)\n"
    file = tmp_path / "home" / "profiles.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token not in logged_in.out + logged_in.err

    empty = with_stdin(cli, "\n", "login", url, "--name", "guest", monkeypatch=monkeypatch)
    assert empty.out == f"logged in to {url} as anonymous, without a token (profile guest)\n"
    cli.ok("logout", "guest")
    also = with_stdin(cli, token, "login", url, "--profile", "again", monkeypatch=monkeypatch)
    assert "(profile again)" in also.out, "--profile names it too"
    assert cli.json("logout", "--profile", "again")["profile"] == "again"
    cli.ok("profile", "use", "work")

    assert cli.json("whoami")["user"] == "mia", "the profile in use"
    assert cli.json("whoami", "--profile", "local")["user"] == "local-user"
    assert cli.json("--profile=local", "whoami")["user"] == "local-user"
    elsewhere = Cli({**cli.environment, "ADAPTORY_URL": "http://127.0.0.1:1"})
    assert elsewhere("whoami").code == 7, "ADAPTORY_URL goes before the profile in use"
    assert elsewhere.json("whoami", "--profile", "work")["user"] == "mia", "--profile before ADAPTORY_URL"
    assert elsewhere.json("whoami", "--profile", "local")["user"] == "local-user"
    unknown = cli("whoami", "--profile", "wrok")
    assert (unknown.code, "Did you mean work?" in unknown.err) == (3, True)

    assert cli("gc", "--profile", "work").code == 2, "only where the database is"
    cli.ok("profile", "use", "local")
    assert cli.json("whoami")["user"] == "local-user"
    cli.ok("profile", "use", "work")
    cli.ok("logout")
    assert cli.json("whoami")["user"] == "local-user"
    file.chmod(0o644)
    assert "others may read it" in cli("whoami").err


def test_a_change_says_which_registry_it_goes_to_and_a_narrow_scope_which_role_it_hides(
    company: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, token = company
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    with_stdin(cli, token, "login", url, "--name", "work", monkeypatch=monkeypatch)
    shown = cli.ok("whoami").out
    assert "reader (your role releaser is limited by the token's scope)" in shown
    denied = cli("namespace", "set", "acme", "--public")
    assert denied.code == 5
    assert f"registry: {url} (profile work)" in denied.err
    denied = cli("namespace", "members", "acme")
    assert "registry:" not in denied.err, "nothing is changed"
    local = cli.ok("namespace", "set", "own", "--public", "--profile", "local")
    assert f"registry: local, {tmp_path / 'home'}" in local.err
    database = f"sqlite:///{tmp_path / 'rows.db'}"
    other = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": database})
    other.ok("migrate")
    assert f"registry: local, {database}" in other.ok("namespace", "set", "own", "--public", "--profile", "local").err


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example/", "https://a.example"),
        ("http://a.example:8470/v1/", "http://a.example:8470"),
        ("https://a.example/adapters", None),
        ("https://mia:secret@a.example", None),
        ("https://a.example:port", None),
        ("https://a.example:80:81", None),
        ("https://a.example\\@b.example", None),
        ("http://[::1]:8470/", "http://[::1]:8470"),
        ("https://a.example?x=1", None),
        ("a.example", None),
    ],
)
def test_the_url_of_a_registry_is_normalised_or_refused(text: str, address: str | None, tmp_path: Path) -> None:
    if address:
        assert registry_url(text) == address
        return
    refused = Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_URL": text})("list")
    assert (refused.code, "ADAPTORY_URL" in refused.err) == (2, True)
    login = Cli({"ADAPTORY_HOME": str(tmp_path)})("login", text)
    assert (login.code, "secret" in refused.err + login.err) == (2, False)


def test_what_login_cannot_use_is_refused_in_its_own_words_and_never_repeats_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    for token in ("adp_a b", "adp_x\r\nX-Evil: 1", "adp_\udcff", "adp_é"):
        refused = with_stdin(cli, token, "login", "http://127.0.0.1:1", monkeypatch=monkeypatch)
        assert (refused.code, "a token consists of ASCII characters" in refused.err, "adp_" in refused.err) == (
            2,
            True,
            False,
        )
    unnamed = with_stdin(cli, "adp_x", "login", "http://[::1]:1", monkeypatch=monkeypatch)
    assert (unnamed.code, "--name" in unnamed.err) == (2, True)
    assert not (tmp_path / "home").exists()


def test_profiles_are_for_their_owner_alone_whatever_the_umask_and_a_damaged_file_is_named(
    company: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, token), home = company, tmp_path / "home"
    cli = Cli({"ADAPTORY_HOME": str(home)})
    kept = os.umask(0)
    try:
        assert with_stdin(cli, token, "login", url, "--name", "work", monkeypatch=monkeypatch).code == 0
    finally:
        os.umask(kept)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "profiles.json")] == [0o700, 0o600]
    assert [path.name for path in home.iterdir()] == ["profiles.json"]
    (tmp_path / "dotfiles").mkdir()
    linked = (home / "profiles.json").rename(tmp_path / "dotfiles" / "profiles.json")
    (home / "profiles.json").symlink_to(linked)
    assert with_stdin(cli, token, "login", url, "--name", "other", monkeypatch=monkeypatch).code == 0
    cli.ok("logout", "other")
    assert (home / "profiles.json").is_symlink()
    assert list(json.loads(linked.read_text())["profiles"]) == ["work"]
    cli.ok("logout", "work")
    assert token not in linked.read_text()
    empty = Cli({**cli.environment, "ADAPTORY_URL": "http://127.0.0.1:1", "ADAPTORY_PROFILE": ""})
    assert empty("whoami").code == 7, "an empty ADAPTORY_PROFILE names none, and ADAPTORY_URL goes next"
    for row in ({"url": "http://a:b:c", "token": token}, {"url": url, "token": 5}, {"url": url, "token": "a b"}):
        (home / "profiles.json").write_text(json.dumps({"current": "work", "profiles": {"work": row}}))
        damaged = cli("whoami")
        assert (damaged.code, "not a list of profiles" in damaged.err) == (6, True)
