"""The policy of a channel as a document: permitted content, and the position of an error."""

from pathlib import Path

import pytest

from registry.errors import Invalid
from registry.formats.channel_policy import of_rules, parse_policy, read_policy

EXAMPLE = Path(__file__).parents[3] / "examples" / "policies/prod.yaml"


def test_a_policy_is_the_same_after_it_was_kept() -> None:
    policy = parse_policy(EXAMPLE.read_text(), "policy")
    assert read_policy(policy.to_json(), "policy") == policy
    assert policy.to_json()["rules"][0] == {"rule": "sql-exact.accuracy >= 0.3", "min_n": 8}
    assert [policy.of_rule(row) for row in policy.rules] == [(8, False), (1, False)]


def test_gate_rules_alone_are_a_policy_that_refuses_what_lacks_a_score() -> None:
    assert of_rules(["a.nll <= 1"]).to_json() == {"version": 1, "missing": "refuse", "rules": ["a.nll <= 1"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: []", "policy: version: it is missing"),
        ("version: 2", "version: 2 is not 1, the version that this registry reads"),
        ("version: true", "version: True is not 1"),
        ("version: 1\nsoak: {channel: a}", "soak: a value of type dict is not a list"),
        ("version: 1\nsoak: [{channel: a, hours: 0}]", "soak[0].hours: 0 is not more than 0"),
        ("version: 1\nrule: [a]", "unknown field 'rule'. Did you mean rules?"),
        ("version: 1\nverdict: refuse", "verdict: 'refuse' is not one of ok"),
        ("version: 1\nmin_n: '3'", "min_n: '3' is not a whole number"),
        ("version: 1\nrules: [{rule: a.b>=1, least: 3}]", "rules[0]: unknown field 'least'"),
        ("version: 1\nlicenses: {refuse: [{}]}", "licenses.refuse[0]: it names no licence"),
        ("version: 1\nlicenses: {refuse: [{dat: x}]}", "licenses.refuse[0]: unknown field 'dat'"),
        ('version: 1\nlicenses: {allow: ["a\\0b"]}', "licenses.allow[0]: it is not a name"),
        ('version: 1\nlicenses: {refuse: [{data: "\\t"}]}', "licenses.refuse[0].data: it is not a name"),
        ("version: 1\nexpires_hours: .inf", "expires_hours"),
        ("version: 1\nexpires_hours: true", "expires_hours: True is not a number"),
        (f"version: 1\nlicenses: {{allow: [{'MIT, ' * 101}]}}", "licenses.allow: it has 101 entries"),
        ("[", "it is not YAML"),
        ("- 1", "a mapping"),
        ("# " + "x" * 50_001, "it is longer than"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_field(text: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_policy(text, "policy")
    assert (caught.value.code, words in str(caught.value)) == ("bad_channel_policy", True), str(caught.value)
