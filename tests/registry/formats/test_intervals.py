"""The interval shown for a share of examples that is 0 or 1, which is not certain."""

import pytest

from registry.cli.console.render import with_error
from registry.domain.channels.policy.gates import GateScore
from registry.formats.intervals import wilson


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0.000 [0.000, 0.138]"), (1.0, "1.000 [0.862, 1.000]")])
def test_none_or_all_of_24_have_an_interval(value: float, shown: str) -> None:
    assert with_error(value, 0.0, 24) == shown
    low, high = wilson(value, 24)
    assert (low, high) == pytest.approx((0.0, 0.1380) if value == 0 else (0.8620, 1.0), abs=1e-4)
    assert str(GateScore(value, 0.0, 24, higher_is_better=True)) == f"{value:.4g} [{low:.3g}, {high:.3g}] (n=24)"


def test_other_scores_have_their_standard_error() -> None:
    assert with_error(0.5, 0.1, 24) == "0.500 ± 0.100"
    assert with_error(0.7816, 0.083, 24) == "0.782 ± 0.083"
    assert with_error(0.5, None, 0) == "0.500"
    assert str(GateScore(0.7816, 0.083, 24, higher_is_better=False)) == "0.7816 ± 0.083 (n=24)"
