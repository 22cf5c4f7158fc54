"""Options that commands of several subjects have."""

from pathlib import Path
from typing import Annotated

import typer

from registry.formats.priority import Priority

StrictFlag = Annotated[bool, typer.Option("--strict", help="Make warnings errors: nothing is written or published.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
BaseDir = Annotated[Path | None, typer.Option("--base-dir", help="Directory of the base's weights on this machine.")]
PriorityOption = Annotated[
    Priority | None,
    typer.Option("--priority", help="Priority among the jobs of its namespace; high needs the role releaser there."),
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        "--memory-bytes", min=0, help="Device memory that the job needs, if not the size of its largest base."
    ),
]


def wishes(priority: Priority | None, memory_bytes: int | None) -> dict[str, str | int]:
    """The fields of a request for a job: those that are given, since an older server does not know them."""
    given = {"priority": priority.value if priority else None, "memory_bytes": memory_bytes}
    return {name: value for name, value in given.items() if value is not None}
