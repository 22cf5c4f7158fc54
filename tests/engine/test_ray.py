"""Two Ray nodes on one host, with a real S3 server and PostgreSQL: units, kills, devices, and jobs made of units."""

import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.environment.settings import EngineSettings, Settings
from registry.errors import Invalid, RegistryError, Unavailable
from registry.storage.s3.store import S3Results
from registry.worker.engine.answers import LOG_LINES
from registry.worker.engine.local import LocalEngine
from registry.worker.engine.protocol import Needs
from registry.worker.engine.ray import MAX_DEATHS, RayEngine
from registry.worker.engine.units import Unit, open_node
from tests.engine import counted
from tests.engine.cluster import RayCluster
from tests.engine.open_cluster import refusal
from tests.engine.site import OUTPUTS, Site, Stage, decided, files_of, fitted, judged_model, recipe, unit_etags


def go_on(_done: int) -> None:
    """A check that never stops the map."""


def run(engine: RayEngine | LocalEngine, units: list[Unit], needs: Needs | None = None) -> dict[str, Any]:
    """The results by unit."""
    ended = engine.map(counted.DOUBLE, units, needs or Needs(), go_on)
    return {unit.name: result for unit, result in ended}


def test_units_run_on_both_nodes_and_what_is_finished_is_not_run_again(engine: RayEngine, journal: Path) -> None:
    first = run(engine, counted.units(3, journal, beside=2))
    assert [first[f"unit {number}"]["number"] for number in range(3)] == [0, 2, 4]
    assert len({result["process"] for result in first.values()}) == 2
    again = run(engine, counted.units(5, journal))
    assert {name: again[name] for name in first} == first
    assert set(counted.events(journal).values()) == {1}
    assert run(LocalEngine(open_node(Settings())), counted.units(5, journal)) == again
    assert set(counted.events(journal).values()) == {1}, "the local engine has the same keys"


def test_a_unit_goes_to_the_process_that_ran_one_near_it(engine: RayEngine, journal: Path) -> None:
    both = [*counted.units(2, journal, beside=2), *counted.units(8, journal, seconds=0.2)[2:]]
    units = [
        replace(unit, content={**unit.content, "near": near}, near=near)  # with a content that no other test has
        for unit, near in zip(both, "abaabbab", strict=True)
    ]
    made = run(engine, units)
    processes = {near: {made[unit.name]["process"] for unit in units if unit.near == near} for near in "ab"}
    assert processes["a"] != processes["b"], "each process begins with its own"
    assert len(processes["a"]) == 1 or len(processes["b"]) == 1, "only one that has run out of its own takes others"


@pytest.mark.long
def test_a_process_serves_the_next_map_if_it_has_what_that_one_needs(engine: RayEngine, journal: Path) -> None:
    def process(number: int, needs: Needs) -> int:
        unit = Unit(name=f"next {number}", content={"next": number, "number": number}, hints={"journal": str(journal)})
        return run(engine, [unit], needs)[unit.name]["process"]

    first = process(1, Needs(memory_bytes=2 << 20, device_bytes=1 << 20))
    assert process(2, Needs(memory_bytes=1 << 20)) == first, "a merge after a search"
    assert process(3, Needs(memory_bytes=2 << 20, device_bytes=1 << 20)) == first
    assert process(4, Needs(memory_bytes=4 << 20)) != first


def test_a_result_whose_bytes_are_gone_is_made_again(cluster: RayCluster, journal: Path) -> None:
    node = open_node(Settings(home=Path(cluster.environ["ADAPTORY_HOME"])))
    (unit,) = [Unit(name="unit lost", content={"number": 77}, hints={"journal": str(journal)})]
    run(LocalEngine(node), [unit])
    node.results.write(counted.DOUBLE.key(unit), b'{"numb')
    assert run(LocalEngine(node), [unit])["unit lost"]["number"] == 154
    assert counted.events(journal)["done unit lost"] == 2


def test_a_session_of_the_process_is_used_and_not_ended(cluster: RayCluster, engine: RayEngine, journal: Path) -> None:
    """For example one that a notebook has begun; here the driver's."""
    settings = Settings(home=Path(cluster.environ["ADAPTORY_HOME"]))
    known = EngineSettings(kind="ray", address=cluster.address, token_path=cluster.token_path)
    another = RayEngine(known, open_node(settings))
    run(another, counted.units(1, journal))
    another.close()
    assert len(run(engine, counted.units(2, journal))) == 2
    with socket.create_server(("127.0.0.1", 0)) as other:
        elsewhere = known.model_copy(update={"address": f"127.0.0.1:{other.getsockname()[1]}"})
        with pytest.raises(Unavailable, match="session of the cluster at"):
            RayEngine(elsewhere, open_node(settings))


