"""A single-user server on a shared machine: its home is closed to other users, and loopback requires a secret."""

import io
import os
import stat
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from registry.environment import home
from registry.sdk.connection import load_settings, open_registry
from tests import services
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.terminal import on_terminal
from tests.scenarios.world import Cli, environment, server

HTML = {"Accept": "text/html"}


@pytest.fixture
def closed(tmp_path: Path) -> Generator[tuple[str, Path]]:
    """The URL of a server that requires its secret, and its home."""
    directory = tmp_path / "home"
    with server(directory, ADAPTORY_LOOPBACK_OPEN="false") as (url, _):
        yield url, directory


def port_of(url: str) -> int:
    return httpx2.URL(url).port or 0


def secret_of(url: str, directory: Path) -> str:
    return home.secret_path(directory, "127.0.0.1", port_of(url)).read_text()


def modes(directory: Path) -> dict[str, str]:
    """Others' permissions on the contents of a home, except within its closed directories."""
    paths = [directory, *directory.iterdir()]
    return {path.name: oct(path.stat().st_mode & 0o077) for path in paths if path.stat().st_mode & 0o077}


@contextmanager
def umask(value: int) -> Generator[None]:
    kept = os.umask(value)
    yield
    os.umask(kept)


def test_others_of_the_machine_read_and_change_nothing_over_loopback(closed: tuple[str, Path]) -> None:
    url, _ = closed
    for method, path in (
        ("GET", "/v1/adapters"),
        ("GET", "/api/models"),
        ("POST", "/v1/tokens"),
        ("GET", "/"),
        ("GET", "/acme/sql/resolve/main/adapter_config.json"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("PUT", "/v1/blobs/a?upload=b"),
        ("GET", "/loginx"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"adaptory-{port_of(url)}=wrong"}):
            answer = httpx2.request(method, url + path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "secret_missing"), (method, path)
            assert f"server-{port_of(url)}.secret" in answer.headers["X-Error-Message"]
    for path in ("/healthz", "/readyz"):
        assert httpx2.get(url + path).status_code == 200
    page = httpx2.get(url, headers=HTML)
    assert (page.status_code, "/login" in page.text) == (401, True)


def test_our_commands_and_the_python_api_send_the_secret_by_themselves(
    closed: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, directory = closed
    own = Cli({"ADAPTORY_HOME": str(directory), "ADAPTORY_URL": url, "ADAPTORY_USER": "ann"})
    assert own.json("whoami")["user"]
    with environment(own.environment, ["x"]), open_registry(load_settings()) as connection:
        assert connection.api.get("/v1/adapters")["items"] == []
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "other"), "ADAPTORY_URL": url})("whoami")
    assert refused.code != 0
    assert "adaptory serve" in refused.err
    given = {"ADAPTORY_HOME": str(tmp_path / "other"), "ADAPTORY_URL": url, "ADAPTORY_TOKEN": secret_of(url, directory)}
    assert Cli(given).ok("whoami")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    own.ok("login", url, "--name", "here")
    assert Cli({"ADAPTORY_HOME": str(directory), "ADAPTORY_PROFILE": "here"}).ok("whoami")


def test_a_hub_client_takes_the_secret_as_its_token(closed: tuple[str, Path]) -> None:
    url, directory = closed
    code = "import huggingface_hub as h; print(len(list(h.HfApi().list_models())), h.whoami()['name'])"
    values = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "0"}
    for token, success in ((secret_of(url, directory), True), ("wrong", False)):
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env={**values, "HF_TOKEN": token}, capture_output=True, text=True, check=False)
        assert (ran.returncode == 0) == success, ran.stderr
        assert success or "server-" in ran.stderr


