"""The Hugging Face Hub's own clients, unmodified, with HF_ENDPOINT set to a server with tokens."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from _pytest.mark import ParameterSet

from registry.domain.catalog.commits import EMPTY
from tests import services
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.hub_client import CONFIG, WEIGHTS
from tests.scenarios.test_signatures import Keys
from tests.scenarios.traces import hashes
from tests.scenarios.world import SMALL_PARTS, Cli, World, server

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.long
VERSIONS = ("0.24.7", "0.36.2", "1.0.0", "1.20.0", "2.4.0")
WITH_XET = ("1.20.0", "2.4.0")
"""They send large files by Xet, unless it is disabled."""
XORBS = ("POST", "/xet/{upload}/v1/xorbs/default/{xorb}")
STORES = {"directory": services.PAIRINGS[0], "S3": services.PAIRINGS[1]}


def ways(*default: tuple[str, str]) -> list[ParameterSet]:
    """Each store with each client; those that are not named are `long`."""
    listed = [(store, version) for store in STORES for version in VERSIONS]
    return [pytest.param(*way, marks=[] if way in default else [LONG]) for way in listed]


OLDEST = ways(("directory", "0.24.7"))
"""By default the newest version is the one that sends by Xet."""


@dataclass(frozen=True)
class Hub:
    """A server with `acme/sql`, whose 1.0.0 is in prod and 1.1.0 is newer, and the model `acme/merged`."""

    url: str
    token: str
    publisher: str
    cli: Cli
    log: Path
    pushed: dict[str, Any]
    direct: bool
    process_id: int

    def run(
        self, python: Path, script: str, directory: Path, *more: Path, token: str = "", environ: Mapping[str, str] = {}
    ) -> Any:
        """The output of the script. Its logs are in `log` of the directory."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTORY_"))}
        environment |= {
            "HF_ENDPOINT": self.url, "HF_TOKEN": token or self.token, "HF_HOME": str(directory / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        environment |= environ
        program = [python, Path(__file__).with_name(script), directory, *more]
        ran = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
        (directory / "log").write_text(ran.stderr)
        return json.loads(ran.stdout)

    def requests(self) -> Counter[tuple[str, str]]:
        """The number of successful requests by method and route, since the server began."""
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return Counter((row["method"], row["route"]) for row in rows if row["status"] < 400)


@pytest.fixture(scope="module", params=STORES)
def hub(
    request: pytest.FixtureRequest, templates: Templates, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Hub]:
    home = tmp_path_factory.mktemp("hub") / "server"
    environment = templates.copy(STORES[request.param], home)
    environment |= SMALL_PARTS if request.param == "S3" else {}
    environment |= {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_USER": USER, "ADAPTORY_ACCESS_LOG": "json"}
    cli = Cli({"ADAPTORY_HOME": str(home), **environment})
    pushed = {
        "1.0.0": cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod"),
        "1.1.0": cli.json("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny"),
        "merged": cli.json("push", world.base, "acme/merged:1.0.0", "--base", "tiny", "--kind", "model"),
    }
    cli.ok("namespace", "grant", "acme", "rita", "reader")
    cli.ok("base", "add", world.base, "--name", "tiny", "--alias", "acme/merged")
    cli.ok("namespace", "grant", "acme", "pia", "publisher")
    token, publisher = (cli.ok("token", "create", "--user", user).out.strip() for user in ("rita", "pia"))
    with server(home, **environment) as (url, process):
        yield Hub(
            url,
            token,
            publisher,
            cli,
            home.with_name("server.log"),
            {name: release["release"] for name, release in pushed.items()},
            direct=request.param == "S3",
            process_id=process.pid or 0,
        )


def client(version: str) -> Path:
    """The Python of the environment with that version of `huggingface_hub`, which the Makefile makes."""
    environment = ROOT / f".venv-hub-{version}"
    if not (environment / ".ready").exists():
        services.unavailable(f"huggingface_hub {version}", f"make {environment.name}/.ready")
    return environment / "bin" / "python"


@pytest.mark.parametrize(("hub", "version"), OLDEST, indirect=["hub"])
def test_a_client_reads_what_adaptory_has_published(hub: Hub, world: World, version: str, tmp_path: Path) -> None:
    before = hub.requests()
    seen = hub.run(client(version), "hub_client.py", tmp_path)
    assert seen["version"] == version
    digests = {name: {row["path"]: row["sha256"] for row in release["files"]} for name, release in hub.pushed.items()}
    commits = {name: release["commit"] for name, release in hub.pushed.items()}
    old, new = digests["1.0.0"], digests["1.1.0"]

    described = seen["described"]
    described["models"] = [name for name in described["models"] if "trained" not in name]  # by the test below
    sizes = {row["path"]: row["size_bytes"] for row in hub.pushed["1.0.0"]["files"]}
    assert described == {
        "whoami": ["rita", ["acme"]],
        "info": {path: [sizes[path], sha256] for path, sha256 in old.items()},
        "id": ["acme/sql", True, "peft", "Acme/Tiny-Llama"],
        "tree": sizes,
        "brought": dict.fromkeys(sizes, "1.0.0"),
        "paths": [WEIGHTS],
        "branches": {"main": commits["1.1.0"], "prod": commits["1.0.0"]},
        "tags": {"1.1.0": commits["1.1.0"], "1.0.0": commits["1.0.0"]},
        "commits": [[version, commits[version]] for version in ("1.1.0", "1.0.0")],
        "models": ["acme/merged", "acme/sql"],
        "searched": ["acme/sql"],
        "limited": 1,
        "exists": [True, False, False],
        "revision_exists": [True, True, False],
        "file_exists": [True, False],
    }

    downloaded = seen["downloaded"]
    first = dict.fromkeys(("prod", "1.0.0", "commit", "short"), old[WEIGHTS])
    assert downloaded["files"] == first | dict.fromkeys(("v1.1.0", "main"), new[WEIGHTS])
    assert downloaded["snapshot"] == downloaded["alias"] == old
    assert downloaded["directory"] == new
    assert (downloaded["alias_file"], seen["command"]) == (new[CONFIG], old[CONFIG])
    assert downloaded["listed"] == sorted(old)
    assert downloaded["part"] == (world.adapters["sql"] / WEIGHTS).read_bytes()[8:24].hex()
    fetched = (hub.requests() - before)["GET", "/{namespace}/{name}/resolve/{revision}/{path}"]
    once = len(old) + 1  # the snapshot of 1.0.0, the weights of 1.1.0
    of_aliases, of_directory, ranges = len(old) + 1, len(new) - 1, 1  # the weights are in the cache
    assert fetched == once + of_aliases + of_directory + ranges, "nothing is fetched that the client has"

    _refusals_are_readable(seen["errors"])


def _refusals_are_readable(errors: Mapping[str, tuple[str, str]]) -> None:
    classes = {name: family for name, (family, _) in errors.items()}
    texts = {name: text for name, (_, text) in errors.items()}
    assert classes == {
        "repository": "RepositoryNotFoundError",
        "anonymous": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "commit": "RevisionNotFoundError",
        "file": "EntryNotFoundError",
        "directory": "EntryNotFoundError",
        "wrong": "HfHubHTTPError",
        "create": "HfHubHTTPError",
    }
    for name, words in {
        "repository": "acme/ghost does not exist", "revision": "It has prod, 1.1.0", "file": "no file 'absent.txt'",
        "anonymous": "your token (HF_TOKEN) or sign-in", "wrong": "Invalid credentials", "create": "the role publisher",
    }.items():  # fmt: skip
        assert words in texts[name], texts[name]


@LONG
@pytest.mark.parametrize("hub", ["directory", "S3"], indirect=True)
def test_peft_and_transformers_load_releases_by_their_names(hub: Hub, world: World, tmp_path: Path) -> None:
    seen = hub.run(Path(sys.executable), "hub_peft.py", tmp_path, world.base, token=hub.publisher)
    assert seen["merged"] == seen["base"]
    assert seen["prod"] == seen["alias"] != seen["main"]
    assert hashes(world.adapters["sql"])[WEIGHTS] == seen["weights"]
    shown = hub.cli.json("show", "acme/trained-by-peft:0.1.0")
    assert (shown["commit"], shown["base"]["name"]) == (seen["pushed"], "tiny")
    _is_released_as_trained(hub, "acme/trained-by-trainer", seen["trained"])
    logged = (tmp_path / "log").read_text()
    assert "Not published: training_args.bin" in logged
    assert "The adapter adds nothing" in logged, "its B is zero, which the commit does not refuse"


def _is_released_as_trained(hub: Hub, repository: str, seen: list[Any]) -> None:
    name, files, released = seen
    assert name == repository, "names are lowered"
    assert {CONFIG, WEIGHTS, "README.md"} <= set(files)
    assert "training_args.bin" not in files, "a pickle"
    assert hub.cli.json("show", f"{name}:1.0.0")["commit"] == released


@LONG
@pytest.mark.parametrize("hub", ["S3"], indirect=True)
def test_a_trainer_of_trl_pushes_what_it_has_trained(hub: Hub, tmp_path: Path) -> None:
    if find_spec("trl") is None:
        services.unavailable("trl", "pip install trl")
    seen = hub.run(Path(sys.executable), "hub_trl.py", tmp_path, token=hub.publisher)
    _is_released_as_trained(hub, "acme/trained-by-trl", seen)
    assert "training_args.bin" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("hub", "version"), OLDEST, indirect=["hub"])
def test_a_trainer_pushes_commits_and_tags_a_release(hub: Hub, world: World, version: str, tmp_path: Path) -> None:
    trained = shutil.copytree(world.adapters["sql"], tmp_path / "trained")
    config = json.loads((trained / CONFIG).read_text()) | {"base_model_name_or_path": "Acme/Tiny-Llama"}
    (trained / CONFIG).write_text(json.dumps(config))
    (trained / "tokenizer.json").write_text(json.dumps({"text": version + "x" * (12 << 20)}))
    repository = f"acme/trained-{version.replace('.', '-')}"
    before = hub.requests()
    seen = hub.run(client(version), "hub_push.py", tmp_path, trained, Path(repository), token=hub.publisher)
    sent = hub.requests() - before
    by_lfs = version not in WITH_XET
    assert (sent[XORBS] > 0) is not by_lfs
    through_the_api, to_the_store = (sent[method, "/api/lfs/{namespace}/{sha256}"] > 0 for method in ("PUT", "POST"))
    assert (through_the_api, to_the_store) == (by_lfs and not hub.direct, by_lfs and hub.direct)

    commits = sent["POST", "/api/models/{namespace}/{name}/commit/{revision}"]
    assert commits == 4 + bool(seen["large"]), "the client does not send again what has not changed"
    assert seen["names"] == [repository, repository]
    first, repeated, second, third = seen["commits"]
    assert first == repeated == third != second
    assert seen["empty"] == [EMPTY, []]
    assert seen["command"] == hashes(trained)
    assert seen["large"] in ({}, hashes(trained))
    assert seen["log"] == ["No notes", "Notes", "Trained"]
    assert seen["tags"] == {"1.1.0-rc.1": second, "1.0.0": first}
    assert seen["branches"] == {"main": first}, "a tag does not move it"
    assert seen["released"] == hashes(trained)
    assert seen["unreleased"] == hashes(trained) | {"notes.txt": hashlib.sha256(b"some notes").hexdigest()}
    texts = {name: text for name, (_, text) in seen["errors"].items()}
    for name, words in {
        "stale": "not at", "pickle": "a.pkl", "hidden": ".envrc", "tag": "exists already",
        "version": "not a semantic version", "channel": "Commits go to main", "absent": "doesn't exist",
    }.items():  # fmt: skip
        assert words in texts[name], texts[name]
    shown = hub.cli.json("show", f"{repository}:1.0.0")
    assert (shown["commit"], shown["created_by"], shown["notes"]) == (first, "pia", "The first")
    assert shown["base"]["name"] == "tiny"
    pushed = hub.cli.json("push", world.adapters["other-sql"], f"{repository}:2.0.0", "--base", "tiny")["release"]
    bearer = {"Authorization": f"Bearer {hub.token}"}
    info = httpx2.get(f"{hub.url}/api/models/{repository}", headers=bearer).json()
    assert info["sha"] == pushed["commit"], "what is pushed otherwise is the head of main"


@pytest.mark.long
@pytest.mark.parametrize(("hub", "version"), OLDEST, indirect=["hub"])
def test_an_unsigned_commit_is_seen_by_publishers_alone_where_signatures_are_required(
    hub: Hub, world: World, version: str, tmp_path: Path
) -> None:
    keys, cli = Keys(tmp_path, "team"), hub.cli
    space = f"strict-{version.replace('.', '-')}"
    cli.ok("namespace", "set", space, "--require-signature", "--signing-key", keys.public)
    for user, role in (("pia", "publisher"), ("rita", "reader")):
        cli.ok("namespace", "grant", space, user, role)
    reader = cli.ok("token", "create", "--user", "rita").out.strip()  # the server may have cached her rights
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": "Acme/Tiny-Llama"}
    (adapter / CONFIG).write_text(json.dumps(config))

    def seen(act: str, argument: Path, token: str) -> Any:
        (tmp_path / act).mkdir(exist_ok=True)
        return hub.run(client(version), "hub_drafts.py", tmp_path / act, Path(act), argument, Path(space), token=token)

    pushed = seen("push", adapter, hub.publisher)
    first, second = pushed["commits"]
    assert pushed["by_id"] == hashes(adapter)
    assert set(pushed["next"]) == {*hashes(adapter), "notes.txt"}
    assert (pushed["branches"], len(pushed["log"])) == ({"next": second}, 2)
    assert pushed["main"][0] == "RevisionNotFoundError"
    assert "Drafts are on next" in pushed["main"][1]
    assert "accepts only releases signed" in pushed["tag"][1], "it is the last draft that a tag would publish"
    (tmp_path / "ids").write_text(json.dumps([first, second]))
    read = seen("read", tmp_path / "ids", reader)
    assert (read["drafts"], read["not_hidden"]) == (30, {})
    assert (read["served"][0], read["files"], read["branches"]) == ("RevisionNotFoundError", {}, {})
    assert "next" not in read["main"][1]
    signed = cli.json(
        "push", world.adapters["other-sql"], f"{space}/sql:1.0.0", "--base", "tiny", "--sign", keys.private
    )
    shutil.rmtree(tmp_path / "read")
    read = seen("read", tmp_path / "ids", reader)
    assert (read["drafts"], read["not_hidden"]) == (30, {})
    assert read["branches"] == {"main": signed["release"]["commit"]}
    assert read["titles"] == ["1.0.0"]
    assert {path.rpartition("/")[2]: sha256 for path, sha256 in read["files"].items() if "snapshots" in path} == {
        row["path"]: row["sha256"] for row in signed["release"]["files"]
    }


@LONG
@pytest.mark.parametrize("version", ["0.24.7", "1.20.0", "2.4.0"])
def test_a_large_file_goes_by_lfs_where_xet_is_disabled(hub: Hub, version: str, tmp_path: Path) -> None:
    repository, size = f"acme/large-{version.replace('.', '-')}", 201 << 20
    with (tmp_path / "large.dat").open("wb") as file:
        file.write(version.encode())
        file.truncate(size)
    before = hub.requests()
    without_xet = {"HF_HUB_DISABLE_XET": "1"}
    seen = hub.run(
        client(version), "hub_large.py", tmp_path, Path(repository), token=hub.publisher, environ=without_xet
    )
    assert seen == {"large.dat": [size, hashes(tmp_path)["large.dat"]]}
    sent = hub.requests() - before
    counts = tuple(sent[method, "/api/lfs/{namespace}/{sha256}"] for method in ("PUT", "POST"))
    assert counts == ((0, 1) if hub.direct else (1, 0))


def _write_bytes_of_each_kind(directory: Path, size: int) -> Path:
    """Random bytes, text, weights in bfloat16, and zeros, as of an untrained matrix."""
    chance = np.random.default_rng(size)
    directory.mkdir()
    (directory / "random.dat").write_bytes(chance.bytes(size))
    (directory / "text.dat").write_bytes(b"".join(b"line %d\n" % number for number in range(size // 12)))
    weights = chance.normal(scale=0.02, size=size // 2).astype(np.float32).view(np.uint32) >> 16
    (directory / "bf16.dat").write_bytes(weights.astype(np.uint16).tobytes())
    (directory / "zeros.dat").write_bytes(bytes(size + 1))
    (directory / "small.json").write_text("{}")
    return directory


@pytest.mark.long
@pytest.mark.parametrize(
    ("hub", "version"),
    [
        ("directory", "2.4.0"),
        *(pytest.param(*way, marks=LONG) for way in (("S3", "2.4.0"), ("directory", "1.20.0"), ("S3", "1.20.0"))),
    ],
    indirect=["hub"],
)
def test_a_client_with_xet_sends_files_of_every_kind(hub: Hub, version: str, tmp_path: Path) -> None:
    repository, pushed = (
        f"acme/xet-{version.replace('.', '-')}",
        _write_bytes_of_each_kind(tmp_path / "pushed", 3 << 20),
    )
    before = hub.requests()
    seen = hub.run(
        client(version), "hub_xet.py", tmp_path, pushed, Path(repository), Path(hub.token), token=hub.publisher
    )
    sent = hub.requests() - before
    assert seen["files"] == seen["pulled"] == seen["again"] == hashes(pushed)
    first, second, again = seen["commits"]
    assert first == again != second, "a repeated push changes nothing"
    assert sent[XORBS] > 0
    assert "the role publisher" in seen["reader"], "refused before anything is sent"


@LONG
@pytest.mark.parametrize("version", ["1.20.0", "2.4.0"])
def test_a_large_file_by_xet_is_not_in_the_memory_of_the_server(hub: Hub, version: str, tmp_path: Path) -> None:
    repository, chance = f"acme/large-by-xet-{version.replace('.', '-')}", np.random.default_rng(len(version))
    with (tmp_path / "large.dat").open("wb") as file:
        for _ in range(25):
            file.write(chance.bytes(10 << 20))
    Path(f"/proc/{hub.process_id}/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_bytes(hub.process_id)
    seen = hub.run(client(version), "hub_large.py", tmp_path, Path(repository), token=hub.publisher)
    assert seen == {"large.dat": [250 << 20, hashes(tmp_path)["large.dat"]]}
    grown = _peak_bytes(hub.process_id) - before
    assert grown < 64 << 20, f"{grown:,} bytes"


def _peak_bytes(process_id: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process_id}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