@pytest.mark.long
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ADAPTORY_DATABASE_POOL_SIZE": "0"}, "ADAPTORY_DATABASE_POOL_SIZE: Input should be greater than"),
        ({"ADAPTORY_HOME": "/proc/none"}, "'/proc/none'"),
        ({"ADAPTORY_STORAGE__PREFIX": "another/"}, "its store is another"),
    ],
)
def test_a_node_that_cannot_run_units_says_why(
    cluster: RayCluster, engine: RayEngine, journal: Path, changed: dict[str, str], says: str
) -> None:
    usual, cluster.environ = cluster.environ, {**cluster.environ, **changed}
    odd, unit = cluster.start(cpus=2), Unit(name="unit", content={"odd": says, "number": 1}, hints=_slow(journal))
    cluster.environ = usual
    try:
        with pytest.raises(Unavailable, match=says) as caught:
            list(engine.map(counted.DOUBLE, [unit], Needs(cpus=2), go_on))
    finally:
        cluster.kill(odd)
    assert caught.value.code == "engine_node_differs"


def test_a_node_that_dies_costs_the_units_that_it_was_doing(
    cluster: RayCluster, engine: RayEngine, journal: Path
) -> None:
    numbers = [Unit(name=f"late {n}", content={"late": n, "number": n}, hints=_slow(journal)) for n in range(12)]
    done = 0
    for _ in engine.map(counted.DOUBLE, numbers, Needs(), go_on):
        done += 1
        if done == 4:
            cluster.kill(cluster.nodes[1])
    cluster.start()
    ended = counted.events(journal)
    assert done == 12
    assert all(ended[f"done late {number}"] for number in range(12))
    begun_again = [number for number in range(12) if ended[f"begun late {number}"] > 1]
    assert len(begun_again) <= 1, "the dead node had one CPU"


def test_a_unit_that_a_dead_node_had_goes_to_a_process_that_has_run_out_of_units(
    cluster: RayCluster, engine: RayEngine, journal: Path
) -> None:
    """The idle process holds the only CPU that is left, so a new one would wait for it forever."""
    both = counted.units(2, journal, beside=2)  # with contents that no other test has: a kept result would not begin
    first = run(engine, [replace(unit, content={**unit.content, "first": unit.name}, near=unit.name) for unit in both])
    survives = {member.pid for member in cluster.nodes[0].family}
    quick, slow = sorted(first, key=lambda name: first[name]["process"] not in survives)
    units = [
        Unit(
            name=f"last {near}",
            content={"last": near, "number": 1},
            # Both have begun, after the first two, before the quick one ends and a node is killed.
            hints={"journal": str(journal), "seconds": 5 if near == slow else 0, "beside": 4},
            near=near,
        )
        for near in (quick, slow)
    ]
    ended = list[str]()
    for unit, _ in engine.map(counted.DOUBLE, units, Needs(), go_on):
        ended.append(unit.near)
        if unit.near == quick:
            cluster.kill(cluster.nodes[1])
    cluster.start()
    assert ended == [quick, slow]
    assert counted.events(journal)[f"begun last {slow}"] == 2


@pytest.mark.long
def test_a_process_that_dies_between_its_result_and_its_answer_costs_nothing(engine: RayEngine, journal: Path) -> None:
    units = counted.units(3, journal)
    assert sorted(result["number"] for _, result in engine.map(counted.DIE, units, Needs(), go_on)) == [0, 1, 2]
    assert engine.redone == 0
    assert set(counted.events(journal).values()) == {1}


def _slow(journal: Path) -> dict[str, Any]:
    return {"journal": str(journal), "seconds": 0.4}


