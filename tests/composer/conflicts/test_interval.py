"""Student's t against tables, and the promise of an interval against random draws."""

from math import inf

import numpy as np
import pytest

from composer.conflicts.evidence.interval import Interval, interval, needed_for, quantile, share_interval


@pytest.mark.parametrize(
    ("probability", "dof", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.9875, 3, 4.17653), (0.975, 7, 2.36462),
     (0.975, 30, 2.04227), (0.995, 15, 2.94671), (0.975, 100_000, 1.95996)],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(probability: float, dof: int, expected: float) -> None:
    assert quantile(probability, dof) == pytest.approx(expected, abs=1e-4)


def test_the_median_is_in_the_middle() -> None:
    assert quantile(0.5, 5) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_an_interval_holds_the_mean_nineteen_times_in_twenty(n: int) -> None:
    draws = np.random.default_rng(n).standard_normal((4000, n)) + 0.3
    means, errors = draws.mean(axis=1), draws.std(axis=1, ddof=1) / n**0.5
    held = [interval(mean, error, n).holds(0.3) for mean, error in zip(means, errors, strict=True)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_more_claims_make_it_wider_and_one_measurement_leaves_it_open() -> None:
    one, both = interval(1.0, 0.1, 4), interval(1.0, 0.1, 4, claims=2)
    assert both.low < one.low < 1.0 < one.high < both.high
    assert interval(1.0, None, 1) == Interval(-inf, inf)
    assert interval(1.0, None, 1).to_json() is None
    assert one.to_json() == {"low": one.low, "high": one.high}


def test_no_spread_is_no_doubt() -> None:
    assert interval(0.0, 0.0, 4) == Interval(0.0, 0.0)


@pytest.mark.parametrize(
    ("count", "total", "share", "less"),
    [(0, 4, 0.5, False), (0, 5, 0.5, True), (4, 16, 0.5, True), (5, 16, 0.5, False), (0, 0, 0.5, False)],
)
def test_a_share_is_surely_less_where_the_binomial_tail_is_below_five_percent(
    count: int, total: int, share: float, less: bool
) -> None:
    assert (share_interval(count, total).high < share) is less


def test_a_share_is_judged_from_a_hundred_thousand_examples() -> None:
    assert share_interval(49_000, 100_000).high < 0.5 < share_interval(49_900, 100_000).high


def test_twenty_nine_answers_show_that_nine_in_ten_are_left_and_no_number_shows_it_of_all() -> None:
    assert (needed_for(0.9), needed_for(0.5), needed_for(0.0), needed_for(1.0)) == (29, 5, 0, None)
    assert share_interval(28, 28).low < 0.9 < share_interval(29, 29).low
    assert share_interval(15, 16).high < 1.0 == share_interval(16, 16).high


def test_each_lost_answer_asks_for_more_of_them() -> None:
    needed = [needed_for(0.9, lost) for lost in range(4)]
    assert needed == [29, 46, 61, 76]
    assert share_interval(44, 45).low < 0.9 < share_interval(45, 46).low


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(0, 10, 0.0, 0.2589), (10, 10, 0.7411, 1.0), (9, 10, 0.6058, 0.9949), (50, 100, 0.4136, 0.5864)],
)
def test_the_interval_of_a_share_is_clopper_and_pearsons(count: int, total: int, low: float, high: float) -> None:
    share = share_interval(count, total)
    assert (share.low, share.high) == pytest.approx((low, high), abs=1e-4)
