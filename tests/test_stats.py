"""Intervals: known values, and that they hold the truth as often as they say."""

import numpy as np
import pytest

from tunesmith.study.stats import wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)  # the last: Newcombe 1998, table I
def test_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.71, 0.9])
def test_the_interval_holds_the_true_share_in_about_95_of_100_cases(share):
    seen = np.random.default_rng(0).binomial(40, share, 4000)
    held = np.mean([low <= share <= high for low, high in (wilson_interval(int(k), 40) for k in seen)])
    assert 0.93 <= held <= 0.98


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(successes, n):
    with pytest.raises(ValueError, match="is no share"):
        wilson_interval(successes, n)
