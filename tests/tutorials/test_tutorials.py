"""Every command of the quick start and of the tutorials is run, in order, in a directory of its own.

By default with a model of 70,000 weights (tests/tutorials/small) under the names of examples/. `make test-long` runs
the longest pages too, and all of them with the real ones. What a page shows of the output must be printed, but for
numbers that were measured.
"""

import os
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import httpx2
import nbformat
import pytest
from nbclient import NotebookClient

from tests import services
from tests.eventually import eventually
from tests.tutorials.pages import Command, File, LeftOut, missing, steps
from tests.tutorials.shell import Shell, programs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SMALL = Path(__file__).parent / "small"
PAGES = ("quick-start.md", *sorted(f"tutorials/{path.name}" for path in (DOCS / "tutorials").glob("*.md")))
SHOWN = {"tutorials/demo.md": "what `make demo` prints, which is a program", "tutorials/in-python.md": "a notebook"}
"""Pages without commands of their own."""
LONGEST = (
    *("tutorials/compose-and-merge.md", "tutorials/gates.md", "tutorials/run-in-production.md"),
    *("tutorials/push-from-peft.md", "tutorials/release-and-roll-back.md", "tutorials/serve-with-vllm.md"),
)
PORT = "8470"
MAKE_BASE = "import shutil, sys\nshutil.copytree({small!r}, sys.argv[1])\n"


@pytest.fixture(scope="module")
def bin_directory(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with programs(tmp_path_factory.mktemp("programs")) as directory:
        yield directory


@pytest.fixture(params=["small", pytest.param("real", marks=pytest.mark.long)])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The reader's files: examples/, with small files under the names of the real ones or with these."""
    directory = tmp_path / "adaptory"
    ignored = shutil.ignore_patterns("__pycache__", "*.jsonl") if request.param == "real" else None
    shutil.copytree(ROOT / "examples", directory / "examples", ignore=ignored)
    shutil.copytree(ROOT / "examples" / "suites", directory / "examples" / "suites", dirs_exist_ok=True)
    if request.param == "small":
        shutil.rmtree(directory / "examples" / "adapters")
        shutil.copytree(SMALL / "adapters", directory / "examples" / "adapters")
        (directory / "examples" / "make_base.py").write_text(MAKE_BASE.format(small=str(SMALL / "base")))
    return directory


@pytest.fixture
def environment(bin_directory: Path, tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    kept = ("OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY", "LANG")
    path = f"{bin_directory}:{Path(sys.executable).parent}:/usr/bin:/bin"
    inherited = {name: os.environ[name] for name in kept if name in os.environ}
    no_hub = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # but that which a page names
    return inherited | no_hub | {"PATH": path, "HOME": str(home), "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def shell(checkout: Path, environment: dict[str, str]) -> Generator[Shell]:
    opened = Shell(checkout, environment)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(page, marks=pytest.mark.long) if page in LONGEST else page for page in PAGES if page not in SHOWN],
)
def test_every_command_of_a_page_does_what_the_page_says(name: str, shell: Shell, checkout: Path) -> None:
    port = str(services.free_port())
    ran = 0
    for step in steps(DOCS / name):
        if isinstance(step, File):
            (checkout / step.name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / step.name).write_text(step.text.replace(PORT, port))
        elif isinstance(step, Command):
            line = step.line.replace(PORT, port).replace("adaptory serve", f"adaptory serve --port {port}")
            code, printed = shell(line)
            wrong = missing(step.shown, printed.replace(port, PORT))
            assert (code, wrong) == (step.code, []), f"{name}: $ {step.line}\n{printed}"
            if "adaptory serve" in step.line:
                eventually(lambda: _is_ready(port))
            ran += 1
    assert ran > 3
    assert {path.name for path in checkout.iterdir()} == {"examples", ".demo"}, "git ignores .demo alone"


def _is_ready(port: str) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.long
def test_every_cell_of_the_notebook_runs(checkout: Path, environment: dict[str, str]) -> None:
    notebook = nbformat.read(DOCS / "tutorials" / "in-python.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == [], "it is kept without outputs"
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(checkout)}}, timeout=120
    )
    client.execute(env=environment)


def test_what_the_tests_leave_out_installs_or_starts_something_else() -> None:
    pages = [DOCS / name for name in PAGES if name not in SHOWN]
    assert {step.reason for page in pages for step in steps(page) if isinstance(step, LeftOut)} <= {
        "it installs packages",
        "it starts vLLM",
        "it needs PostgreSQL and a bucket",
    }
