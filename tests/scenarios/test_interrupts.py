"""Ctrl-C, at any moment of a command in a process of its own: exit 130 within two seconds, one line, no traceback."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import services
from tests.doses import further
from tests.scenarios.terminal import on_terminal
from tests.scenarios.world import Cli, World, environment

BEGIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Commands in the background of a shell ignore interrupts."""
START = "from registry.cli.start import main; main()"
STUCK = """
import time
from registry.cli.releases import transfer
def never_ends(*arguments):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
transfer.resolved = never_ends
"""
DESTRUCTOR = """
import time
from registry.cli.releases import transfer
class Slow:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(1)
def destroys(*arguments):
    slow = Slow()
    del slow
    time.sleep(60)
transfer.resolved = destroys
"""

SLOWER = """
import time
from composer.evaluation import evaluate
quick = evaluate.measure_batch
def slow(*arguments):
    time.sleep(0.4)
    return quick(*arguments)
evaluate.measure_batch = slow
"""
SLOWLY = f"""
from functools import partial
from registry.worker.engine import template
template.launch = partial(template.launch, code={SLOWER!r})
{SLOWER}
"""
"""An evaluation that takes some seconds, like those of real models, in this process and in those of jobs."""


def begin(cli: Cli, code: str, *words: object) -> subprocess.Popen[str]:
    with environment(cli.environment, []):
        return subprocess.Popen(
            [sys.executable, "-c", BEGIN + code, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process: subprocess.Popen[str], since: float) -> tuple[int, list[str], float]:
    _, err = process.communicate(timeout=30)
    return process.returncode, err.splitlines(), time.monotonic() - since


@pytest.mark.parametrize("delay_s", [0.1, 0.35, 0.7, *further(0.02, 0.05, 0.2, 0.5, 0.9, 1.1)])
def test_an_interrupt_at_any_moment_ends_without_a_traceback(stocked_on_disk: Cli, delay_s: float) -> None:
    process = begin(stocked_on_disk, START, "list")
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    code, lines, _ = ended(process, time.monotonic())
    if code == 0:
        assert lines == [], "it had ended already"
    elif delay_s >= 0.2:  # before, the interpreter itself may not be ready
        assert (code, lines) in ((130, ["interrupted"]), (-signal.SIGINT, [])), "a shell shows 130 for both"


@pytest.mark.long
@pytest.mark.parametrize("code", [STUCK, DESTRUCTOR], ids=["cleaning up for ever", "in a destructor"])
def test_an_interrupt_ends_what_is_stuck_within_two_seconds(stocked_on_disk: Cli, code: str) -> None:
    process = begin(stocked_on_disk, code + START, "pull", "acme/sql")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    exit_code, lines, seconds = ended(process, since)
    assert exit_code == 130
    assert len(lines) == 1
    assert lines[0].startswith("interrupted: fetched files are kept")
    assert seconds < 3, "two, and what a busy machine takes to end a process"


@pytest.mark.long
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_composition_of_a_server_goes_on_unless_it_is_interrupted_twice(
    stocked_on_disk: Cli, world: World, tmp_path: Path, again: bool
) -> None:
    home = stocked_on_disk
    for name in ("sql", "support"):
        home.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    inputs = [{"adapter": "acme/sql"}, {"adapter": "acme/support"}]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}))
    port = services.free_port()
    serving = begin(
        Cli({**home.environment, "ADAPTORY_LOOPBACK_OPEN": "true"}), START, "serve", "--no-worker", "--port", port
    )
    assert serving.stderr is not None
    assert "listening" in serving.stderr.readline()
    remote = Cli({"ADAPTORY_HOME": str(tmp_path / "client"), "ADAPTORY_URL": f"http://127.0.0.1:{port}"})
    process = begin(remote, START, "compose", recipe, "--follow")
    while not home.json("jobs")["items"]:
        time.sleep(0.05)
    time.sleep(0.5)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    if again:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    code, lines, seconds = ended(process, since)
    state = remote.json("jobs")["items"][0]["state"]
    serving.terminate()
    serving.communicate(timeout=30)
    assert code == 130
    lines = [line for line in lines if not line.startswith("registry: ")]
    assert lines.pop(0) == "job 1: queued, waits for a worker: none is running"
    assert len(lines) == 2
    assert "continues" in lines[0]
    assert "interrupt again to cancel it" in lines[0]
    assert lines[1].startswith("interrupted: composition 1 ")
    assert ("is cancelled" in lines[1], state) == ((True, "cancelled") if again else (False, "queued"))
    assert again or "adaptory cancel 1" in lines[1]
    assert seconds < 3


@pytest.mark.long
def test_on_a_terminal_a_composition_shows_its_steps_and_the_examples_that_are_done(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    for name in ("sql", "support"):
        stocked_on_disk.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    content = {"inputs": ["acme/sql", "acme/support"], "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}
    recipe.write_text(yaml.safe_dump({**content, "evaluate": ["sql-exact"], "gates": []}))
    shown = on_terminal(stocked_on_disk, "compose", recipe, code=SLOWLY)
    assert shown.end() == 0, shown.text
    assert re.search(r"3/6 evaluate .* [1-9]\d* of 18 examples", shown.text), shown.text
    assert not re.search(r"2/6 combine [^\r\n]*of 18", shown.text), "of a step without an amount none is shown"
    assert max(len(line.rstrip()) for line in shown.lines) <= 80


def test_an_interrupted_evaluation_ends_with_one_line_and_goes_on_where_it_was(
    stocked_on_disk: Cli, world: World
) -> None:
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    command = ("eval", "acme/sql", "--suite", "sql-exact", "--suite", "guard-exact")
    running = on_terminal(stocked_on_disk, *command, code=SLOWLY)
    running.read_until("6/12 examples")
    since = time.monotonic()
    running.interrupt()
    assert running.end() == 130
    assert time.monotonic() - since < 3, "two, and what a busy machine takes to end a process"
    assert running.lines[-1].startswith("interrupted: measurements are kept")
    assert "Traceback" not in running.text
    again = stocked_on_disk.ok(*command, "--json")
    assert re.search(r"resumed: ([6-9]|1\d) of 12 examples", again.err)
    assert [score["n"] for score in again.json["scores"]] == [6, 6, 6, 6]
    assert "resumed" not in stocked_on_disk.ok(*command).err, "what is complete is measured anew"


def test_an_interrupted_composition_of_this_process_is_cancelled(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    content = {"inputs": ["acme/sql"], "method": "stack", "adapter": "acme/copy:1.0.0", "probe": 0}
    recipe.write_text(yaml.safe_dump({**content, "evaluate": ["sql-exact"], "gates": []}))
    running = on_terminal(stocked_on_disk, "compose", recipe, code=SLOWLY)
    running.read_until(" examples")
    running.interrupt()
    assert running.end() == 130
    assert running.lines[-1].startswith("interrupted: composition 1 is cancelled")
    job = stocked_on_disk.json("jobs", "1")
    assert job["cancel_requested"]
    assert job["state"] in ("cancelled", "running"), (
        "a worker that did not stop in time leaves the rest to the next one"
    )
    assert stocked_on_disk("show", "acme/copy:1.0.0").code == 3


def test_nothing_is_shown_of_progress_without_a_terminal(stocked_on_disk: Cli, world: World, tmp_path: Path) -> None:
    pushed = stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert [line.partition(":")[0] for line in pushed.err.splitlines()] == ["registry"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"inputs": ["acme/sql"], "method": "stack", "adapter": "acme/copy:1.0.0", "probe": 0})
    )
    composed = stocked_on_disk.ok("compose", recipe)
    assert "..." not in composed.err
