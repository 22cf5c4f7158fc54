"""False proofs that pass: wrong adapters before the served check, and figures that somebody types.

.venv/bin/python -m benchmarks.proofs

- On a double of vLLM that applies something else than the release, in five ways: how many are proved.
- Scores, evidence and attestations that a publisher sends or forges: how many count as a worker's.

`python -m benchmarks.vllm` asks a real vLLM.
"""

import os
from collections import Counter
from pathlib import Path

from tests import services
from tests.scenarios.test_evidence import typed_by_a_publisher
from tests.scenarios.world import Cli, World, build_world
from tests.serving.test_served_check import LENGTHS, WRONG, checks


def measure_checks(world: World, home: Path) -> None:
    verdicts = Counter[tuple[str, str]]()
    for wrong, result in checks(("", *WRONG), LENGTHS, world.adapters["sql"], home / "served"):
        verdicts[wrong, result.verdict] += 1
    for (wrong, verdict), count in verdicts.items():
        print(f"  {wrong or 'the release'}: {verdict} {count} times")
    proved = sum(count for (wrong, verdict), count in verdicts.items() if wrong and verdict != "failed")
    print(f"{proved} of {len(WRONG) * len(LENGTHS)} wrong things pass the served check")


def measure_typed(world: World, home: Path) -> None:
    team = Cli({"ADAPTORY_HOME": str(home / "registry"), "ADAPTORY_USER": "mia"})
    team.ok("base", "add", world.base, "--name", "tiny")
    for name in ("sql", "terraform"):
        team.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    tried = typed_by_a_publisher(team, home)
    for what, why in tried:
        print(f"  {what}: {why or 'COUNTS'}")
    print(f"{sum(not why for _, why in tried)} of {len(tried)} typed things count as a worker's")


def main() -> None:
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    with services.without_pytest() as home:
        world = build_world(home / "world")
        measure_checks(world, home)
        measure_typed(world, home)


if __name__ == "__main__":
    main()
