"""Sets of the study's adapters as JSON, each adapter with its suite: `python -m benchmarks.kept_sets DIR [A+B …]`.

Without names, the eight sets that a search was measured on. `DIR` has the adapters that examples/train.py makes. The
study's modules import torch, and the kernel counts a process's memory as that of the commands it starts: so this is a
process of its own.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, "examples")
    from optimize_sets import SETS
    from study_sets import adapter_and_task, suite_of

    directory, *wanted = sys.argv[1:]
    sets = [names.split("+") for names in wanted] or SETS
    made = [[adapter_and_task(Path(directory), name) for name in names] for names in sets]
    print(
        json.dumps(
            [[[str(path.resolve(strict=True)), suite_of(task).to_json()] for path, task in tasks] for tasks in made]
        )
    )


if __name__ == "__main__":
    main()
