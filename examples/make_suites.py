"""Write the evaluation suites: `python examples/make_suites.py [DIR]`. Every run writes the same files."""

import argparse
import json
from pathlib import Path

import yaml
from tasks import TASKS, Task

SUITES = Path(__file__).parent / "suites"
FOR_EDITORS = "# yaml-language-server: $schema=../../docs/schemas/suite.schema.json\n"


def render(task: Task) -> dict[str, str]:
    """File name -> text of one suite: its description (YAML) and its examples (JSON lines)."""
    description = {
        "name": task.suite,
        "kind": task.kind,
        "description": task.description,
        "chat": True,
        "examples": f"{task.suite}.jsonl",
    }
    _, held_out = task.split()
    lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in held_out]
    return {
        f"{task.suite}.yaml": FOR_EDITORS + yaml.safe_dump(description, sort_keys=False, width=120),
        f"{task.suite}.jsonl": "".join(lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the evaluation suites of the example tasks.")
    parser.add_argument("directory", type=Path, nargs="?", default=SUITES)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        for name, text in render(task).items():
            (directory / name).write_text(text)
            print(directory / name)


if __name__ == "__main__":
    main()
