"""The stages of a Dockerfile, whose commands run here as in an image: each in a directory of its own."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """Instructions in order, and the stage or image that they begin with."""

    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def read_stages(path: Path) -> dict[str, Stage]:
    """The stages by name. Supports only the syntax of our Dockerfile."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(parent)
        elif current is not None:
            current.instructions.append((word, rest))
    return stages


def command_of(stages: Mapping[str, Stage], name: str) -> list[str]:
    """The command of a container of that stage: its entry point and arguments."""
    said: dict[str, list[str]] = {}
    at: str | None = name
    while at in stages:
        for word, rest in stages[at].instructions:
            if word in ("ENTRYPOINT", "CMD"):
                said.setdefault(word, json.loads(rest))
        at = stages[at].parent
    return [*said["ENTRYPOINT"], *said["CMD"]]


def build(stages: Mapping[str, Stage], name: str, context: Path, directory: Path, prefix: Path) -> None:
    """Runs the commands of that stage and of those before it. `/src` of the image is `directory`, and PREFIX is
    `prefix`."""
    chain: list[Stage] = []
    at = name
    while at in stages:
        chain.insert(0, stages[at])
        at = stages[at].parent
    directory.mkdir(parents=True)
    values: dict[str, str] = {"PYTHON": "3"}
    for stage in chain:
        for word, rest in stage.instructions:
            if word in ("ARG", "ENV"):
                values |= dict(part.partition("=")[::2] for part in rest.split())
            elif word == "COPY":
                *sources, target = rest.split()
                _copy(context, sources, directory / target)
            elif word == "RUN":
                environment = {**os.environ, **values, "PREFIX": str(prefix)}
                environment.pop("PYTHONPATH", None)
                subprocess.run(["/bin/sh", "-c", rest], cwd=directory, env=environment, check=True, timeout=1500)
            else:
                assert word == "WORKDIR", f"{word} {rest}: this stage is not only built"


def _copy(context: Path, sources: list[str], target: Path) -> None:
    for source in sources:
        if (context / source).is_dir():
            shutil.copytree(context / source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(context / source, target)
