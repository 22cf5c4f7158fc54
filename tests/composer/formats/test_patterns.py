"""Untrusted patterns: the answers of `re`, without its cost."""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from composer.formats.adapters.config.patterns import compiled, matches_end, matches_fully

CHARACTERS = st.sampled_from(["a", "b", "_", ".", r"\.", "[ab]", "[^a.]", r"\w", r"\W", r"[\d_]"])
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{2,}"])
BOUNDARIES = st.sampled_from(["^", "$", r"\b", r"\B"])
GROUPS = st.sampled_from(["({})", "(?:{})", "({})?", "(?={})", "(?!{})"])
PATTERNS = st.recursive(
    st.one_of(st.tuples(CHARACTERS, REPEATS).map("".join), BOUNDARIES),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.tuples(GROUPS, st.lists(inner, min_size=1, max_size=3).map("|".join)).map(lambda two: two[0].format(two[1])),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("ab_.", max_size=7))
def test_a_pattern_matches_what_re_would_match(pattern: str, text: str) -> None:
    assert matches_fully(pattern, text) is bool(re.fullmatch(pattern, text))
    assert matches_end(pattern, text) is bool(re.match(rf"(.*\.)?({pattern})$", text))


@given(st.text(r"ab.*+?{}[]()|\\^$1,<=!:", max_size=12), st.text("ab.1", max_size=6))
def test_whatever_is_not_refused_matches_as_in_re(pattern: str, text: str) -> None:
    try:
        compiled(pattern)
    except ValueError:
        assume(False)
    assert matches_fully(pattern, text) is bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r".*?\." * 4 + "x", "." * 200),
        (".*" * 6 + "x", "a" * 200),
        ("(?:ab|ab)" * 100 + "[xz]", "ab" * 100 + "y"),
        ("a?" * 100 + "a" * 100 + "b", "a" * 100),
        ("(?=.*.*x)" * 100, "a" * 1000),
    ],
)
def test_no_pattern_freezes(pattern: str, text: str) -> None:
    """Each would occupy `re` for seconds to centuries."""
    began = time.process_time()
    assert not matches_end(pattern, text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "bounded"),
    [(".{1001}", ".{1000}"), ("(?=.{999})" * 99, "(?=.{10})" * 99), ("a{0,600}|b{600,}", "a{0,600}|b{400,}")],
)
def test_repeats_that_add_up_to_too_many_are_refused(pattern: str, bounded: str) -> None:
    compiled(bounded)
    with pytest.raises(ValueError, match="add up to more than 1000"):
        compiled(pattern)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r".*\.q_proj", "model.layers.0.self_attn.q_proj"),
        (r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)", "decoder.block.0.layer.0.SelfAttention.q"),
        (r"^(?!.*vision_tower).*language_model.*\.(q_proj|v_proj)", "language_model.model.layers.0.self_attn.q_proj"),
        (r"^(model\.language_model(?=\.).*\.(q_proj|k_proj))$", "model.language_model.layers.0.self_attn.k_proj"),
        (
            r"(?:.*?(?:vision|language).*?(?:attn|mlp).*?(?:q_proj|fc1).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up)",
            "model.language_model.layers.10.self_attn.q_proj",
        ),
    ],
)
def test_what_peft_users_write_is_understood(pattern: str, text: str) -> None:
    assert matches_fully(pattern, text)
    assert not matches_fully(pattern, "model.vision_tower.layers.0.norm")
