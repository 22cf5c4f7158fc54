"""An agent beside servers, and under a registry, that answer with anything: it goes on, and says what is wrong."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from composer.formats.checkpoints.hashing import hash_file
from registry.agent import mirror, switching
from registry.agent.directory import MirrorDirectory, Routes
from registry.agent.health import Health
from registry.agent.loop import Followed
from registry.agent.mirror import Duties, Mirror, Options
from registry.agent.servers import protocol
from registry.agent.servers.command import CommandServer
from registry.agent.servers.files import DirectoryServer
from registry.agent.servers.vllm import VllmServer
from registry.agent.switching import KeptServer
from registry.agent.versions import ServedVersion
from registry.client.api import Api
from registry.client.follow import PATH
from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import Digest
from registry.wire.fleet import NodeReportIn
from registry.wire.quality import FollowedOut
from tests.eventually import eventually
from tests.scenarios.world import World
from tests.serving.double import double
from tests.serving.scripted import Answer, models, ok, scripted

CHANNEL, VERSION = "acme/sql@prod", ServedVersion("acme/sql", "1.0.0", "ab" * 20)


def row(name: Any, root: Any) -> dict[str, Any]:
    return {"id": name, "root": root, "parent": "base"}


@pytest.fixture
def directory(tmp_path: Path, world: World) -> MirrorDirectory:
    kept = MirrorDirectory(tmp_path / "served")
    kept.path(VERSION.commit).mkdir(parents=True)
    for path in world.adapters["sql"].iterdir():
        (kept.path(VERSION.commit) / path.name).write_bytes(path.read_bytes())
    return kept


def with_its_own_commit(directory: MirrorDirectory) -> str:
    """Gives the release's directory the name that its files have, and returns it."""
    files = [
        ManifestFile(path.name, path.stat().st_size, Digest(hash_file(path)))
        for path in directory.path(VERSION.commit).iterdir()
    ]
    commit = commit_id(canonical_manifest(files))
    directory.path(VERSION.commit).rename(directory.path(commit))
    return commit


@pytest.fixture
def take_round(directory: MirrorDirectory) -> Callable[..., NodeReportIn]:
    """Takes a round with one server and a registry that says this of the channel."""

    def take(url: str, said: FollowedOut | None = None) -> NodeReportIn:
        wanted = {CHANNEL: said or FollowedOut(move=1, version=None, commit=None)}
        kept = KeptServer(VllmServer(url), directory, None, 0.0)
        duties = Duties()
        taken = Mirror(Api("http://127.0.0.1:1"), directory, [kept], Options(), duties)
        try:
            return taken.round(wanted, [CHANNEL])
        finally:
            taken.close()

    return take


def test_a_server_that_lists_many_foreign_names_costs_little(take_round: Callable[..., NodeReportIn]) -> None:
    """200,000 names are about the most that an answer holds. They cost 8 s a round once."""
    names = models(*(row(f"acme/x{n}@1.0.0", f"/elsewhere/{n}") for n in range(200_000)))
    with scripted({"/v1/models": names}) as server:
        before_s = time.process_time()
        report = take_round(server.url)
        assert time.process_time() - before_s < 4
    assert len(report.servers[0].loaded) == mirror.MAX_LOADED


def test_a_server_that_lists_many_paths_of_the_directory_costs_little(
    directory: MirrorDirectory, take_round: Callable[..., NodeReportIn]
) -> None:
    """About the most that an answer holds. They cost 40 microseconds each once."""
    by_version = directory.root / "by-version/acme"
    names = models(*(row(f"x{n}", f"{by_version}/x{n}@1.0.0") for n in range(80_000)))
    with scripted({"/v1/models": names}) as server:
        before_s = time.process_time()
        report = take_round(server.url)
        assert time.process_time() - before_s < 1.8
    assert (report.servers[0].error, len(report.servers[0].loaded)) == (None, mirror.MAX_LOADED)