@pytest.mark.parametrize(
    ("how", "family", "code", "says"),
    [
        ("refused", Invalid, "pickle", "bad unit: it is a pickle."),
        ("defect", Unavailable, "unit_failed", "ZeroDivisionError in counted.py:"),
        pytest.param(
            *("killed", Unavailable, "unit_lost", f"The process of bad unit died {MAX_DEATHS} times"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_unit_that_cannot_be_done_ends_the_map_with_its_cause(
    engine: RayEngine, journal: Path, how: str, family: type[RegistryError], code: str, says: str
) -> None:
    unit = Unit(name="bad unit", content={"how": how}, hints={"journal": str(journal)})
    with pytest.raises(family) as caught:
        list(engine.map(counted.FAIL, [unit], Needs(), go_on))
    assert caught.value.code == code
    assert says in caught.value.detail
    if how == "killed":
        assert counted.events(journal)["begun bad unit"] == MAX_DEATHS
    else:
        assert len(caught.value.log_lines) == LOG_LINES
        assert any("line 299" in line for line in caught.value.log_lines)


@pytest.mark.long
def test_units_share_a_device_only_if_its_memory_has_room_for_both(
    cluster: RayCluster, engine: RayEngine, tmp_path: Path
) -> None:
    with_gpu = cluster.start(cpus=2, gpus=1)
    settings = Settings(home=Path(cluster.environ["ADAPTORY_HOME"]), device_memory_bytes=100)
    known = EngineSettings(kind="ray", address=cluster.address, token_path=cluster.token_path, device="gpu")
    sharing, most = RayEngine(known, open_node(settings)), dict[int, int]()
    for size_bytes in (101, 60, 50):
        hints = {"journal": str(tmp_path / str(size_bytes)), "seconds": 1.0, "beside": 2 if size_bytes == 50 else 0}
        units = [
            Unit(name=f"{n}", content={"of": size_bytes, "number": n}, hints=hints)
            for n in range(3 if size_bytes == 50 else 2)
        ]
        list(sharing.map(counted.DOUBLE, units, Needs(cpus=0.1, device_bytes=size_bytes), go_on))
        most[size_bytes] = _most_at_a_time(tmp_path / str(size_bytes))
    sharing.release()
    cluster.kill(with_gpu)
    assert most == {101: 1, 60: 1, 50: 2}, "what is larger than a device has one to itself"


@pytest.mark.long
def test_a_unit_that_no_node_has_room_for_does_not_wait_forever(
    engine: RayEngine, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.worker.engine.ray.LACKING_S", 1.0)
    unit = Unit(name="too large", content={"of": "no node", "number": 1}, hints={"journal": str(journal)})
    for needs, says in ((Needs(base="0123456789abcdef"), "base:0123456789ab"), (Needs(memory_bytes=1 << 45), "memory")):
        with pytest.raises(Unavailable, match=says) as caught:
            list(engine.map(counted.DOUBLE, [unit], needs, go_on))
        assert caught.value.code == "engine_too_small"
    assert not counted.events(journal)


def _most_at_a_time(journal: Path) -> int:
    running, most = 0, 0
    for line in journal.read_text().splitlines():
        running += 1 if line.startswith("begun") else -1
        most = max(most, running)
    return most


class Stopped(Exception):
    """Raised by a check."""


@pytest.mark.long
def test_a_map_that_is_stopped_ends_its_units_within_seconds_also_while_the_store_is_away(
    cluster: RayCluster, engine: RayEngine, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [Unit(name=f"long {n}", content={"long": n, "number": n}, hints=_endless(journal)) for n in range(4)]
    stopped_at = 0.0

    def check(_done: int) -> None:
        nonlocal stopped_at
        if counted.events(journal)["begun long 0"]:
            monkeypatch.setattr(S3Results, "delete", _away)
            stopped_at = time.monotonic()
            raise Stopped

    with pytest.raises(Stopped):
        list(engine.map(counted.DOUBLE, numbers, Needs(), check))
    deadline = stopped_at + 15  # 1 s where nothing else runs
    while cluster.runners:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [event for event in counted.events(journal) if event.startswith("done")]


def _away(_results: S3Results, _key: str) -> None:
    raise Unavailable("store_unavailable", "The blob store does not respond as expected.", next_step="Try again.")


def _endless(journal: Path) -> dict[str, Any]:
    return {"journal": str(journal), "seconds": 600}


@pytest.mark.long
def test_a_cluster_without_tokens_is_refused(tmp_path: Path) -> None:
    environ = {"ADAPTORY_HOME": str(tmp_path / "home")}
    open_cluster = RayCluster(environ, secured=False)
    try:
        open_cluster.start()
        code, detail = refusal({**environ, **open_cluster.driver_environ}, tmp_path)
        assert (code, "needs no token" in detail) == ("engine_open", True)
        insecure = {**environ, **open_cluster.driver_environ, "ADAPTORY_ENGINE__INSECURE": "true"}
        assert refusal(insecure, tmp_path) == ("", "")
    finally:
        open_cluster.stop()


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    absent = RayCluster({})
    code, detail = refusal({"ADAPTORY_HOME": str(tmp_path), **absent.driver_environ}, tmp_path)
    assert code == "engine_unavailable"
    assert absent.address in detail


VICTIMS = ("node", "worker", "server")
MANY_VICTIMS = (*VICTIMS, "node", "worker")


@pytest.mark.long
def test_a_search_and_an_evaluation_on_two_nodes_give_what_one_process_gives(site: Site, tmp_path: Path) -> None:
    here = site.here("compose", recipe(tmp_path, "1.0.0"))
    there = site.on_cluster("compose", recipe(tmp_path, "1.1.0"))
    assert decided(there) == decided(here)
    for repository in OUTPUTS:
        assert files_of(site, f"{repository}:1.1.0") == files_of(site, f"{repository}:1.0.0")
    assert len(unit_etags(site)) > 20, "passes and slices, which the nodes wrote"


@pytest.mark.long
def test_a_merged_model_is_measured_on_nodes_that_load_it_from_the_store(site: Site, tmp_path: Path) -> None:
    here = site.here("compose", judged_model(tmp_path, "1.0.0"))
    before = unit_etags(site)
    there = site.on_cluster("compose", judged_model(tmp_path, "1.1.0"))
    assert decided(there) == decided(here)
    assert {"sql-exact", "guard-exact"} <= {row["suite"] for row in there["candidate_scores"]}
    assert files_of(site, "acme/judged:1.1.0") == files_of(site, "acme/judged:1.0.0")
    assert len(unit_etags(site)) > len(before) + 3, "a plan, a shard, texts, slices"


@pytest.mark.long
def test_a_probe_and_a_fit_are_run_by_nodes_which_alone_load_the_base(site: Site, tmp_path: Path) -> None:
    here = site.here("compose", fitted(tmp_path, "1.0.0"))
    there = site.on_cluster("compose", fitted(tmp_path, "1.1.0"))
    assert here["conflicts"]["pairs"][0]["evidence"] == "probe"
    assert decided(there) == decided(here)
    for repository in ("acme/fitted", "acme/fitted-merged"):
        assert files_of(site, f"{repository}:1.1.0") == files_of(site, f"{repository}:1.0.0")


@pytest.mark.long
@pytest.mark.parametrize(("rounds", "victims"), [(1, ("node",)), (1, VICTIMS), (10, MANY_VICTIMS)])
def test_a_composition_survives_the_deaths_of_a_node_its_worker_and_the_server(
    site: Site,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    rounds: int,
    victims: tuple[str, ...],
) -> None:
    """Once of a node alone, then of all in random order at random moments: the worker dies at most twice, since the
    third death ends its job."""
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    record_property("ADAPTORY_TEST_SEED", seed)
    chance = random.Random(seed)
    stage = Stage(site, tmp_path)
    try:
        for number in range(1, rounds + 1):
            here = site.here("compose", recipe(tmp_path, f"0.1.{number}", number))
            shutil.rmtree(site.worker_home, ignore_errors=True)  # its journal holds everything that needs no fit
            version, before = f"0.2.{number}", unit_etags(site)
            made = before
            composition = stage.begin(recipe(tmp_path, version, number))
            order = chance.sample(victims, len(victims))
            for victim in order:
                time.sleep(chance.uniform(0.5, 4.0))
                made = stage.remembered(made, seed)
                assert stage.published(version) in (set(), set(OUTPUTS)), f"half of it is published; seed {seed}"
                stage.kill(victim)
            assert stage.ended(composition) == "done", f"after {order}; seed {seed}"
            assert decided(stage.shown(composition)) == decided(here), seed
            assert len(stage.remembered(made, seed)) > len(before) + 20, "its own passes and slices"
            for name in OUTPUTS:
                assert files_of(site, f"{name}:{version}") == files_of(site, f"{name}:0.1.{number}"), seed
                assert stage.versions(name).count(version) == 1
        shutil.rmtree(site.worker_home, ignore_errors=True)
        record_property("seconds until cancelled", stage.cancelled(recipe(tmp_path, "0.3.0", rounds + 1)))
        assert "0.3.0" not in stage.versions("acme/assistant")
    finally:
        stage.close()
