"""A search on a real, tiny model. Each member's suite has the member's own answers."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from composer.conflicts.evidence.outcome import Limits
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Interrupted, Mismatch, NotSupported
from composer.evaluation.generation import generate
from composer.evaluation.measure import encode, measure
from composer.evaluation.model import LoadedModel, load_model
from composer.findings import Verdict
from composer.formats.recipes.suite import Example, Kind, Suite, example_digest
from composer.formats.recipes.weights import Weight, parse_rule
from composer.methods.combine import combine_parsed
from composer.optimize.candidates import PLAIN_FIT, Candidate
from composer.optimize.optimize import expected_passes, optimize
from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem
from composer.optimize.report import OptimizeReport, accepted
from tests.composer.small_model import Load, load_adapter, save_llama, scaled
from tests.device import DEVICE

EFFORT = SearchEffort(search=4, confirm=8, thorough=True)
QUICK = SearchEffort(search=2, confirm=2, thorough=True)


AS_SET = "members with a router"


def suite_of(loaded: LoadedModel, adapter: LoadedAdapter, topic: str, kind: Kind = "target", count: int = 16) -> Suite:
    prompts = [f"{topic} {number}" for number in range(count)]
    answers = [generate(loaded, prompt, chat=False, deltas=adapter.deltas, max_new_tokens=4) for prompt in prompts]
    examples = tuple(Example(prompt, answer or "none") for prompt, answer in zip(prompts, answers, strict=True))
    return Suite(name=topic, kind=kind, chat=False, ends=False, examples=examples)


@pytest.fixture(scope="module")
def problem(loaded: LoadedModel, load: Load) -> SearchProblem:
    red, blue = (scaled(load(name, seed), 0.7, name) for name, seed in (("red", 1), ("blue", 2)))
    members = [
        SearchMember(adapter=red, suite=suite_of(loaded, red, "red")),
        SearchMember(adapter=blue, suite=suite_of(loaded, blue, "blue")),
    ]
    guard = suite_of(loaded, red, "guard", "guard")
    loose = Limits(loss=100.0, answers=0.0, guard=100.0)
    return SearchProblem(load=lambda: loaded, members=members, guards=[guard], limits=loose, effort=EFFORT)


@pytest.fixture(scope="module")
def report(problem: SearchProblem) -> OptimizeReport:
    return optimize(problem)


def decided(report: OptimizeReport) -> dict[str, object]:
    """The common results of two runs of one search: all except the time and the passes."""
    return {name: value for name, value in report.to_json().items() if name not in ("seconds", "run")}


def test_the_choice_is_the_best_of_the_search_that_keeps_the_limits_on_unseen_examples(
    report: OptimizeReport, problem: SearchProblem
) -> None:
    assert report.choice is report.best[0].candidate
    assert len({standing.candidate.name for standing in report.best}) == len(report.best) >= 3
    assert {standing.outcome.k for standing in report.best} == {8}
    assert "mean" in {trial.candidate.name for trial in report.tried}
    assert report.passes <= expected_passes(problem) + 3 * 8 * len(problem.splits), "but for what a surface proposes"
    assert report.passes >= 0.8 * expected_passes(problem)


@pytest.mark.long
def test_the_report_is_json_and_names_the_examples_that_were_seen(
    report: OptimizeReport, problem: SearchProblem
) -> None:
    said = json.loads(json.dumps(report.to_json()))
    assert said["choice"]["method"] == report.choice.method  # pyright: ignore[reportOptionalMemberAccess]
    seen = {row["suite"]: row["examples"] for row in said["searched"]}
    for suite in (*(member.suite for member in problem.members), *problem.guards):
        assert seen[suite.name] == [example_digest(example) for example in suite.sample(4)]


@pytest.mark.long
def test_a_fit_is_never_scored_on_an_example_that_it_has_seen(problem: SearchProblem, tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    optimize(problem, journal=journal)
    halves = {
        digest: [{example_digest(example) for example in half} for half in (split.search[:2], split.search[2:])]
        for digest, split in problem.splits.items()
    }
    rows = [row for line in journal.read_text().splitlines()[1:] for row in json.loads(line)]
    scored = [(who, suite, example) for who, suite, example, *_ in rows if who.endswith(" half")]
    assert scored
    for who, suite, example in scored:
        fitted_on = halves[suite][0 if who.endswith("first half") else 1]
        assert example not in fitted_on


@pytest.mark.long
def test_a_search_resumes_from_any_part_of_its_journal_with_the_same_choice(
    problem: SearchProblem, report: OptimizeReport, tmp_path: Path
) -> None:
    journal = tmp_path / "search.jsonl"
    optimize(problem, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    passes: list[int] = []
    for kept in (1, len(lines) // 3, 2 * len(lines) // 3, len(lines)):
        journal.write_text("".join(lines[:kept]) + '["torn')
        again = optimize(problem, journal=journal)
        assert decided(again) == decided(report)
        passes.append(again.run)
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 0


@pytest.mark.long  # a further way to get half a journal
def test_an_interrupted_search_goes_on_where_it_was(
    problem: SearchProblem, report: OptimizeReport, tmp_path: Path
) -> None:
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if sum(done) > 60:
            raise Interrupted

    with pytest.raises(Interrupted):
        optimize(problem, journal=tmp_path / "search.jsonl", progress=stop)
    again = optimize(problem, journal=tmp_path / "search.jsonl")
    assert decided(again) == decided(report)
    assert again.run < report.run


def test_a_fit_that_keeps_every_limit_beyond_doubt_is_taken_before_anything_is_raced(
    problem: SearchProblem, report: OptimizeReport
) -> None:
    quick = optimize(replace(problem, effort=replace(EFFORT, thorough=False)))
    assert quick.choice is not None
    assert [standing.candidate.name for standing in quick.best] == [PLAIN_FIT, "mean", AS_SET]
    assert quick.choice.name == PLAIN_FIT
    assert quick.tried == ()
    assert 2 * quick.passes < report.passes


def test_two_of_the_same_adapter_are_averaged(problem: SearchProblem, loaded: LoadedModel) -> None:
    red = problem.members[0]
    twin = SearchMember(adapter=replace(red.adapter, name="twin"), suite=suite_of(loaded, red.adapter, "crimson"))
    tight = replace(problem, members=[red, twin], guards=[], limits=Limits(loss=0.1, answers=0.9))
    result = optimize(tight)
    assert result.choice is not None
    assert result.choice.name == "mean"
    assert result.best[0].worst_kept == pytest.approx(1.0, abs=1e-3)


def test_if_nothing_fits_there_is_no_choice_and_the_best_are_shown(problem: SearchProblem) -> None:
    impossible = optimize(replace(problem, limits=Limits(loss=-100.0, answers=0.0)))
    assert impossible.choice is None
    assert impossible.best
    assert {standing.verdict for standing in impossible.best} == {Verdict.WARN}
    assert "ties_svd x 0.7" in {trial.candidate.name for trial in impossible.tried}, "full space is the last resort"
    headline = str(impossible.to_json()["headline"])
    best = max((row for row in impossible.best if not row.candidate.is_set), key=lambda row: row.worst)
    nearest = f"the best is {re.escape(best.candidate.name)}, whose worst member keeps .+: (red|blue) loses"
    assert re.match(rf"nothing fits: no combination of \d+ keeps the limits; {nearest}", headline)
    assert headline.endswith("nats a token, -100.00 allowed")
    offers = " ".join(cast("list[str]", impossible.to_json()["offers"]))
    assert "phrase: TEXT" in offers
    assert "A set" not in offers, "it breaks the limits too"


def test_an_acceptance_takes_the_best_that_breaks_a_limit_and_the_report_says_which(
    problem: SearchProblem, loaded: LoadedModel
) -> None:
    red, impossible = problem.members[0], Limits(loss=-100.0, answers=0.0)
    twin = SearchMember(adapter=replace(red.adapter, name="twin"), suite=suite_of(loaded, red.adapter, "crimson"))
    alike = replace(problem, members=[red, twin], guards=[], limits=impossible)
    accepting = replace(EFFORT, accept="worst >= 0.9")
    taken = optimize(replace(alike, effort=accepting))
    best = max((row for row in taken.best if not row.candidate.is_set), key=lambda row: row.worst)
    assert taken.choice == best.candidate
    assert best.verdict is Verdict.WARN
    assert re.fullmatch(
        r"accepted \(worst >= 0.9; it is (0.99|1.00)\) although the input of (red|crimson) loses .+ allowed",
        taken.accepted,
    )
    assert taken.to_json()["accepted"] == taken.accepted
    assert taken.to_json()["headline"] == f"one adapter: {best.candidate.name}, {taken.accepted}"
    kept = optimize(replace(alike, limits=problem.limits, effort=accepting))
    assert kept.accepted == "", "nothing is broken"
    chosen = next(row for row in kept.best if row.candidate == kept.choice)
    unsure = replace(chosen, verdict=Verdict.UNDECIDED, excess=0.1)
    better = replace(unsure, candidate=replace(chosen.candidate, name="another"))
    assert accepted([better, unsure], unsure.candidate, "worst >= 0.5", problem.limits) is unsure
    different = optimize(replace(problem, limits=impossible, effort=accepting))
    assert (different.choice, different.accepted) == (None, "")


def test_members_that_answer_the_same_prompts_differently_are_not_raced(problem: SearchProblem) -> None:
    red, blue = problem.members
    examples = tuple(replace(example, completion="another") for example in red.suite.examples)
    other = Suite(name="blue", kind="target", chat=False, ends=False, examples=examples)
    tight = Limits(loss=-100.0, answers=0.0)
    result = optimize(replace(problem, members=[red, replace(blue, suite=other)], limits=tight))
    assert (result.choice, result.tried) == (None, ())
    assert [row.candidate.name for row in result.best] == [PLAIN_FIT, f"{PLAIN_FIT}, with phrases", "mean", AS_SET]
    headline = str(result.to_json()["headline"])
    assert headline.startswith("nothing fits: 16 of 16 shared prompts have other answers; the best is ")
    assert result.to_json()["offers"] == ["Serve them separately, and name the adapter in each request."]


def test_a_budget_ends_the_search_and_the_best_so_far_are_confirmed(problem: SearchProblem) -> None:
    short = optimize(replace(problem, effort=replace(EFFORT, passes=1)))
    assert {trial.k for trial in short.tried} == {2}
    assert {standing.outcome.k for standing in short.best} == {8}


@pytest.mark.long
def test_a_search_with_a_budget_resumes_with_the_same_choice_and_stops_where_it_would_have(
    problem: SearchProblem, tmp_path: Path
) -> None:
    journal = tmp_path / "search.jsonl"
    limited = replace(problem, effort=replace(EFFORT, passes=90))
    fresh = optimize(limited, journal=journal)
    assert {trial.k for trial in fresh.tried} == {2}, "the second round would have been beyond the budget"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert decided(optimize(limited, journal=journal)) == decided(fresh)


def test_weights_between_the_tried_ones_are_tried_as_a_family_of_their_own(report: OptimizeReport) -> None:
    refined = [trial.candidate for trial in report.tried if trial.candidate.family == "refined"]
    assert refined
    assert all(candidate.method == "stack" for candidate in refined)
    sums = [trial.candidate.factors for trial in report.tried if trial.candidate.is_weighted_sum]
    assert len(set(sums)) == len(sums), "none is tried twice"


@pytest.mark.long
def test_the_members_own_weights_and_rules_are_part_of_what_is_chosen(problem: SearchProblem) -> None:
    """With factors 2 and 4, weights of a half and a quarter equal those of the plain adapters."""
    red, blue = problem.members
    rule = parse_rule("*v_proj=0.25")
    weights = Weight(0.5), Weight(0.25, (rule,))
    members = [replace(one, weight=weight) for one, weight in zip((red, blue), weights, strict=True)]
    plain = Candidate(name="plain", family="given", method="stack", factors=(1.0, 1.0))
    undone = replace(plain, name="undone", factors=(2.0, 4.0))
    effort = QUICK
    own = optimize(replace(problem, members=members, effort=effort), [undone])
    reference = optimize(replace(problem, effort=effort), [plain])

    def kept(result: OptimizeReport, name: str) -> float:
        return next(trial.worst_kept for trial in result.tried if trial.candidate.name == name)

    assert kept(own, "undone") == pytest.approx(kept(reference, "sum"), abs=1e-4)
    assert kept(own, "sum") != pytest.approx(kept(reference, "sum"), abs=1e-4)


@pytest.mark.long
def test_a_rank_that_the_recipe_asks_for_holds_for_every_candidate(problem: SearchProblem) -> None:
    asked = {"rank": 3, "tied": "untie", "protect": [1]}
    result = optimize(replace(problem, settings=asked, effort=QUICK))
    assert len(result.tried) > 8
    for trial in result.tried:
        assert (trial.candidate.settings["rank"], trial.candidate.settings["tied"]) == (3, "untie")
    protecting = [trial.candidate.settings for trial in result.tried if trial.candidate.family == "protect"]
    assert {tuple(settings["protect"]) for settings in protecting} == {(1,), (2,)}  # pyright: ignore[reportArgumentType]


def test_adapters_of_a_tied_embedding_are_searched_as_they_are_merged(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "tied", tied=True)
    loaded = load_model(base, device=DEVICE)
    adapters = [
        replace(load_adapter(base, tmp_path / name, seed, target_modules=["embed_tokens", "q_proj"]), name=name)
        for seed, name in enumerate(("red", "blue"), start=1)
    ]
    members = [
        SearchMember(adapter=adapter, suite=suite_of(loaded, adapter, adapter.name, count=4)) for adapter in adapters
    ]
    loose = Limits(loss=100.0, answers=0.0)
    settings = {"tied": "untie"}
    result = optimize(
        SearchProblem(
            load=lambda: loaded,
            members=members,
            limits=loose,
            effort=QUICK,
            settings=settings,
        )
    )
    assert result.choice is not None
    assert result.choice.settings["tied"] == "untie"
    combined = combine_parsed(adapters, result.choice.weights([Weight()] * 2), result.choice.parsed, None).deltas
    first = members[0].suite
    unseen = [example for example in first.sample(4) if example not in first.sample(2)]
    measured = measure(loaded, [encode(loaded, example, chat=False, ends=False) for example in unseen], combined)
    nats = sum(example.nats for example in measured) / sum(example.tokens for example in measured)
    assert result.best[0].outcome.effects[0].combined == pytest.approx(nats, abs=1e-4)


def test_few_unseen_examples_confirm_nothing(problem: SearchProblem) -> None:
    members = [
        replace(member, suite=Suite(**{**member.suite.content, "examples": member.suite.sample(10)}))  # pyright: ignore[reportArgumentType]
        for member in problem.members
    ]
    few = optimize(replace(problem, members=members, effort=SearchEffort(search=4, confirm=4)))
    assert "not confirmed: only 6 unseen examples" in str(few.to_json()["headline"])


def test_an_undecided_confirmation_goes_on_with_more_examples(problem: SearchProblem) -> None:
    (first, *_) = optimize(replace(problem, effort=SearchEffort(search=2, confirm=4))).best
    assert first.unseen == 8, "four decide nothing, eight do"
    assert optimize(replace(problem, limits=Limits(loss=-100.0))).best[0].unseen == 8, "the harm is sure"


def test_a_choice_with_too_few_answers_is_measured_on_all_unseen_ones_and_says_how_many_would_decide(
    problem: SearchProblem,
) -> None:
    red = problem.members[0]
    twins = [red, replace(red, adapter=replace(red.loaded, name="red again"))]
    limits = replace(problem.limits, answers=0.9)
    few = optimize(replace(problem, members=twins, limits=limits, effort=SearchEffort(search=4, confirm=4)))
    (offer,) = cast(list[str], few.to_json()["offers"])
    assert re.search(r"Add examples to red .* 90% of its exact matches: it keeps 11 of 11, and 29 would do", offer)
    assert (few.best[0].verdict, few.best[0].unseen) == (Verdict.UNDECIDED, 12)


@pytest.mark.long
def test_what_the_recipe_says_is_a_candidate_too(problem: SearchProblem) -> None:
    own = Candidate(name="as given", family="given", method="ctm_mean", factors=(1.0, 1.0))
    result = optimize(replace(problem, effort=QUICK), [own])
    assert "as given" in {trial.candidate.name for trial in result.tried}


def test_a_search_needs_two_members(problem: SearchProblem) -> None:
    with pytest.raises(Mismatch, match="at least two members"):
        optimize(replace(problem, members=problem.members[:1]))
    with pytest.raises(Mismatch, match="different names"):
        optimize(replace(problem, members=[problem.members[0]] * 2))
    with pytest.raises(Mismatch, match="red has the weight -1"):
        optimize(replace(problem, members=[replace(problem.members[0], weight=Weight(-1.0)), problem.members[1]]))


def test_a_guard_that_is_a_members_suite_or_named_twice_counts_once(problem: SearchProblem) -> None:
    (guard,) = problem.guards
    doubled = replace(
        problem,
        guards=[guard, problem.members[0].suite, guard],
        effort=QUICK,
    )
    assert [guard.suite for guard in optimize(doubled).best[0].outcome.guards] == ["guard"]


def test_a_given_fit_is_scored_on_examples_that_it_has_not_seen_however_many_it_asks_for(
    problem: SearchProblem, tmp_path: Path
) -> None:
    own = Candidate(name="own", family="given", method="regmean", factors=(1.0, 1.0), settings={"examples": 8})
    optimize(
        replace(problem, effort=QUICK),
        [own],
        journal=tmp_path / "search.jsonl",
    )
    rows = [row for line in (tmp_path / "search.jsonl").read_text().splitlines()[1:] for row in json.loads(line)]
    assert {who[-4:] for who, *_ in rows if re.match(r'\["regmean",\d+,{}', who)} == {"half"}


def test_an_adapter_without_factors_leaves_the_methods_that_need_them_out(
    problem: SearchProblem, load: Load, loaded: LoadedModel
) -> None:
    dora = scaled_dora(load)
    members = [problem.members[0], SearchMember(adapter=dora, suite=suite_of(loaded, dora, "dora"))]
    result = optimize(replace(problem, members=members, guards=[], effort=QUICK))
    assert result.best
    assert {"iso", "tsv"} <= result.left_out.keys()


def scaled_dora(load: Load) -> LoadedAdapter:
    return replace(load("dora", 3, use_dora=True), name="dora")


@pytest.mark.long
def test_evolved_weights_are_tried_when_asked_and_a_resumed_search_asks_for_the_same(
    problem: SearchProblem, tmp_path: Path
) -> None:
    evolving = replace(problem, effort=replace(EFFORT, evolve=7))
    journal = tmp_path / "search.jsonl"
    first = optimize(evolving, journal=journal)
    evolved = [trial.candidate for trial in first.tried if trial.candidate.family == "evolved"]
    assert len(evolved) >= 1
    assert len({candidate.factors for candidate in evolved}) == len(evolved)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: 3 * len(lines) // 4]))
    again = optimize(evolving, journal=journal)
    assert decided(again) == decided(first)
    assert 0 < again.run < first.run
    assert expected_passes(evolving) > expected_passes(problem)


def test_evolving_weights_without_the_package_is_refused_before_anything_is_measured(
    problem: SearchProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(NotSupported, match="extra `optimize`"):
        optimize(replace(problem, effort=replace(EFFORT, evolve=7)))


def test_a_choice_is_measured_on_unseen_prompts_in_other_words_where_suites_are_chats(
    problem: SearchProblem, report: OptimizeReport
) -> None:
    red, blue = problem.members
    chat = Suite(**{**red.suite.content, "chat": True})  # pyright: ignore[reportArgumentType]
    problem.load().tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    mixed = replace(problem, members=[replace(red, suite=chat), blue], guards=[], effort=QUICK)
    result = optimize(mixed)
    problem.load().tokenizer.chat_template = None
    (effect,) = result.reworded
    assert (effect.member, effect.examples) == ("red", 14)
    unseen = mixed.splits[chat.digest]
    assert unseen.reworded is not None
    for example, wrapped in zip(unseen.confirm, unseen.reworded.examples, strict=True):
        assert example.prompt in wrapped.prompt != example.prompt
        assert example.completion == wrapped.completion
    said = json.loads(json.dumps(result.to_json()))["reworded"]
    assert [row["member"] for row in said] == ["red"]
    assert report.reworded == (), "a prefix of plain text is not reworded"
