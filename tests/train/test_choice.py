"""Which checkpoint: by paired rewards, by paired losses, what cannot be told apart, and when a run overfits."""

import numpy as np
import pytest

from tunesmith.train.choice import Estimate, choice_lines, choose, loss_difference, overfitting_since


def curve(validation, train=None, parts=False, seed=0, spread=0.02):
    """Estimates every 10 steps; `parts`: 40 batches of unequal counts that share their difficulty."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(50, 150, 40)
    hard = rng.normal(0, 0.5, 40)
    found = []
    for i, loss in enumerate(validation):
        each = loss + hard + rng.normal(0, spread, 40)
        sums = [(float(x * n), int(n)) for x, n in zip(each, counts, strict=True)] if parts else ()
        value = sum(s for s, _ in sums) / sum(n for _, n in sums) if parts else loss
        found.append(Estimate(10 * i, None if train is None else train[i], value, sums))
    return found


def test_without_rewards_the_lowest_validation_loss_is_chosen():
    found = choose(curve([3.0, 2.5, 2.2, 2.4]), {})
    assert (found.best_step, found.by, found.not_distinguishable) == (20, "validation_loss", ())
    assert choose([], {}) is None


def test_a_choice_of_step_0_says_that_it_is_the_model_before_training():
    for losses, told in (([1.0, 1.2, 1.3], True), ([1.3, 1.2, 1.0], False)):
        estimates = curve(losses)
        lines = choice_lines(choose(estimates, {}, [e.step for e in estimates]), estimates)
        assert any("before training" in line for line in lines) == told


def test_losses_are_told_apart_by_their_paired_difference():
    """0.001 lies within the noise of 40 batches with 0.02 each, 0.2 far outside, although batches differ by 0.5."""
    found = choose(curve([3.0, 2.201, 2.2, 2.4], parts=True), {})
    assert found.best_step in (10, 20)
    assert set(found.not_distinguishable) | {found.best_step} == {10, 20}


def test_the_difference_of_losses_is_that_of_the_ratios_and_its_interval_holds_the_truth(monkeypatch):
    monkeypatch.setattr("tunesmith.stats.RESAMPLES", 1000)
    held = []
    for seed in range(600):
        a, b = curve([2.3, 2.2], parts=True, seed=seed)
        found = loss_difference(a.parts, b.parts)
        assert found.mean == pytest.approx(a.validation_loss - b.validation_loss)
        held.append(0.1 in found)
    assert 0.925 <= np.mean(held) <= 0.975
    with pytest.raises(ValueError, match="different batches"):
        loss_difference([(1.0, 2)], [(1.0, 3)])


def test_with_rewards_the_lowest_loss_among_those_that_may_be_the_best_is_chosen():
    rng = np.random.default_rng(0)
    prompt = rng.normal(0, 3, 40)
    reward = {s: prompt + mean + rng.normal(0, 0.3, 40) for s, mean in [(0, -1), (10, 0.98), (20, 1.0), (30, 0.2)]}
    estimates = curve([3.0, 2.2, 2.4, 2.1])
    found = choose(estimates, reward)
    assert (found.best_step, found.by, found.not_distinguishable) == (10, "reward", (20,))
    assert choose(estimates, reward, available={20, 30}).best_step == 20
    assert choose(estimates, reward, available={0, 30}).best_step == 30, "none of the best is there: the rest by loss"


def test_the_truly_best_is_ruled_out_in_at_most_5_of_100_cases(monkeypatch):
    """Ten checkpoints, one of them a little better; the highest of ten noisy means is often another one."""
    monkeypatch.setattr("tunesmith.stats.RESAMPLES", 4000)
    rng = np.random.default_rng(1)
    kept, lucky = [], []
    for _ in range(300):
        prompt = rng.normal(0, 2, 40)
        rewards = {s: prompt + (0.1 if s == 4 else 0) + rng.normal(0, 1, 40) for s in range(10)}
        found = choose([], rewards)
        lucky.append(found.best_step != 4)
        kept.append(4 in (found.best_step, *found.not_distinguishable))
    assert np.mean(lucky) > 0.5
    assert np.mean(kept) >= 0.94


RASBT = ([3.826, 1.2, 0.70, 0.45, 0.30], [3.762, 1.1, 0.66, 0.628, 0.66])  # ch07: the minimum, then a rise


def test_the_published_overfitting_case_alarms_one_estimate_later():
    train, validation = RASBT
    assert overfitting_since(curve(validation, train)) is None, "a single estimate may be chance"
    train, validation = [*train, 0.2], [*validation, 0.69]
    assert overfitting_since(curve(validation, train)) == 30
    assert choose(curve(validation, train), {}).overfitting_since == 30


@pytest.mark.parametrize(
    ("train", "validation", "why"),
    [
        ([3, 2, 1.5, 1.2], [3, 2.5, 2.4, 2.3], "still falling"),
        ([3, 2, 2.2, 2.4], [3, 2.5, 2.7, 2.9], "training loss rises too: that is no overfitting"),
        ([3, 2, 1.9, 1.8], [3, 2.5, 2.501, 2.502], "a rise of nothing"),
        ([3, 2, 1.0], [3, 2.5, 2.9], "one estimate"),
    ],
)
def test_no_alarm(train, validation, why):
    assert overfitting_since(curve(validation, train)) is None, why


def test_kept_batches_make_the_alarm_exact_in_both_directions():
    train = [3, 2, 1.8, 1.6, 1.4]
    assert overfitting_since(curve([3, 2.5, 2.505, 2.51, 2.515], train, parts=True, spread=0.002)) == 10
    assert overfitting_since(curve([3, 2.5, 2.505, 2.505, 2.505], train, parts=True, spread=0.5)) is None
    assert overfitting_since([]) is None
