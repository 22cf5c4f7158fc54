"""What a check says of a merge's result."""

from composer.checks.check import flushed_to_zero


def test_of_tensors_that_lose_equally_many_values_the_same_one_is_named_whatever_was_written_first() -> None:
    counts = {"b": 32, "a": 32, "c": 7}
    assert flushed_to_zero(counts) == flushed_to_zero(dict(reversed(counts.items())))
