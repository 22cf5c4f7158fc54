"""Imports of releases from a Hugging Face Hub and exports to one. The hub is another Adaptory: a real server of the
same protocol, read and written by the hub's own client."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from sqlalchemy import delete

from registry.database.tables import BaseLocation
from registry.domain.catalog import bases
from registry.wire.catalog import ReleaseOut
from tests import services
from tests.composer.small_model import save_llama
from tests.forked import start_command
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.hub_client import CONFIG, WEIGHTS
from tests.scenarios.small_hub import SmallHub, small_hub
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_signatures import Keys
from tests.scenarios.traces import api_of, hashes, traces
from tests.scenarios.world import Cli, Ran, World, server

CARD, BASE_ID = "README.md", "Acme/Tiny-Llama"


@dataclass
class Online(Cli):
    """`adaptory …` in a process of its own, since the hub's client reads its environment when it is imported."""

    directory: Path = field(default_factory=Path)

    def __call__(self, *arguments: object) -> Ran:
        apart = ("ADAPTORY_", "HF_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(apart)}
        environment |= {"HF_HOME": str(self.directory / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **self.environment}
        out, err = self.directory / "out", self.directory / "err"
        process = start_command([str(argument) for argument in arguments], environment, out, err)
        process.join(60)
        assert process.exitcode is not None
        return Ran(process.exitcode, out.read_text(), err.read_text())

    def having(self, **environment: str) -> "Online":
        return Online({**self.environment, **environment}, self.served_with, self.directory)


def online(cli: Cli, directory: Path) -> Online:
    directory.mkdir()
    return Online(cli.environment, cli.served_with, directory)


@dataclass(frozen=True)
class Far:
    """Another team's hub, whose own people use it with `cli`."""

    url: str
    cli: Cli

    @property
    def endpoint(self) -> tuple[str, str]:
        return "--endpoint", self.url


@pytest.fixture(scope="module")
def far(templates: Templates, tmp_path_factory: pytest.TempPathFactory) -> Generator[Far]:
    home = tmp_path_factory.mktemp("far") / "server"
    environment = {**templates.copy(services.PAIRINGS[0], home), "ADAPTORY_USER": USER}
    with server(home, **environment) as (url, _):
        yield Far(url, Cli({"ADAPTORY_HOME": str(home.with_name("client")), "ADAPTORY_URL": url}))


def carded(world: World, directory: Path, card: dict[str, Any], body: str = "# A card\n") -> Path:
    """The adapter sql with a model card."""
    shutil.copytree(world.adapters["sql"], directory)
    (directory / CARD).write_text(f"---\n{yaml.safe_dump(card)}---\n{body}")
    return directory


def record(cli: Cli, ref: str, **values: float) -> None:
    """Scores that an evaluation has measured on the suite sql-exact."""
    with api_of(cli) as api:
        digest = api.get("/v1/suites/sql-exact")["digest"]
        rows = [
            {"suite_digest": digest, "metric": name, "value": value, "stderr": 0.1, "n": 6,
             "higher_is_better": name != "nll"}
            for name, value in values.items()
        ]  # fmt: skip
        api.post(f"{ReleaseOut.read(cli.json('show', ref)).path}/scores", {"scores": rows, "results": []})


def scores(release: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    return {f"{score['suite']}.{score['metric']}": (score["value"], score["reported"]) for score in release["scores"]}


@pytest.mark.on("PostgreSQL")
def test_a_release_goes_from_hub_to_hub_and_stays_the_same(
    stocked: Cli, far: Far, world: World, tmp_path: Path
) -> None:
    name = f"far/{tmp_path.name.replace('_', '-').lower()}"
    squad = {"task": {"type": "x"}, "dataset": {"type": "squad", "name": "squad"}}
    card = {
        "base_model": BASE_ID, "license": "mit", "language": "no",
        "model-index": [{"name": "x", "results": [squad | {"metrics": [{"type": "f1", "value": 0.5}]}]}],
    }  # fmt: skip
    trained = carded(world, tmp_path / "out", card)
    first = far.cli.json("push", trained, f"{name}:1.0.0", "--base", "tiny")["release"]
    me = online(stocked, tmp_path / "me")

    imported = me.json("import", f"hf://{name}@1.0.0", "acme/sql:1.0.0", *far.endpoint)
    release = stocked.json("show", "acme/sql:1.0.0")
    assert imported["imported_from"] == f"hf://{name}@{first['commit']}"
    assert release["provenance"]["imported_from"] == imported["imported_from"]
    assert release["provenance"]["imported_endpoint"] == imported["endpoint"] == far.url
    assert (release["commit"], release["base"]["name"], release["adapter"]) == (
        first["commit"], "tiny", first["adapter"],
    )  # fmt: skip
    assert scores(release) == {"reported-squad.f1": (0.5, True)}
    again = me.ok("import", f"hf://{name}", "acme/sql:1.0.0", *far.endpoint)
    assert "already published, nothing to do" in again.out
    assert f"imported_from {imported['imported_from']}" in " ".join(stocked.ok("show", "acme/sql").out.split())

    record(stocked, "acme/sql:1.0.0", accuracy=0.5, nll=1.5)
    exported = me.json("export", "acme/sql:1.0.0", f"hf://{name}-back", *far.endpoint)
    assert (exported["created"], exported["tag"], exported["scores"]) == (True, "1.0.0", 2)
    back = far.cli.json("show", f"{name}-back:1.0.0")
    assert exported["exported_to"] == f"hf://{name}-back@{back['commit']}"
    assert (back["base"]["digest"], back["adapter"]) == (release["base"]["digest"], release["adapter"])
    measured = {"sql-exact.accuracy": (0.5, True), "sql-exact.nll": (1.5, True)}
    assert scores(back) == scores(release) | measured, "measured here, and reported there"

    far.cli.ok("pull", f"{name}-back:1.0.0", "-o", tmp_path / "back")
    files = hashes(tmp_path / "back")
    assert {path: files[path] for path in (CONFIG, WEIGHTS)} == {
        path: sha256 for path, sha256 in hashes(trained).items() if path != CARD
    }
    _is_read_by_the_client(tmp_path / "back")
    repeated = me.json("export", "acme/sql:1.0.0", f"hf://{name}-back", *far.endpoint)
    assert repeated == {**exported, "created": False}


def _is_read_by_the_client(directory: Path) -> None:
    text = (directory / CARD).read_text()
    assert "language: 'no'\n" in text, "what is stated stays as it is written"
    assert text.endswith("# A card\n")
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.license) == (BASE_ID, "peft", "mit")
    assert data.tags == ["adaptory", "lora"]
    results = {
        (eval_result.dataset_type, eval_result.metric_type): eval_result.metric_value
        for eval_result in data.eval_results or []
    }
    assert results == {("squad", "f1"): 0.5, ("sql-exact", "accuracy"): 0.5, ("sql-exact", "nll"): 1.5}
    [file] = (directory / ".eval_results").iterdir()
    [entry] = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("sql-exact", "accuracy", 0.5)
    assert entry.notes == "n=6, standard error 0.1"


@pytest.mark.long
def test_a_tag_that_names_something_else_is_not_moved(
    stocked_on_disk: Cli, far: Far, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    for name in ("sql", "other-sql"):
        stocked_on_disk.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    me.ok("export", "acme/sql:1.0.0", "hf://far/taken", *far.endpoint)
    refused = me("export", "acme/other-sql:1.0.0", "hf://far/taken", *far.endpoint)
    assert (refused.code, refused.out) == (4, "")
    assert f"hf://far/taken@1.0.0 already exists with different content: {WEIGHTS}." in refused.err
    assert "Export another version" in refused.err
    named = me("export", "acme/sql:1.0.0", "hf://far/taken@main", *far.endpoint)
    assert (named.code, "Name the repository alone" in named.err) == (2, True)


def test_files_of_the_version_before_do_not_stay_in_an_export(
    stocked_on_disk: Cli, far: Far, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    trained = shutil.copytree(world.adapters["sql"], tmp_path / "out")
    (trained / "special_tokens_map.json").write_text("{}")
    stocked_on_disk.ok("push", trained, "acme/sql:1.0.0", "--base", "tiny")
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.1.0", "--base", "tiny", "--notes", "No tokens")
    first = me.json("export", "acme/sql:1.0.0", "hf://far/shrinks", *far.endpoint)
    second = me.json("export", "acme/sql:1.1.0", "hf://far/shrinks", *far.endpoint)
    assert {*first["files"]} - {*second["files"]} == {"special_tokens_map.json"}
    rows = far.cli.json("list", "far/shrinks")["items"]
    assert {row["version"]: len(row["files"]) for row in rows} == {"1.0.0": 4, "1.1.0": 3}
    assert rows[0]["notes"] == "No tokens"


@pytest.fixture
def hub() -> Generator[SmallHub]:
    with small_hub() as hub:
        yield hub


def stored(directory: Path, **more: bytes) -> dict[str, bytes]:
    """The files of a directory, as a hub has them."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths} | more


def card_of(base: str) -> bytes:
    return f"---\nbase_model: {base}\n---\n".encode()


@pytest.mark.long
def test_what_cannot_be_imported_says_why(stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path) -> None:
    me, adapter = online(stocked_on_disk, tmp_path / "me"), stored(world.adapters["sql"])
    pickled = {("adapter_model.bin" if path == WEIGHTS else path): content for path, content in adapter.items()}
    config = json.loads(adapter[CONFIG]) | {"base_model_name_or_path": "Acme/Tiny-Lama"}
    hub.put("acme/pickled", pickled | {CARD: card_of(BASE_ID)})
    hub.put("acme/near", adapter | {CARD: card_of("Acme/Tiny-Lama"), CONFIG: json.dumps(config).encode()})
    hub.put("acme/data", {"data.csv": b"a,b", CARD: b"# Data"})
    hub.put("acme/photo", {"photo.jpg": b"x"})
    hub.put("acme/escaping", stored(world.base) | {"x/../../evil.json": b"{}", CARD: card_of(BASE_ID)})
    for source, code, words in (
        ("hf://acme/ghost", 3, "has no hf://acme/ghost, or does not show it to you"),
        ("hf://acme/near@2.0.0", 3, "RevisionNotFound"),
        ("hf://acme/pickled", 6, "weights only as a pickle (adapter_model.bin), which runs code when opened"),
        ("hf://acme/near", 3, "The base 'Acme/Tiny-Lama' does not exist"),
        ("hf://acme/near", 3, "Acme/Tiny-Llama"),
        ("hf://acme/data", 6, "has no adapter_model.safetensors"),
        ("hf://acme/photo", 6, "has no file of an adapter or a model"),
        ("acme/near", 2, "Write hf://ORG/NAME"),
        ("hf://acme/../near", 2, "Write hf://ORG/NAME"),
    ):
        refused = me("import", source, "acme/sql:1.0.0", "--endpoint", hub.url)
        assert (refused.code, refused.out, words in refused.err) == (code, "", True), (source, refused)
    refused = me("import", "hf://acme/near", "acme/sql:1.0.0", "--endpoint", "hub.example")
    assert (refused.code, "is not the address of a hub" in refused.err) == (2, True)
    assert stocked_on_disk.json("list")["items"] == []
    me.ok("import", "hf://acme/near", "acme/sql:1.0.0", "--endpoint", hub.url, "--base", "tiny")
    escaping = me.ok("import", "hf://acme/escaping", "acme/merged:1.0.0", "--endpoint", hub.url)
    assert "left out: x/../../evil.json" in escaping.err
    assert "evil.json" not in hub.downloads()


@pytest.mark.long
def test_a_branch_that_moves_during_an_import_does_not_mix_two_commits(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    first = hub.put("acme/moves", stored(world.adapters["sql"]) | {CARD: card_of(BASE_ID)})

    def move(path: str) -> None:
        if "/tree/" in path:
            hub.put("acme/moves", stored(world.adapters["other-sql"]) | {CARD: card_of(BASE_ID)})

    hub.seen = move
    imported = me.json("import", "hf://acme/moves", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert imported["imported_from"] == f"hf://acme/moves@{first}" != f"hf://acme/moves@{hub.heads['acme/moves']}"
    stocked_on_disk.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "pulled")
    assert hashes(tmp_path / "pulled")[WEIGHTS] == hashes(world.adapters["sql"])[WEIGHTS]
    late = me("import", "hf://acme/moves", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert (late.code, "acme/sql:1.0.0" in late.err) == (4, True)
    bumped = me.json("import", "hf://acme/moves", "acme/sql", "--bump", "auto", "--endpoint", hub.url)
    assert bumped["release"]["version"] != "1.0.0"


@pytest.mark.long
def test_a_network_that_goes_leaves_nothing_half_published_and_the_next_import_goes_on(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    hub.put("acme/sql", stored(world.adapters["sql"]) | {CARD: card_of(BASE_ID), "train.log": b"x"})
    hub.broken = {WEIGHTS}
    refused = me("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert (refused.code, "Try again; what has arrived is kept" in refused.err) == (7, True), refused.err
    assert stocked_on_disk.json("list")["items"] == []
    assert traces(stocked_on_disk).blobs == frozenset()
    hub.broken = set()
    hub.requests.clear()
    imported = me.ok("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert hub.downloads() == [WEIGHTS], "the rest has arrived before"
    assert "left out: train.log" in imported.err
    assert [
        path for path in (Path(me.environment["ADAPTORY_HOME"]) / "cache" / "imports").iterdir() if path.is_dir()
    ] == []


def test_a_file_that_is_not_what_the_hub_lists_is_not_published(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    commit = hub.put("acme/sql", stored(world.adapters["sql"]) | {CARD: card_of(BASE_ID)})
    files = hub.commits["acme/sql"][commit]

    def swap(path: str) -> None:
        if "/resolve/" in path:
            files[CARD] = card_of("Acme/Tiny-LlamX")

    hub.seen = swap
    refused = me("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert (refused.code, f"{CARD} of hf://acme/sql@{commit} differs from the listing" in refused.err) == (6, True), (
        refused.err
    )
    assert stocked_on_disk.json("list")["items"] == []


def test_a_token_goes_only_to_the_hub_that_it_is_for(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me").having(HF_TOKEN="hf_x", ADAPTORY_TOKEN="adp_x")  # noqa: S106
    hub.put("acme/sql", stored(world.adapters["sql"]) | {CARD: card_of(BASE_ID)})
    me.ok("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", hub.url)
    me.having(HF_ENDPOINT="http://127.0.0.1:9").ok("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", hub.url)
    assert {token for _, _, token in hub.requests} == {None}
    hub.requests.clear()
    own = me.having(HF_ENDPOINT=hub.url)
    own.ok("import", "hf://acme/sql", "acme/sql:1.0.0")
    own.ok("import", "hf://acme/sql", "acme/sql:1.0.0", "--endpoint", f"{hub.url}/")
    assert {token for _, _, token in hub.requests} == {"Bearer hf_x"}


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [("import", "hf://acme/sql", "acme/sql:1.0.0"), ("base", "add", "hf://a/b", "--name", "b")]
)
def test_without_the_extra_the_error_says_what_to_install(command: tuple[str, ...], on_disk: Cli) -> None:
    without = "import sys; sys.modules['huggingface_hub'] = None; from registry.cli.start import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", without, *command],
        env={**os.environ, **on_disk.environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, "pip install 'adaptory[hub]'" in ran.stderr) == (7, True), ran.stderr


@pytest.mark.long
def test_a_model_is_imported_without_the_pickles_beside_its_weights(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    hub.put(
        "acme/merged", stored(world.base) | {"pytorch_model.bin": b"x", ".gitattributes": b"", CARD: card_of("tiny")}
    )
    imported = me.ok("import", "hf://acme/merged", "acme/merged:1.0.0", "--endpoint", hub.url)
    assert "left out: pytorch_model.bin\n" in imported.err
    assert "pytorch_model.bin" not in hub.downloads()
    shown = stocked_on_disk.json("show", "acme/merged:1.0.0")
    assert (shown["kind"], shown["base"]["name"]) == ("model", "tiny")
    assert {row["path"]: row["sha256"] for row in shown["files"] if row["path"] != CARD} == hashes(world.base)


def test_a_base_of_a_hub_is_in_its_cache(on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path) -> None:
    files = stored(world.base) | {CARD: b"---\nlicense: mit\n---\n"}
    commit = hub.put(BASE_ID, files | {"onnx/model.onnx": b"x", "consolidated.safetensors": b"x"})
    me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
    added = me.json("base", "add", f"hf://{BASE_ID}", "--name", "tiny")
    location = f"hf://{BASE_ID}@{commit}"
    assert (added["locations"], added["aliases"], added["license"]) == ([location], [BASE_ID], "MIT")
    cache = tmp_path / "me" / "hf" / "hub" / "models--Acme--Tiny-Llama" / "snapshots" / commit
    assert {path.name for path in cache.iterdir()} == {*files}

    hub.put(BASE_ID, stored(world.adapters["sql"]))
    hub.requests.clear()
    me.ok("base", "add", location, "--name", "tiny")
    assert hub.requests == [], "it is here"


@pytest.mark.long
def test_a_machine_without_a_base_brings_it_from_its_hub(
    on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    commit = hub.put(BASE_ID, stored(world.base))
    location = f"hf://{BASE_ID}@{commit}"
    me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
    me.ok("base", "add", location, "--name", "tiny")
    hub.requests.clear()
    on_disk.ok("suite", "add", world.suites["sql"])
    on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", BASE_ID)
    other = Online(me.environment, directory=tmp_path / "other")
    other.directory.mkdir()
    offline = other.having(HF_HUB_OFFLINE="1")
    refused = offline("eval", "acme/sql", "--suite", "sql-exact")
    assert (refused.code, f"{location} is not in the hub's cache here" in refused.err) == (7, True)
    assert "HF_HUB_OFFLINE" in refused.err
    other.ok("eval", "acme/sql", "--suite", "sql-exact", "--queue")
    brought = {name for name in hub.downloads() if name.endswith(".safetensors")}
    assert brought == {path.name for path in world.base.glob("*.safetensors")}
    assert on_disk.json("show", "acme/sql")["scores"]
    offline.ok("base", "add", location, "--name", "tiny")


@pytest.mark.long
def test_a_location_whose_content_is_not_the_base_is_refused(
    stocked_on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    other = save_llama(tmp_path / "another", seed=7)
    commit = hub.put("Acme/Another", stored(other))
    large = hub.put("Acme/Large", stored(other) | {"model-2.safetensors": b"x"})
    hub.sizes = {"model-2.safetensors": 200 << 20}
    me = online(stocked_on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
    taken = me("base", "add", "hf://Acme/Another", "--name", "tiny")
    assert (taken.code, "whose weights differ" in taken.err) == (4, True)
    me.ok("base", "add", "hf://Acme/Another", "--name", "another", "--alias", "Acme/Newer")
    hub.put("Acme/Newer", stored(world.base))
    newer = me.ok("base", "add", "hf://Acme/Newer", "--name", "tiny")
    assert "note: Acme/Newer remains an alias of another" in newer.err

    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    with resources_of(stocked_on_disk.environment) as resources, resources.write() as session:
        tiny = bases.find(session, "tiny")
        session.execute(delete(BaseLocation).where(BaseLocation.base_digest == tiny.digest))
        session.add(BaseLocation(base_digest=tiny.digest, url=f"hf://Acme/Large@{large}"))
        session.add(BaseLocation(base_digest=tiny.digest, url="hf://Acme/Another"))
    refused = me("eval", "acme/sql", "--suite", "sql-exact")
    assert (refused.code, f"hf://Acme/Large@{large} has 209," in refused.err) == (3, True), refused.err
    assert "hf://Acme/Another names no commit" in refused.err
    assert "model-2.safetensors" not in hub.downloads()
    with resources_of(stocked_on_disk.environment) as resources, resources.write() as session:
        session.add(BaseLocation(base_digest=bases.find(session, "tiny").digest, url=f"hf://Acme/Another@{commit}"))
    wrong = me("eval", "acme/sql", "--suite", "sql-exact", "--json")
    assert (wrong.code, wrong.json["error"]["code"]) == (1, "base_changed")


@pytest.mark.long
def test_a_private_export_is_not_made_where_everybody_reads_it(
    stocked_on_disk: Cli, templates: Templates, world: World, tmp_path: Path
) -> None:
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    home = tmp_path / "far"
    environment = {**templates.copy(services.PAIRINGS[0], home), "ADAPTORY_USER": USER, "ADAPTORY_ACCESS": "tokens"}
    host = Cli({"ADAPTORY_HOME": str(home), **environment})
    host.ok("push", world.adapters["sql"], "open/sql:0.1.0", "--base", "tiny")
    host.ok("namespace", "set", "open", "--public")
    host.ok("push", world.adapters["sql"], "closed/other:0.1.0", "--base", "tiny")
    for namespace in ("open", "closed"):
        host.ok("namespace", "grant", namespace, "pia", "publisher")
    token = host.ok("token", "create", "--user", "pia").out.strip()
    with server(home, **environment) as (url, _):
        me = online(stocked_on_disk, tmp_path / "me").having(HF_ENDPOINT=url, HF_TOKEN=token)
        for name, words in (("sql", "exists already, and is public"), ("new", "The namespace open is public")):
            refused = me("export", "acme/sql:1.0.0", f"hf://open/{name}", "--private")
            assert (refused.code, words in refused.err) == (5, True), refused.err
        stranger = me.having(HF_TOKEN="")("export", "acme/sql:1.0.0", "hf://open/sql")
        assert (stranger.code, "HF_TOKEN" in stranger.err) == (5, True), stranger.err
        assert [row["version"] for row in host.json("list", "open/sql")["items"]] == ["0.1.0"]
        me.ok("export", "acme/sql:1.0.0", "hf://closed/sql", "--private")
        me.ok("export", "acme/sql:1.0.0", "hf://open/sql")
        me.ok("import", "hf://closed/sql@1.0.0", "acme/copy:1.0.0")


@pytest.mark.long
def test_what_is_left_out_or_left_alone_is_said(
    stocked_on_disk: Cli, far: Far, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    keys = Keys(tmp_path, "mia")
    trained = shutil.copytree(world.adapters["sql"], tmp_path / "out")
    stocked_on_disk.ok("push", trained, "acme/signed:1.0.0", "--base", "tiny", "--sign", keys.private)
    signed = me.ok("export", "acme/signed:1.0.0", "hf://far/signed", *far.endpoint)
    assert "warning: model.sig is left out" in signed.err
    hub.put("acme/signed", stored(trained) | {"model.sig": b"{}", CARD: card_of(BASE_ID)})
    imported = me.ok("import", "hf://acme/signed", "acme/signed:2.0.0", "--endpoint", hub.url, "--sign", keys.private)
    assert "left out: model.sig" in imported.err
    stocked_on_disk.ok("verify", "acme/signed:2.0.0", "--key", keys.public)

    card = "---\n- not a mapping\n---\nText"
    config = json.loads((trained / CONFIG).read_text()) | {"base_model_name_or_path": BASE_ID}
    (trained / CONFIG).write_text(json.dumps(config))
    (trained / CARD).write_text(card)
    stocked_on_disk.ok("push", trained, "acme/odd:1.0.0", "--base", "tiny")
    odd = me.ok("export", "acme/odd:1.0.0", "hf://far/odd", *far.endpoint)
    assert "It is exported as it is, without base and scores." in odd.err
    far.cli.ok("pull", "far/odd:1.0.0", "-o", tmp_path / "pulled")
    assert (tmp_path / "pulled" / CARD).read_text() == card


def test_an_export_that_ended_before_its_tag_is_completed(
    stocked_on_disk: Cli, far: Far, world: World, tmp_path: Path
) -> None:
    me = online(stocked_on_disk, tmp_path / "me")
    trained = carded(world, tmp_path / "out", {"base_model": BASE_ID})
    for version in ("1.0.0", "2.0.0"):
        stocked_on_disk.ok("push", trained, f"acme/sql:{version}", "--base", "tiny")
    first = me.json("export", "acme/sql:1.0.0", "hf://far/resumed", *far.endpoint)
    second = me.json("export", "acme/sql:2.0.0", "hf://far/resumed", *far.endpoint)
    assert (second["created"], second["exported_to"]) == (True, first["exported_to"]), "main has these files already"
    assert [row["version"] for row in far.cli.json("list", "far/resumed")["items"]] == ["2.0.0", "1.0.0"]
