"""Stored results of units, by a key of everything that determines them, and directories of live processes."""

import os
from importlib.metadata import version
from pathlib import Path
from weakref import ref

import pytest

from composer.evaluation.scorers.scorer import package_of
from composer.formats.recipes.tasks import ScorerChoice
from registry.environment.settings import Settings
from registry.errors import Invalid
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.worker.engine import units
from registry.worker.engine.ray_runner import UnitRunner
from registry.worker.engine.units import Unit, finished, open_node, run_unit
from registry.worker.evaluation_units import Examined
from registry.worker.node_models import base_hints
from tests.composer.scorers import install_scorer
from tests.engine import counted


def test_a_process_removes_directories_of_dead_ones_of_its_host_alone(tmp_path: Path) -> None:
    """Hosts that share a store in a directory share their homes too."""
    settings = Settings(home=tmp_path)
    node = open_node(settings)
    own, dead = node.kept_directory("base"), 2**22 + 1  # beyond the largest process id
    with node.scratch() as scratch:
        left, other = (scratch.with_name(f"unit-{host}-{dead}-kept") for host in (scratch.name.split("-")[1], "0" * 8))
        gone = scratch.with_name(f"unit-{'1' * 8}-{os.getpid()}-kept")
        for directory in (left, other, gone):
            directory.mkdir()
        os.utime(gone, (0, 0))
        open_node(settings)
        there = {path: path.exists() for path in (own, scratch, left, other, gone)}
    assert there == {own: True, scratch: True, left: False, other: True, gone: False}


def test_nodes_of_one_process_forget_their_own_files_alone(tmp_path: Path) -> None:
    """Like two threads that compose in an embedded registry."""
    one, other = (open_node(Settings(home=tmp_path)) for _ in range(2))
    kept = one.kept_directory("merge")
    other.kept_directory("merge")
    other.forget()
    assert kept.is_dir()
    one.forget()
    assert not list(one.work_directory.iterdir())


def test_another_release_of_adaptory_makes_its_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = open_node(Settings(home=tmp_path))
    unit = Unit(name="unit", content={"number": 1}, hints={"journal": str(tmp_path / "journal")})
    run_unit(node, counted.DOUBLE, unit)
    assert finished(node, counted.DOUBLE, unit) is not None
    monkeypatch.setattr(units, "_RELEASE", "99.0.0")
    assert finished(node, counted.DOUBLE, unit) is None


def test_what_is_too_large_to_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be written, and never be readable."""
    node, unit = (
        open_node(Settings(home=tmp_path)),
        Unit(name="unit", content={"number": 1}, hints={"journal": "/dev/null"}),
    )
    monkeypatch.setattr(units, "MAX_RESULT_BYTES", 50)
    for keep in (lambda: node.share(bytes(50)), lambda: run_unit(node, counted.DOUBLE, unit)):
        with pytest.raises(Invalid, match="at most 49 are kept"):
            keep()
    assert node.shared(node.share(bytes(49))) == bytes(49)


def test_a_python_scorer_is_known_by_its_package_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ScorerChoice(name="obedient")
    assert package_of(ScorerChoice(name="match")) == package_of(None) == package_of(chosen) == ""
    install_scorer(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_of(chosen) == "obedient 1.0"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ADAPTORY_ENGINE__RUNNERS", "-1", "ADAPTORY_ENGINE__RUNNERS: Input should be greater than 0"),
        ("ADAPTORY_HOME", "/proc/none", "'/proc/none'"),
    ],
)
def test_a_node_says_why_it_cannot_run_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv("ADAPTORY_HOME", str(tmp_path))
    own = version("adaptory")
    open_node(Settings()).results.write("marker", b"{}")
    assert UnitRunner().ready("marker", own) == ""
    monkeypatch.setenv(name, value)
    assert says in UnitRunner().ready("marker", own)


def test_a_merged_model_needs_memory_for_its_own_size_and_no_node_that_has_the_base() -> None:
    hints = base_hints(["/bases/tiny"], 1000)
    wider = [ManifestFile("model.safetensors", 2000, Digest("0" * 64))]
    base, merged = Examined(base="b", hints=hints), Examined(base="b", hints=hints, files=wider, model=True)
    assert (base.needs.base, merged.needs.base) == ("b", None)
    assert merged.needs.device_bytes == 2 * base.needs.device_bytes


def test_a_process_keeps_one_model_at_a_time(tmp_path: Path) -> None:
    """Two bases need not fit into its memory."""
    node = open_node(Settings(home=tmp_path))

    class Model:
        pass

    first = ref(node.kept("model", "first", Model))
    assert node.kept("model", "first", Model) is first()
    assert node.kept("model", "second", first) is None, "the first is gone when the second is made"