LISTS = [
    models(row(5, "/a")),
    models(row("x", 7)),
    models(row("", "/a")),
    models(row(["a"], "/a")),
    models(row("acme/sql@1.0.0", "{by_commit}/..")),
    models(row("acme/sql@1.0.0", "{by_commit}/not-a-commit")),
    models(row("acme/sql@1.0.0", "{by_version}/../../etc")),
    models(row("acme/sql@1.0.0\n\x1b[2J", "/a")),
    models(row("x" * 100_000, "/" * 100_000)),
    models(row("acme/sql@1.0.0", "{by_version}/acme/" + "x" * 5_000)),
    models(row("acme/sql@1.0.0\ud800", "{by_version}/acme/\ud800")),
    models(*(row(f"name-{number}", "/a") for number in range(5000))),
    ok(b"[" * 100_000),
    ok(b'{"data": 5}'),
    ok(b"null"),
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=base64\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 999 What\r\n\r\n",
    b"garbage\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("answer", LISTS, ids=range(len(LISTS)))
def test_no_list_of_models_ends_a_round(
    directory: MirrorDirectory, take_round: Callable[..., NodeReportIn], answer: bytes
) -> None:
    body = answer.partition(b"\r\n\r\n")[2]
    if b"{by_" in body:
        body = body.replace(b"{by_commit}", str(directory.root / "by-commit").encode())
        answer = ok(body.replace(b"{by_version}", str(directory.root / "by-version").encode()))
    with scripted({"/v1/models": answer}) as server:
        report = take_round(server.url)
    assert NodeReportIn.model_validate_json(report.model_dump_json()) == report
    assert directory.path(VERSION.commit).is_dir()


METRICS = [
    ("nothing here", None),
    ('vllm:lora_requests_info{running_lora_adapters="a"} abc', None),
    ('vllm:lora_requests_info{running_lora_adapters="a"} 1.2.3', None),
    ('vllm:lora_requests_info{running_lora_adapters="a"} 1.0\r', {"a"}),
    (r'vllm:lora_requests_info{running_lora_adapters="q\"uote,acme/sql@1.0.0"} 1.0', {'q\\"uote', "acme/sql@1.0.0"}),
    (r'vllm:lora_requests_info{running_lora_adapters="x\\",waiting_lora_adapters="b"} 2', {"x\\\\", "b"}),
    ('vllm:lora_requests_info{running_lora_adapters=",,"} 1', set[str]()),
]


@pytest.mark.parametrize(("text", "names"), METRICS)
def test_names_in_metrics_are_read_whatever_their_letters(text: str, names: set[str] | None) -> None:
    with scripted({"/metrics": ok(f"{text}\n".encode(), "text/plain")}) as server:
        assert VllmServer(server.url).busy() == names


def endless(connection: socket.socket, _body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * (1 << 20))


def trickling(connection: socket.socket, _body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [endless, trickling])
def test_an_answer_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    monkeypatch.setattr(protocol, "LOOK_S", 1.0)
    with scripted({"/v1/models": answer}) as server, pytest.raises(Unavailable, match="does not end its answer"):
        VllmServer(server.url).loaded()


def trickling_header(connection: socket.socket, _body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/load_lora_adapter"])
def test_a_server_that_never_ends_its_work_holds_up_no_other_server(
    directory: MirrorDirectory, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(mirror, "WAIT_S", 2.0)
    commit = with_its_own_commit(directory)
    wanted = {CHANNEL: FollowedOut(move=1, version=VERSION.version, commit=commit)}
    with double() as (url, _), scripted({"/v1/models": models()} | {path: trickling_header}) as slow:
        servers = [KeptServer(VllmServer(address), directory, None, 0.0) for address in (slow.url, url)]
        duties = Duties()
        taken = Mirror(Api("http://127.0.0.1:1"), directory, servers, Options(), duties)
        for _ in range(2):
            report = taken.round(wanted, [CHANNEL])
            assert report.channels[0].state == "following"
            assert [server.ready for server in report.servers] == [False, True]
            assert directory.routes().servers == {VERSION.name: (url,)}
        taken.close()
    assert len(slow.requests) <= 2  # the late server is left alone


LIES = [
    FollowedOut(move=1, version="1.0.0", commit="../../../../etc"),
    FollowedOut(move=1, version="1.0.0", commit="/etc"),
    FollowedOut(move=1, version="1.0.0", commit=""),
    FollowedOut(move=1, version="../../x", commit=VERSION.commit),
    FollowedOut(move=1, version="1.0.0\n", commit=VERSION.commit),
    FollowedOut(move=1, version="9" * 10_000, commit=VERSION.commit),
    FollowedOut(move=0, version="1.0.0", commit=VERSION.commit),
    FollowedOut(move=-1, version="1.0.0", commit=VERSION.commit.upper()),
]


@pytest.mark.parametrize("said", LIES, ids=range(len(LIES)))
def test_a_registry_that_lies_about_versions_reaches_no_path_and_no_route(
    directory: MirrorDirectory, take_round: Callable[..., NodeReportIn], said: FollowedOut
) -> None:
    directory.write_routes(
        Routes(
            {CHANNEL: {"acme/sql@0.9.0": 100}}, {CHANNEL: "2026-12-01T00:00:00+00:00"}, {"acme/sql@0.9.0": "cd" * 20}
        )
    )
    with scripted({"/v1/models": models()}) as server:
        report = take_round(server.url, said)
        assert [head.split()[0] for head, _ in server.requests] == [b"GET"]
    assert report.channels[0].state == "failed"
    assert "cannot be trusted" in str(report.channels[0].error)
    assert directory.routes().channels == {CHANNEL: {"acme/sql@0.9.0": 100}}


@pytest.mark.long
def test_a_name_never_changes_what_it_stands_for_even_if_the_registry_says_so(directory: MirrorDirectory) -> None:
    with double() as (url, _):
        kept = KeptServer(VllmServer(url), directory, None, 0.0)
        kept.look()
        assert kept.bring(VERSION, directory.path(VERSION.commit)) == ""
        other = ServedVersion("acme/sql", "1.0.0", "cd" * 20)
        for _ in range(5):
            kept.look()
            assert "by hand" in kept.bring(other, directory.path(other.commit))
            time.sleep(1.1)
        assert VllmServer(url).loaded() == {VERSION.name: str(directory.path(VERSION.commit))}


@pytest.mark.long
def test_two_agents_of_one_server_do_not_replace_each_others_names_again_and_again(
    directory: MirrorDirectory, tmp_path: Path
) -> None:
    second = MirrorDirectory(tmp_path / "second")
    second.path(VERSION.commit).parent.mkdir(parents=True)
    second.path(VERSION.commit).symlink_to(directory.path(VERSION.commit))
    with double() as (url, _):
        agents = [KeptServer(VllmServer(url), kept, None, 0.0) for kept in (directory, second)]
        paths = [directory.path(VERSION.commit), second.path(VERSION.commit)]
        seen = list[str]()
        for _ in range(10):
            for agent, path in zip(agents, paths, strict=True):
                agent.look()
                agent.bring(VERSION, path)
                seen.append(VllmServer(url).loaded().get(VERSION.name, ""))
            time.sleep(1.05)
        assert sum(before != after for before, after in pairwise(seen)) <= 1


@pytest.mark.parametrize("printed", [b"\xff\xfe", b"[" * 50_000, b"5"])
def test_no_output_of_a_command_ends_a_round(tmp_path: Path, printed: bytes) -> None:
    output = tmp_path / "output"
    output.write_bytes(printed)
    script = tmp_path / "server.py"
    script.write_text(f"import sys; sys.stdout.buffer.write(open({str(output)!r}, 'rb').read())")
    with pytest.raises(Unavailable):
        CommandServer(f"{sys.executable} {script}").loaded()


def test_a_command_that_prints_without_end_is_given_up(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))")
    with pytest.raises(Unavailable, match="does not end"):
        CommandServer(f"{sys.executable} {script}").loaded()


def test_a_command_may_leave_a_server_running(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text("import subprocess\nsubprocess.Popen(['sleep', '3'])\nprint('{}')")
    began_s = time.monotonic()
    assert CommandServer(f"{sys.executable} {script}").loaded() == {}
    assert time.monotonic() - began_s < 2


@pytest.mark.parametrize("damage", ["by-commit removed", "a link left over", "a directory for a note"])
def test_no_damage_to_a_directory_ends_an_agent(tmp_path: Path, damage: str) -> None:
    directory = MirrorDirectory(tmp_path / "served")
    with directory.locked():
        pass
    if damage == "a link left over":
        (directory.root / ".part-1").symlink_to(tmp_path)
    if damage == "a directory for a note":
        (directory.root / "by-version" / "acme" / "sql@1.0.0").mkdir(parents=True)
        (directory.root / "by-version" / ".notes" / "acme" / "sql@1.0.0.json").mkdir(parents=True)
    with directory.locked():
        if damage == "by-commit removed":
            (directory.root / "by-commit").rmdir()
        kept = KeptServer(DirectoryServer(directory, None), directory, None, 0.0)
        duties = Duties()
        taken = Mirror(Api("http://127.0.0.1:1"), directory, [kept], Options(), duties)
        assert taken.round({}, [CHANNEL]).channels[0].error
        taken.close()


ROUTES = {
    "channels": {CHANNEL: {VERSION.name: 100}},
    "since": {CHANNEL: "2026-01-01T00:00:00+00:00"},
    "versions": {VERSION.name: {"commit": VERSION.commit, "servers": []}},
}


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("100", "1e999"),
        ("2026-01-01T00:00:00+00:00", "soon"),
        (VERSION.commit, "../.."),
        (VERSION.commit, "a\\u0000"),
        (VERSION.name, "acme/sql@1.0.0\\ud800"),
        (VERSION.name, "somewhere"),
    ],
)
def test_routes_with_values_of_no_route_are_damaged(directory: MirrorDirectory, was: str, now: str) -> None:
    path = directory.root / "routes.json"
    path.write_text(json.dumps(ROUTES))
    assert directory.read_routes() is not None
    path.write_text(json.dumps(ROUTES).replace(was, now))
    assert directory.read_routes() is None


@pytest.mark.parametrize("damage", [b'{"channels": {', None], ids=["damaged", "removed"])
def test_without_routes_that_can_be_read_nothing_is_unloaded_while_the_registry_is_away(
    directory: MirrorDirectory, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr(switching, "LOOK_S", 0.0)
    path, duties = directory.root / "routes.json", Duties()
    if damage:
        path.write_bytes(damage)
    loaded = models(row(VERSION.name, str(directory.path(VERSION.commit))))
    with scripted({"/v1/models": loaded, "/metrics": ok(b"", "text/plain")}) as server:
        kept = KeptServer(VllmServer(server.url), directory, lambda: frozenset(), 0.0)
        taken = Mirror(Api("http://127.0.0.1:1"), directory, [kept], Options(keep=0, grace_s=0.0), duties)
        reports = [taken.round({}, [CHANNEL]) for _ in range(switching.QUIET_LOOKS + 1)]
        taken.close()
        assert {head.split()[0] for head, _ in server.requests} == {b"GET"}  # a front may still have the routes
    assert all(report.channels[0].error for report in reports)
    assert directory.path(VERSION.commit).is_dir()
    assert (path.read_bytes() if path.exists() else None) == damage


@pytest.mark.parametrize("damage", [b'{"channels": {', None], ids=["damaged", "removed"])
def test_without_routes_that_can_be_read_a_new_agent_keeps_the_route_of_a_channel_that_fails_beside_another(
    directory: MirrorDirectory, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr(switching, "LOOK_S", 0.0)
    commit, other = with_its_own_commit(directory), "acme/tables@prod"
    says = FollowedOut(move=1, version=VERSION.version, commit=commit)
    path, duties = directory.root / "routes.json", Duties()
    with double(max_loras=2) as (url, _):

        def rounds(wanted: dict[str, FollowedOut | None], count: int) -> NodeReportIn:
            """Those of an agent that starts now."""
            kept = KeptServer(VllmServer(url), directory, lambda: frozenset(), 0.0)
            taken = Mirror(Api("http://127.0.0.1:1"), directory, [kept], Options(keep=0, grace_s=0.0), duties)
            reports = [taken.round(wanted, [CHANNEL, other]) for _ in range(count)]
            taken.close()
            return reports[-1]

        rounds({CHANNEL: says, other: says}, 1)
        before, names = directory.routes(), VllmServer(url).loaded()
        assert before.channels.keys() == {CHANNEL, other}
        path.write_bytes(damage) if damage else path.unlink()
        report = rounds({CHANNEL: None, other: says}, switching.QUIET_LOOKS + 1)
        assert [row.state for row in report.channels] == ["failed", "following"]
        after = directory.routes()
        assert (after.channels, after.commits, after.servers) == (before.channels, before.commits, before.servers)
        assert VllmServer(url).loaded() == names


@pytest.mark.parametrize("damage", [b"[", b'{"channels": 5}', b'{"channels": [{"channel": "x", "version": "../x"}]}'])
def test_a_damaged_state_is_no_routes(directory: MirrorDirectory, damage: bytes) -> None:
    (directory.root / "state.json").write_bytes(damage)
    assert directory.reported_routes() == Routes()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
STREAMS = [
    STREAM + b"\r\nid: \xff\ndata: \xff\xfe\n\n",
    STREAM + b"Content-Encoding: gzip\r\n\r\nabc",
    STREAM + b"\r\nid: 1\ndata: {\n\n",
    STREAM + b"\r\nid: 1\ndata: " + b"[" * 100_000 + b"\n\n",
    STREAM + b'\r\nid: 1\ndata: {"channels": {"acme/sql@prod": {"move": NaN, "version": 1, "commit": []}}}\n\n',
    pytest.param(STREAM + b"\r\ndata: " + b"x" * (17 << 20), marks=pytest.mark.long),
    ok(b"<html>Sign in</html>", "text/html"),
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("answer", STREAMS, ids=range(len(STREAMS)))
def test_an_agent_says_so_when_what_it_follows_cannot_be_read(answer: bytes) -> None:
    said = list[str]()
    with scripted({f"{PATH}?channels={quote(CHANNEL, safe='')}": answer}) as server:
        followed = Followed(Api(server.url), [CHANNEL], Health(), said.append)
        threading.Thread(target=followed.run, daemon=True).start()
        eventually(lambda: said, within_s=10)
    assert "Servers keep their current releases." in said[0]
