"""The time of `adaptory --help` from a cold start, and the heavy modules that it must not load.

The floor is the interpreter itself. Exits 1 when a module is loaded that must not be: that is a fact, not a timing.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

FLOOR = "python -c pass"
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "boto3",
    "httpx2",
)
FRAMEWORKS = "import fastapi, httpx2, sqlalchemy.orm, typer"
"""What an embedded command stands on: no command that runs the service in its own process can start in less."""
HELP = (
    "import sys; sys.argv = ['adaptory', '--help']\n"
    "from registry.cli.start import load_commands\nload_commands()(standalone_mode=False)"
)
ALLOWED = {
    "adaptory --help": (HELP, ()),
    "import registry.api.app": ("import registry.api.app", ("fastapi", "starlette", "sqlalchemy")),
    "import registry.client.api": ("import registry.client.api", ("httpx2",)),
}
"""Modules that each command may load; everything else in HEAVY must stay out."""


def main() -> None:
    chosen = harness.options(__doc__, rounds=25)
    harness.announce("startup", "typer")
    cases = {
        FLOOR: lambda: harness.process([sys.executable, "-c", "pass"]),
        "python -c 'import typer'": lambda: harness.process([sys.executable, "-c", "import typer"]),
        "adaptory --help": lambda: harness.process([harness.ADAPTORY, "--help"]),
        "adaptory push --help": lambda: harness.process([harness.ADAPTORY, "push", "--help"]),
    }
    harness.report("Cold start, whole process", harness.interleave(cases, chosen.rounds), FLOOR, "ms")
    home = Path(tempfile.mkdtemp())
    listing = ["env", f"ADAPTORY_HOME={home}", harness.ADAPTORY, "list"]
    harness.process(listing)  # makes the registry
    embedded = {
        FRAMEWORKS: lambda: harness.process([sys.executable, "-c", FRAMEWORKS]),
        "adaptory list": lambda: harness.process(listing),
    }
    harness.report("An embedded command", harness.interleave(embedded, chosen.rounds), FRAMEWORKS, "ms")
    shutil.rmtree(home)
    rows = [["what", "heavy modules loaded", "not allowed"]]
    for what, (code, allowed) in ALLOWED.items():
        loaded = _loaded(code)
        rows.append([what, " ".join(loaded) or "none", " ".join(sorted({*loaded} - {*allowed})) or "none"])
    harness.table(f"Of {', '.join(HEAVY)}", rows)
    sys.exit(any(forbidden != "none" for _, _, forbidden in rows[1:]))


def _loaded(code: str) -> list[str]:
    """Heavy modules that a fresh process has loaded after running `code`."""
    program = f"{code}\nimport sys\nprint('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    word, *names = run.stdout.splitlines()[-1].split()
    assert word == "loaded", run.stdout
    return names


if __name__ == "__main__":
    main()