def test_the_link_that_serve_prints_signs_one_browser_in(closed: tuple[str, Path]) -> None:
    url, directory = closed
    said = directory.with_name("home.log").read_text()
    path = home.link_path(directory, "127.0.0.1", port_of(url))
    assert f"{url}/login?code=$(cat {path})" in said
    code = path.read_text()
    for secret in (code, secret_of(url, directory)):
        assert secret not in said, "others may read a log"
    link = f"{url}/login?code={code}"
    assert httpx2.get(f"{url}/login?code=wrong", headers=HTML).status_code == 401
    with httpx2.Client(base_url=url, headers=HTML) as browser:
        answer = browser.get(link)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert secret_of(url, directory) not in answer.headers["set-cookie"]
        assert browser.get("/").status_code == 200
        assert browser.get("/v1/adapters").status_code == 200, "pages link to it"
        change = browser.post("/v1/namespaces/acme", json={})
        assert (change.status_code, change.json()["code"]) == (401, "secret_missing"), "a page elsewhere could send it"
        batch = browser.post("/acme/sql.git/info/lfs/objects/batch", json={"operation": "upload", "objects": []})
        assert (batch.status_code, "secret_missing" in batch.text) == (401, True)
        begun = browser.get("/api/models/acme/sql/xet-write-token/main")
        assert (begun.status_code, "secret_missing" in begun.text) == (401, True), "a GET that begins an upload"
    again = httpx2.get(link, headers=HTML)
    assert (again.status_code, "set-cookie" in again.headers) == (401, False)
    assert "has been used" in again.text


def test_the_secret_itself_signs_a_browser_in_too(closed: tuple[str, Path]) -> None:
    url, directory = closed
    origin = {"Origin": url, "Sec-Fetch-Site": "same-origin"}
    with httpx2.Client(base_url=url, headers=HTML) as browser:
        form_token = browser.get("/login").text.split('name="form_token" value="')[1].split('"')[0]
        for secret, status in (("wrong", 401), (secret_of(url, directory), 303)):
            fields = {"form_token": form_token, "token": secret, "next": "/bases"}
            answer = browser.post("/login", data=fields, headers=origin)
            assert answer.status_code == status
        assert answer.headers["location"] == "/bases"
        assert browser.get("/bases").status_code == 200


def test_a_secret_ends_with_its_server_and_each_port_has_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "home"
    with server(directory, ADAPTORY_LOOPBACK_OPEN="false") as (url, _):
        with server(directory, ADAPTORY_LOOPBACK_OPEN="false") as (other, _):
            secrets = [secret_of(address, directory) for address in (url, other)]
            assert len(set(secrets)) == 2
            headers = {"Authorization": f"Bearer {secrets[0]}"}
            assert httpx2.get(f"{other}/v1/adapters", headers=headers).status_code == 401
        assert httpx2.get(f"{url}/v1/adapters", headers=headers).status_code == 200
    eventually(lambda: not list(directory.glob("server-*")))


def test_a_secret_of_ones_own_and_an_open_server_are_settings(tmp_path: Path) -> None:
    given = {"ADAPTORY_LOOPBACK_OPEN": "false", "ADAPTORY_LOOPBACK_SECRET": "mine"}
    with server(tmp_path / "home", **given) as (url, _):
        assert httpx2.get(f"{url}/v1/adapters", headers={"Authorization": "Bearer mine"}).status_code == 200
        assert httpx2.get(f"{url}/v1/adapters").status_code == 401
    with server(tmp_path / "home", ADAPTORY_LOOPBACK_OPEN="true") as (url, _):
        assert httpx2.get(f"{url}/v1/adapters").status_code == 200
        assert list((tmp_path / "home").glob("server-*")) == []


def test_a_home_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "home"
    with umask(0):
        Cli({"ADAPTORY_HOME": str(directory)}).ok("list")
        assert (modes(directory), (directory / "cache").is_dir()) == ({}, True), "others would make it wider"
        with server(directory, ADAPTORY_LOOPBACK_OPEN="false"):
            assert modes(directory) == {}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    elsewhere = tmp_path / "blobs"
    with umask(0):
        Cli({"ADAPTORY_HOME": str(directory), "ADAPTORY_STORAGE__DIRECTORY": str(elsewhere)}).ok("list")
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700


def test_a_home_that_others_could_look_into_is_closed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cli, directory = Cli({"ADAPTORY_HOME": str(tmp_path / "home")}), tmp_path / "home"
    cli.ok("list")
    directory.chmod(0o755)
    (directory / "registry.db").chmod(0o644)
    cli.ok("list")
    assert "Other users of this machine could read" in caplog.text
    assert modes(directory) == {}
    caplog.clear()
    cli.ok("list")
    assert caplog.text == ""


def test_a_terminal_shows_the_link_itself(tmp_path: Path) -> None:
    shown = on_terminal(
        Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_LOOPBACK_OPEN": "false"}), "serve", "--port", "0"
    )
    shown.read_until("hub clients")
    (link,) = tmp_path.glob("server-*.link")
    assert f"/login?code={link.read_text()}" in shown.text.replace("\r\n", "").replace(" ", "")
    shown.process.terminate()
    shown.end()


