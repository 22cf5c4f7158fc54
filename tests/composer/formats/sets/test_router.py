"""The router of a set: which adapter answers a prompt."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from composer.formats.sets import router
from composer.formats.sets.adapter_set import AdapterSet, SetMember
from composer.formats.sets.python_router import to_python
from composer.formats.sets.router import BASE, MAX_CHARS, fit, separability

SQL = ["Write SQL: all orders of May", "Write SQL: users without orders", "Write SQL: sum of invoices by month"]
CRON = ["Cron line: each Monday at 9", "Cron line: hourly from 8 to 17", "Cron line: the first of a month"]
TALK = ["Tell me about otters.", "What is the capital of Chad?", "Name three colours."]
ROUTER = fit({"sql": SQL, "cron": CRON, BASE: TALK})
TEXT = st.text(max_size=60)
PROMPTS = st.dictionaries(st.sampled_from(["a", "b", "c", BASE]), st.lists(TEXT, min_size=1, max_size=4), min_size=1)


def test_an_unseen_prompt_goes_to_the_adapter_of_its_task():
    assert ROUTER.choose("Write SQL: products that nobody bought") == "sql"
    assert ROUTER.choose("Could you help me? Cron line: every Friday at noon. Thank you!") == "cron"
    assert ROUTER.choose("What is the capital of Peru?") == BASE


def test_a_prompt_that_shares_nothing_with_any_task_is_for_the_base():
    assert ROUTER.choose("") == ROUTER.choose("水曜日") == BASE
    assert fit({"sql": SQL}).choose("水曜日") == BASE


@given(PROMPTS, TEXT)
def test_any_prompt_gets_one_of_the_classes(prompts: dict[str, list[str]], prompt: str):
    made = fit(prompts)
    assert all(value > 0 for weights in made.weights.values() for value in weights.values())
    assert all(value >= 0 for value in made.similarities(prompt).values())
    assert made.choose(prompt) in {*prompts, BASE}


@given(PROMPTS, TEXT, st.integers(0, 99))
def test_the_order_of_prompts_and_classes_changes_no_similarity(prompts: dict[str, list[str]], prompt: str, seed: int):
    lots = random.Random(seed)
    shuffled = {name: lots.sample(given, len(given)) for name, given in lots.sample([*prompts.items()], len(prompts))}
    before, after = fit(prompts).similarities(prompt), fit(shuffled).similarities(prompt)
    assert all(abs(before[name] - after[name]) <= 1e-4 * (1 + before[name]) for name in prompts)


@given(st.text(min_size=MAX_CHARS, max_size=MAX_CHARS + 20), st.text(max_size=50))
def test_only_the_beginning_of_a_long_prompt_decides(prompt: str, more: str):
    assert list(router.ngrams(prompt + more)) == list(router.ngrams(prompt))


def test_case_and_spaces_do_not_matter():
    assert list(router.ngrams("  Write\n SQL ")) == list(router.ngrams("write sql"))


def test_tasks_with_their_own_words_are_separable_and_equal_prompts_are_not():
    assert separability({"sql": SQL, "cron": CRON}) == 1.0
    assert separability({"upper": TALK, "lower": TALK}) <= 0.5


@given(PROMPTS, st.lists(TEXT, max_size=4))
def test_the_router_as_a_program_chooses_as_the_router_does(prompts: dict[str, list[str]], asked: list[str]):
    names = [name for name in prompts if name != BASE] or ["a"]
    member = {"repository": "acme/x", "version": "1.0.0", "commit": "a" * 40}
    members = {name: SetMember.model_validate({**member, "repository": f"acme/{name}"}) for name in names}
    made = AdapterSet.of(members, fit({**{name: ["zzzz"] for name in names}, **prompts}))
    program: dict[str, Any] = {}
    exec(to_python(made), program)  # noqa: S102 - our own text
    right = {name: f"acme/{name}@1.0.0" for name in names}
    for prompt in asked:
        assert program["choose"](prompt) == right.get(made.routes.choose(prompt), BASE)
