"""Values by patterns of module paths: as PEFT finds them, however many patterns there are."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.formats.adapters.config.by_path import ByPath

PARTS = st.sampled_from(["a", "b", "ab", "q_proj", "0", "10", "1"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
BETWEEN = st.sampled_from([".", r"\.", "..", "", "_", ".*", r".*\.", "[ab]", "(a|b)"])
PATTERNS = st.tuples(
    st.sampled_from(["", "", "^"]),
    st.lists(st.tuples(PARTS, BETWEEN), min_size=1, max_size=4).map(lambda rows: "".join(map("".join, rows))),
    st.sampled_from(["", "$"]),
).map("".join)


@given(st.lists(PATTERNS, max_size=6, unique=True), st.lists(PATHS, min_size=1, max_size=4))
def test_the_first_pattern_that_peft_would_take_decides(patterns: list[str], paths: list[str]) -> None:
    values = ByPath({pattern: number for number, pattern in enumerate(patterns)})
    held = [
        [number for number, pattern in enumerate(patterns) if re.match(rf"(.*\.)?({pattern})$", path)] for path in paths
    ]
    assert [values.first(path, None) for path in paths] == [next(iter(own), None) for own in held]
    used = {number for own in held for number in own}
    assert values.unused(paths) == [pattern for number, pattern in enumerate(patterns) if number not in used]


def test_it_reads_as_the_mapping_that_it_was_made_of() -> None:
    values = ByPath({"b": 1, "a.*": 2, "a": 3})
    assert (list(values.items()), len(values), values["a"]) == ([("b", 1), ("a.*", 2), ("a", 3)], 3, 3)


@pytest.mark.long
def test_a_rank_for_each_of_twenty_thousand_modules_is_found() -> None:
    """Compared one by one that would be 400 million times, which no test would see the end of."""
    paths = [f"model.layers.{n // 100}.mlp.experts.{n % 100}.up_proj" for n in range(20_000)]
    values = ByPath({path: number for number, path in enumerate(paths)})
    assert [values.first(path, None) for path in paths] == [*range(20_000)]
    assert values.unused(paths[1:]) == paths[:1]