def test_a_secret_is_sent_to_its_own_server_alone(tmp_path: Path) -> None:
    """Not to another machine, nor to another port or address of this one, where others may listen."""
    url = "http://127.0.0.1:8470"
    with home.serving(tmp_path, "127.0.0.1", 8470, "mine"), home.serving(tmp_path, "::1", 8472, "other"):
        assert home.with_secret(tmp_path, url) == (url, "mine")
        assert home.with_secret(tmp_path, "http://localhost:8470") == (url, "mine"), "which may be ::1 too"
        assert home.with_secret(tmp_path, "http://[::1]:8472") == ("http://[::1]:8472", "other")
        for elsewhere in (
            "http://127.0.0.1:8471", "http://127.0.0.2:8470", "http://[::1]:8470", "http://127.0.0.1:8472",
            "http://localhost:8472", "http://adapters.example:8470", "https://localhost:8470",
        ):  # fmt: skip
            assert home.with_secret(tmp_path, elsewhere) == (elsewhere, None)
        home.secret_path(tmp_path, "127.0.0.1", 8470).chmod(0o644)
        assert home.with_secret(tmp_path, url) == (url, None), "others may read it"


def test_the_secret_of_a_killed_server_is_not_sent_and_removed_by_the_next(tmp_path: Path) -> None:
    directory, settings = tmp_path / "home", {"ADAPTORY_LOOPBACK_OPEN": "false", "ADAPTORY_LOOPBACK_SECRET": "mine"}
    with server(directory, **settings) as (url, process):
        assert home.with_secret(directory, url)[1] == "mine"
        process.kill()
        process.join(20)
        path = home.secret_path(directory, "127.0.0.1", port_of(url))
        assert path.read_text() == "mine"
        assert home.with_secret(directory, url) == (url, None)
    with server(directory, **settings) as (url, _):
        assert not path.exists() or port_of(url) == int(path.stem.split("-")[1])
        assert home.with_secret(directory, url)[1] == "mine"


def test_a_program_that_runs_on_sends_the_secret_of_the_restarted_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, closed = tmp_path / "home", {"ADAPTORY_LOOPBACK_OPEN": "false"}
    with server(directory, **closed) as (url, process):
        monkeypatch.setenv("ADAPTORY_HOME", str(directory))
        monkeypatch.setenv("ADAPTORY_URL", url)
        with open_registry(load_settings()) as connection:
            before = secret_of(url, directory)
            assert connection.api.get("/v1/whoami")["user"]
            process.terminate()
            process.join(20)
            monkeypatch.setattr(services, "free_port", lambda: port_of(url))
            with server(directory, **closed):
                assert secret_of(url, directory) != before
                assert connection.api.get("/v1/whoami")["user"]


def test_a_directory_that_all_users_share_is_refused_as_a_home(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    for directory in (str(shared), "/"):
        refused = Cli({"ADAPTORY_HOME": directory})("list")
        assert (refused.code, "all users of this machine use it" in refused.err) == (7, True), refused.err
    assert (stat.S_IMODE(shared.stat().st_mode), list(shared.iterdir())) == (0o1777, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a directory of another user")
def test_no_server_with_a_secret_runs_from_the_home_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, -1)
    refused = Cli({"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_LOOPBACK_OPEN": "false"})("serve", "--port", "0")
    assert (refused.code, "it belongs to another user" in refused.err) == (7, True), refused.err


def test_the_metrics_of_a_worker_ask_for_a_secret_too(tmp_path: Path) -> None:
    port = services.free_port()
    values = {**os.environ, "ADAPTORY_HOME": str(tmp_path), "ADAPTORY_LOOPBACK_OPEN": "false"}
    worker = start_command(["worker", "--metrics", str(port)], values, tmp_path / "log")
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: "metrics on" in (tmp_path / "log").read_text())
        eventually(lambda: httpx2.get(f"{url}/healthz").status_code == 200)
        assert httpx2.get(f"{url}/metrics").json()["code"] == "secret_missing"
        headers = {"Authorization": f"Bearer {secret_of(url, tmp_path)}"}
        assert "adaptory_worker" in httpx2.get(f"{url}/metrics", headers=headers).text
    finally:
        worker.terminate()
        worker.join(20)
    assert list(tmp_path.glob("server-*")) == []
