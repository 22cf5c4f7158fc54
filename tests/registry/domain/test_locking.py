"""The choice of a search in a lock."""

from dataclasses import replace

from composer.formats.recipes.lock import Lock, LockedInput
from composer.formats.recipes.weights import Weight, parse_rule
from registry.domain.compositions.locking import SearchChoice, with_choice

RULE = parse_rule("0-9=0.4")
INPUTS = tuple(
    LockedInput(repository=f"acme/{name}", version="1.0.0", commit="0" * 40, weight=0.5, files={}, rules=rules)
    for name, rules in (("sql", (RULE,)), ("support", ()))
)
LOCK = Lock(base="b" * 64, method="mean", settings={}, dtype=None, inputs=INPUTS, gates=("sql.nll <= 1",))
SETS = ({"suite": "sql", "suite_digest": "c" * 64, "examples": ["d" * 64]},) * 2


def test_the_chosen_factors_multiply_weights_and_rules_and_the_evidence_is_no_part_of_the_digest() -> None:
    choice = SearchChoice(
        method="regmean",
        settings={"steps": 1},
        factors=(0.5, 2.0),
        calibration=SETS,
        evidence={"seed": 0},
    )
    lock = with_choice(LOCK, choice)
    assert [source.weighted for source in lock.inputs] == [Weight(0.5, (RULE,)).times(0.5), Weight(1.0)]
    assert (lock.method, lock.settings["steps"], lock.settings["examples"]) == ("regmean", 1, 4)
    assert (lock.calibration, lock.gates) == (SETS, LOCK.gates)
    again = Lock.from_json(lock.to_json())
    assert (again, again.optimized) == (lock, choice.evidence)
    assert lock.digest == with_choice(LOCK, replace(choice, evidence={})).digest
    assert "optimized" not in LOCK.to_json()
