"""Two models compared example by example: valid intervals, and verdicts that follow from them."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from composer.evaluation.measure import ratio
from composer.evaluation.paired import compare_losses, compare_scores, describe, share_difference_interval

COUNTS = some.tuples(some.integers(0, 60), some.integers(0, 60), some.integers(1, 200))


@given(COUNTS)
def test_the_interval_of_two_shares_excludes_0_exactly_if_mcnemars_test_finds_a_difference(
    counts: tuple[int, int, int],
) -> None:
    gained, lost, same = counts
    low, high = share_difference_interval(gained, lost, gained + lost + same)
    assert -1 <= low <= (gained - lost) / (gained + lost + same) <= high <= 1
    mcnemar = abs(gained - lost) / sqrt(gained + lost) if gained + lost else 0.0
    assert (low > 0 or high < 0) == (mcnemar > 1.959964)
    mirrored = share_difference_interval(lost, gained, gained + lost + same)
    assert mirrored == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 44), (1, 0, 30), (0, 0, 25), (30, 31, 70), (5, 20, 200)])
def test_the_interval_ends_where_the_score_test_begins_to_reject(gained: int, lost: int, n: int) -> None:
    """The likeliest share of losses under a true difference is found by search, not by Tango's closed form."""
    for true in share_difference_interval(gained, lost, n):
        losses = np.linspace(max(0, -true), (1 - true) / 2, 200_001)[1:-1]
        likelihood = gained * np.log(losses + true) + lost * np.log(losses)
        likelihood += (n - gained - lost) * np.log(1 - 2 * losses - true)
        share = float(losses[likelihood.argmax()])
        distance = abs(gained - lost - n * true) / sqrt(n * (2 * share + true * (1 - true)))
        assert distance == pytest.approx(1.959964, abs=2e-3)


@pytest.mark.parametrize(("gains", "losses", "n"), [(0.1, 0.05, 120), (0.02, 0.02, 60), (0.3, 0.2, 30)])
def test_the_interval_of_two_shares_holds_the_truth_about_95_times_in_100(gains: float, losses: float, n: int) -> None:
    random = np.random.default_rng(1)
    drawn = random.multinomial(n, [gains, losses, 1 - gains - losses], 1_000)
    intervals = [share_difference_interval(int(gained), int(lost), n) for gained, lost, _ in drawn]
    held = np.mean([low <= gains - losses <= high for low, high in intervals])
    assert 0.92 < held < 0.99


@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_of_a_loss_holds_the_truth_about_95_times_in_100(n: int) -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        tokens = random.integers(4, 20, n)
        old = [(float(nats), int(count)) for nats, count in zip(random.normal(3, 0.5, n) * tokens, tokens, strict=True)]
        new = [(nats + count * float(random.normal(0.2, 0.3)), count) for nats, count in old]
        paired = compare_losses(old, new)
        assert paired.low is not None
        assert paired.high is not None
        held += paired.low <= 0.2 <= paired.high
    assert 0.9 < held / 300 < 0.99


def test_the_difference_of_losses_is_that_of_the_scores_and_many_examples_need_no_resampling() -> None:
    random = np.random.default_rng(3)
    tokens = random.integers(4, 20, 3_000)
    old, new = (
        [(float(nats), int(count)) for nats, count in zip(random.normal(3, 0.5, 3_000) * tokens, tokens, strict=True)]
        for _ in range(2)
    )
    values = [ratio(*zip(*rows, strict=True))[0] for rows in (old, new)]  # pyright: ignore[reportArgumentType]
    assert compare_losses(old, new).difference == pytest.approx(values[1] - values[0])
    few = compare_losses(old[:1_999], new[:1_999])
    many = compare_losses(old[:2_000], new[:2_000])
    assert few.low == pytest.approx(many.low, abs=2e-3)
    assert few.high == pytest.approx(many.high, abs=2e-3)


def test_a_verdict_says_better_worse_or_how_many_examples_would_tell() -> None:
    old = [1.0] * 60 + [0.0] * 60
    better, worse = [1.0] * 80 + [0.0] * 40, [1.0] * 40 + [0.0] * 80
    assert describe(compare_scores(old, better)) == "better"
    assert describe(compare_scores(old, worse)) == "worse"
    open_one = compare_scores(old, [1.0] * 55 + [0.0] * 5 + [1.0] * 8 + [0.0] * 52)
    assert (open_one.gained, open_one.lost, open_one.verdict) == (8, 5, "undecided")
    assert open_one.needed is not None
    assert open_one.needed > 120
    assert describe(open_one) == f"cannot tell at n = 120; about {-(-open_one.needed // 100) * 100:,} would tell"
    assert describe(compare_scores(old, old)) == "the same on all 120 examples"
    assert describe(compare_losses([(3.0, 4)] * 3, [(2.0, 4)] * 3)).startswith("cannot tell at n = 3"), "too few"
    assert describe(compare_losses([(3.0, 4)] * 9, [(2.0, 4)] * 9)) == "better", "lower is better"


def test_as_many_examples_as_are_named_find_such_a_difference_four_times_in_five() -> None:
    random = np.random.default_rng(4)
    seen = compare_scores([0.0] * 20 + [1.0] * 100, [1.0] * 12 + [0.0] * 8 + [0.0] * 6 + [1.0] * 94)
    assert seen.needed is not None
    drawn = random.multinomial(seen.needed, [12 / 120, 6 / 120, 102 / 120], 1_000)
    intervals = [share_difference_interval(int(gained), int(lost), seen.needed) for gained, lost, _ in drawn]
    assert 0.75 < np.mean([low > 0 for low, _ in intervals]) < 0.85


def test_scores_between_right_and_wrong_are_compared_too() -> None:
    random = np.random.default_rng(5)
    old = random.random(80)
    new = np.clip(old + random.normal(0.1, 0.1, 80), 0, 1)
    paired = compare_scores(list(old), list(new))
    assert paired.verdict == "better"
    assert paired == compare_scores(list(old), list(new)), "the resamples are the same every time"
