"""Suites: permitted content, the fields that the digest depends on, and the positions of errors."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import InvalidFile
from composer.formats.recipes.suite import (
    MAX_FILE_BYTES,
    Contradiction,
    Example,
    Suite,
    contradicting_suites,
    guard_sets,
    parse_suite,
)

HEAD = "name: sql-exact\nkind: target\ndescription: one line\nchat: true\n"
EXAMPLES = Path(__file__).parents[3] / "examples" / "suites"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SUITES = st.builds(
    Suite,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True),
    kind=st.sampled_from(["target", "guard"]),
    description=TEXT,
    chat=st.booleans(),
    examples=st.lists(st.builds(Example, prompt=TEXT, completion=TEXT), min_size=1, max_size=6).map(tuple),
    ends=st.booleans(),
)


def write(directory: Path, text: str, lines: str = '{"prompt": "p", "completion": "c"}\n') -> Path:
    (directory / "sql-exact.jsonl").write_text(lines, encoding="utf-8")
    path = directory / "sql-exact.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_examples_come_from_the_file_beside_or_from_the_list_itself_with_one_digest(tmp_path: Path) -> None:
    beside = parse_suite(write(tmp_path, HEAD + "examples: sql-exact.jsonl\n"))
    inline = parse_suite(write(tmp_path, "examples: [{completion: c, prompt: p}]\n\n# reordered\n" + HEAD))
    assert (
        beside
        == inline
        == Suite(name="sql-exact", kind="target", description="one line", chat=True, examples=(Example("p", "c"),))
    )
    assert beside.digest == inline.digest


@given(SUITES)
def test_a_suite_survives_json_and_any_formatting_of_it(suite: Suite) -> None:
    document = json.loads(json.dumps(suite.to_json(), indent=3, sort_keys=True))
    assert Suite.from_json(document) == suite
    assert Suite.from_json(document).digest == suite.digest


@given(SUITES, SUITES)
def test_the_digest_is_the_same_exactly_when_the_content_is(one: Suite, other: Suite) -> None:
    assert (one.digest == other.digest) == (one == other)


@given(SUITES, st.integers(1, 8))
def test_a_larger_sample_contains_the_smaller_one(suite: Suite, count: int) -> None:
    sample = suite.sample(count)
    assert len(sample) == min(count, len(suite.examples))
    larger = list(suite.sample(count + 1))
    for example in sample:
        larger.remove(example)


@pytest.mark.parametrize(
    ("text", "lines", "problem"),
    [
        (HEAD, "", "examples: it is missing"),
        (HEAD + "examples: sql-exact.jsonl\nsuite: x\n", "", "unknown field 'suite'"),
        (HEAD + "examples: [\n", "", r"sql-exact\.yaml:6: not valid YAML"),
        ("- a list\n", "", "is not a mapping"),
        (
            HEAD.replace("sql-exact", "SQL exact") + "examples: sql-exact.jsonl\n",
            "{}",
            "name: .* is not NAME or NAMESPACE/NAME of",
        ),
        (
            HEAD.replace("target", "other") + "examples: sql-exact.jsonl\n",
            "{}",
            "kind: 'other' is not one of",
        ),
        (HEAD.replace("true", "maybe") + "examples: sql-exact.jsonl\n", "{}", "chat: 'maybe' is not true or false"),
        (HEAD + "examples: []\n", "", "examples: it has 0 entries, and at least 1 is needed"),
        (HEAD + "examples: 3\n", "", "examples: 3 is not a list"),
        (HEAD + "examples: ../sql-exact.jsonl\n", "", "outside the suite's directory"),
        (HEAD + 'examples: "a\\0b.jsonl"\n', "", "is not a valid file name"),
        (HEAD + 'examples: "\\uD800.jsonl"\n', "", "is not a valid file name"),
        (HEAD + "examples: other.jsonl\n", "", r"other\.jsonl cannot be read: No such file"),
        (
            HEAD + "examples: sql-exact.jsonl\n",
            '{"prompt": "p", "completion": "c"}\n\n{"prompt"\n',
            r"jsonl:3: not valid",
        ),
        (HEAD + "examples: sql-exact.jsonl\n", '\n{"prompt": "p"}\n', r"jsonl:2: completion: it is missing"),
        (
            HEAD + "examples: sql-exact.jsonl\n",
            '{"prompt": "p", "completion": ""}',
            r"jsonl:1: completion: '' is not text of at least 1 character",
        ),
        (
            HEAD + "examples: sql-exact.jsonl\n",
            '{"prompt": "\\ud800", "completion": "c"}',
            r"jsonl:1: prompt: .* is not text without",
        ),
        (HEAD + "examples: sql-exact.jsonl\n", "[" * 100_000, r"jsonl:1: not valid JSON"),
        (HEAD + "examples: sql-exact.jsonl\n", "9" * 5000, r"jsonl:1: not valid JSON: Exceeds the limit"),
        (HEAD + "examples: " + "[" * 5000, "", r"not valid YAML"),
        (HEAD.replace("one line", "2024-13-41") + "examples: []\n", "", r"not valid YAML: month must be"),
        (HEAD + "examples: [{prompt: p, completion: 3}]\n", "", "example 1: completion: 3 is not text"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_problem(tmp_path: Path, text: str, lines: str, problem: str) -> None:
    with pytest.raises(InvalidFile, match=problem) as caught:
        parse_suite(write(tmp_path, text, lines))
    assert "sql-exact" in caught.value.subject or "other.jsonl" in caught.value.subject


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "examples: sql-exact.jsonl\n", '{"prompt": "a\u2028b", "completion": "c"}\n')
    assert parse_suite(path).examples[0].prompt == "a\u2028b"


def test_a_file_that_is_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "examples: sql-exact.jsonl\n")
    (tmp_path / "sql-exact.jsonl").write_bytes(b'{"prompt": "p", "completion": "c"}\n\xff\xfe\n')
    with pytest.raises(InvalidFile, match=r"jsonl cannot be read: line 2 is not UTF-8"):
        parse_suite(path)
    with path.open("ab") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidFile, match=r"sql-exact\.yaml is larger than the 67,108,864 bytes"):
        parse_suite(path)


def test_an_unknown_key_is_shown_in_a_message_that_can_be_stored() -> None:
    for document in ({"\ud800": 1}, {"name": "a", "kind": "guard", "chat": True, "examples": [{"\ud800": 1}]}):
        with pytest.raises(InvalidFile) as caught:
            Suite.from_json(document)
        assert "ud800" in str(caught.value.message.encode())


DIGESTS = {
    "guard-general": "1feb19d8771cda4214ae02e50bb42626f05c35dfc52fe18b0944295290166ae4",
    "sql-exact": "8a5993ed4c10e0e032d28924d764004b2f6ca2a6212e4a794e1612b0fe4c5389",
    "support-exact": "03d235fb2e958da04919d35aedd0d1bc46425261fb5d1020dafa5e9c89471ebe",
    "terraform-exact": "988251f3c7b23ffbd79ace863eb25f6082e97db0b5cd49543e7e2866551f5770",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_suites_of_before_keep_their_digests(name: str) -> None:
    """Scores and locks name a suite by its digest: a field at its default is not in it."""
    assert parse_suite(EXAMPLES / f"{name}.yaml").digest == DIGESTS[name]


def test_a_suite_may_say_that_its_completions_do_not_end(tmp_path: Path) -> None:
    suite = parse_suite(write(tmp_path, HEAD + "ends: false\nexamples: sql-exact.jsonl\n"))
    ending = parse_suite(write(tmp_path, HEAD + "ends: true\nexamples: sql-exact.jsonl\n"))
    assert (suite.ends, suite.to_json()["ends"]) == (False, False)
    assert "ends" not in ending.to_json()
    assert suite.digest != ending.digest
    with pytest.raises(InvalidFile, match="ends: 1 is not true or false"):
        parse_suite(write(tmp_path, HEAD + "ends: 1\nexamples: sql-exact.jsonl\n"))


def of_examples(*pairs: tuple[str, str], chat: bool = True) -> Suite:
    examples = tuple(Example(prompt, completion) for prompt, completion in pairs)
    return Suite(name="s", kind="target", chat=chat, examples=examples)


def test_suites_that_ask_the_same_and_want_something_else_contradict_each_other() -> None:
    upper = of_examples(("a", "A"), ("b", "B"), ("c", "C"))
    lower = of_examples(("a", "a"), ("b", "B"), ("x", "x"), ("y", "y"))
    assert contradicting_suites({"up": upper, "low": lower}) == [Contradiction("up", "low", 2, 1, pytest.approx(1 / 3))]
    assert contradicting_suites({"up": upper, "again": upper}) == []
    asked_otherwise = of_examples(("a", "a"), chat=False)
    assert contradicting_suites({"up": upper, "plain": asked_otherwise}) == []
    either = of_examples(("a", "A"), ("a", "a"))
    assert contradicting_suites({"up": upper, "low": of_examples(("a", "a")), "either": either}) == [
        Contradiction("up", "low", 1, 1, 1.0)
    ]


def test_after_a_search_a_fit_takes_the_guards_examples_that_the_search_fitted_on() -> None:
    examples = tuple(Example(f"question {number}", "answer") for number in range(12))
    guard = Suite(name="general", kind="guard", chat=False, examples=examples)
    assert [used.count for used in guard_sets([guard])] == [6]
    assert [used.count for used in guard_sets([guard], {guard.digest: 2})] == [2]
    assert guard_sets([guard], {}) == [], "it is a member's suite"
