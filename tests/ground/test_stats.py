"""Intervals: known values, and that they hold the truth as often as they say."""

import math

import numpy as np
import pytest

from tunesmith.stats import (
    Wins,
    bootstrap_interval,
    clustered_share,
    count_wins,
    paired_difference,
    share_interval,
    t_interval,
    t_quantile,
    wilson_interval,
    win_rate,
)

DRAWS = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "skewed": lambda rng, n: rng.gamma(2, 1, n) - 2,
    "flat": lambda rng, n: rng.uniform(-1, 1, n),
    "two values": lambda rng, n: rng.integers(0, 2, n) - 0.5,
    "mostly near, sometimes far": lambda rng, n: np.where(rng.random(n) < 0.1, 3, 0) + rng.normal(0, 1, n) - 0.3,
}  # all with mean 0


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)  # the last: Newcombe 1998, table I
def test_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert (share_interval(successes, n).low, share_interval(successes, n).high) == wilson_interval(successes, n)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.71, 0.9])
def test_the_interval_holds_the_true_share_in_about_95_of_100_cases(share):
    seen = np.random.default_rng(0).binomial(40, share, 4000)
    held = np.mean([low <= share <= high for low, high in (wilson_interval(int(k), 40) for k in seen)])
    assert 0.93 <= held <= 0.98


def test_a_share_of_clustered_examples_holds_the_truth_where_that_of_single_ones_does_not():
    """40 prompts of 1 to 8 pairs, each prompt with its own chance (a beta of mean 0.7)."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        counts = rng.integers(1, 9, 40)
        right = rng.binomial(counts, rng.beta(1.4, 0.6, 40))
        held += 0.7 in clustered_share(right, counts)
        naive += 0.7 in share_interval(int(right.sum()), int(counts.sum()))
    assert 0.93 <= held / 2000 <= 0.98
    assert naive / 2000 < 0.85


def test_a_share_of_single_examples_is_as_without_clusters_and_all_right_is_worth_the_clusters():
    right = [1, 0, 1, 1, 0, 1, 0]
    assert clustered_share(right, [1] * 7) == share_interval(4, 7)
    assert clustered_share([5, 2, 3], [5, 2, 3]).low == wilson_interval(3, 3)[0]
    assert clustered_share([2], [4]).low == wilson_interval(0.5, 1)[0]
    # residuals 1, -1, 0 of six: 6 * 0.25 / (2 / 6), times 2/3 for the clusters and 6/5 for the examples, are 3.6
    assert clustered_share([2, 0, 1], [2, 2, 2]).low == pytest.approx(wilson_interval(1.8, 3.6)[0], abs=1e-12)
    # clusters that vary less than single examples would: still worth no more than ten of them
    even = clustered_share([1, 1, 1, 1, 2], [2] * 5)
    assert (even.low, even.high) == wilson_interval(6, 10)
    with pytest.raises(ValueError, match="there is no share"):
        clustered_share([], [])


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(successes, n):
    with pytest.raises(ValueError, match="is not a share"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (120, 1.97993), (1000, 1.96234), (1001, 1.96234)],
)  # printed tables
def test_t_quantiles(df, expected):
    assert t_quantile(df) == pytest.approx(expected, abs=1e-5 if df > 1 else 6e-5)


@pytest.mark.parametrize(("df", "level", "expected"), [(5, 0.99, 4.03214), (30, 0.998, 3.38518), (10, 0.8, 1.37218)])
def test_t_quantiles_of_other_levels(df, level, expected):
    assert t_quantile(df, level) == pytest.approx(expected, abs=1e-5)


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(5).normal(0, 1, 40)
    wide, plain = bootstrap_interval(values, level=0.999), bootstrap_interval(values)
    assert wide.low < plain.low < plain.high < wide.high


@pytest.mark.parametrize("kind", DRAWS)
def test_the_bootstrap_interval_of_40_values_holds_the_true_mean_in_95_of_100_cases(kind, monkeypatch):
    monkeypatch.setattr("tunesmith.stats.RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    held = np.mean([0 in bootstrap_interval(DRAWS[kind](rng, 40), seed=i) for i in range(2000)])
    assert 0.93 <= held <= 0.97


def test_the_difference_is_paired_and_holds_the_truth(monkeypatch):
    """What both share (the prompt's difficulty) is far larger than the difference; unpaired it would drown."""
    monkeypatch.setattr("tunesmith.stats.RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    held, narrow = [], []
    for _ in range(1500):
        prompt = rng.normal(0, 10, 40)
        found = paired_difference(prompt + 0.5 + rng.normal(0, 1, 40), prompt + rng.normal(0, 1, 40))
        held.append(0.5 in found)
        narrow.append(found.high - found.low)
    assert 0.93 <= np.mean(held) <= 0.97
    assert np.mean(narrow) < 1.0


def test_a_bootstrap_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(3).normal(0, 1, 30)
    whole = bootstrap_interval(values)
    assert whole == bootstrap_interval(list(values))
    monkeypatch.setattr("tunesmith.stats.AT_ONCE", 30 * 1000)
    assert bootstrap_interval(values) == whole


def test_equal_values_have_no_spread_and_one_value_has_no_interval():
    assert (bootstrap_interval([2.0] * 5).low, bootstrap_interval([2.0] * 5).high) == (2.0, 2.0)
    assert math.isnan(bootstrap_interval([2.0]).low)
    assert math.isnan(t_interval([2.0]).high)
    assert str(bootstrap_interval([2.0])) == "2.000 (n = 1)"


def test_t_interval_of_three_seeds():
    """By hand: mean 2, standard deviation 1, 4.30265 / sqrt(3) = 2.48413."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2, -0.48413, 4.48413), abs=1e-5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_mean_of_nothing_or_of_what_is_no_number(values):
    with pytest.raises(ValueError, match="there is no mean"):
        bootstrap_interval(values)


def test_pairs_have_two_sides():
    for compare in (paired_difference, count_wins):
        with pytest.raises(ValueError, match="every pair needs both"):
            compare([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.35, 0.3), (0.6, 0.2), (0.25, 0.6), (0.75, 0.1)])
def test_win_rates_hold_the_truth_with_and_without_ties(win, tie):
    rng = np.random.default_rng(4)
    truth = win + tie / 2
    seen = rng.multinomial(40, [win, tie, 1 - win - tie], 3000)
    assert 0.93 <= np.mean([truth in win_rate(Wins(*map(int, row))) for row in seen]) <= 0.97


def test_mirrored_comparisons_mirror_the_rate():
    wins = count_wins([1, 2, 3, 4, 5, 5], [0, 2, 1, 9, 5.05, 0], tie=0.1)
    assert wins == Wins(3, 2, 1)
    there, back = win_rate(wins), win_rate(wins.mirrored)
    assert (1 - there.mean, 1 - there.high, 1 - there.low) == pytest.approx((back.mean, back.low, back.high))


def test_only_ties_hold_one_half_and_nothing_compared_is_refused():
    found = win_rate(Wins(0, 40, 0))
    assert found.mean == 0.5
    assert 0.5 in found
    assert found.low < 0.4
    with pytest.raises(ValueError, match="nothing was compared"):
        win_rate(Wins(0, 0, 0))
