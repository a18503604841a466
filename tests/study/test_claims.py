"""Verdicts on numbers whose truth is known: what holds, what does not, ties, too few seeds, and noise that must not be told."""

import math
import random

import pytest

from tunesmith.stats import Interval
from tunesmith.study.paper.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    above_chance,
    alike,
    alike_paired,
    all_greater,
    better_paired,
    falls_after_best,
    never_learns,
    noise_of,
    overfits,
    same_steps,
)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ({"a": [0.50, 0.52, 0.51], "b": [0.2, 0.25, 0.22]}, HOLDS),
        ({"a": [0.50, 0.52, 0.51], "b": [-0.2, -0.25, -0.22]}, FAILS),
        ({"a": [0.50, 0.52, 0.51], "b": [0.02, -0.03, 0.01]}, OPEN),  # a tie with one of them
        ({"a": [0.0, 0.0, 0.0]}, OPEN),  # exactly equal is not greater
        ({"a": [0.5]}, OPEN),  # one seed, however large the difference
        ({"a": [0.5, 0.5], "b": []}, OPEN),
        ({}, OPEN),
    ],
)
def test_greater_than_all_others(differences, verdict):
    found = all_greater(differences)
    assert found.verdict == verdict, found.evidence


def test_greater_says_the_numbers_and_what_is_missing():
    assert all_greater({"SGD minus Adam": [0.5]}, unit="nats").evidence == (
        "SGD minus Adam: 0.500 nats (1 seed); one seed says nothing about the next, and the claim needs 2"
    )
    assert all_greater({"x": [1.0, 1.2, 1.1]}).evidence == "x: 1.100 [0.852, 1.348] (3 seeds)"  # 4.303 * 0.1 / sqrt 3


def test_what_is_measured_needs_one_run_but_not_less_than_the_meter_resolves():
    assert all_greater({"x": [2.0]}, resolution=0.5).verdict == HOLDS
    assert all_greater({"x": [0.4]}, resolution=0.5).verdict == OPEN
    assert all_greater({"x": [-2.0]}, resolution=0.5).verdict == FAILS
    assert all_greater({"x": [0.9, 1.0, 1.1]}, resolution=0.8).verdict == OPEN  # 0.75 on its own, widened below 0


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.01, -0.01, 0.0], HOLDS),
        ([0.5, 0.51, 0.49], FAILS),
        ([-0.5, -0.51, -0.49], FAILS),
        ([0.3, -0.3, 0.05], OPEN),  # no difference seen, but none excluded either
        ([0.1, 0.11, 0.09], OPEN),  # on the border
        ([0.0], OPEN),
        ([], OPEN),
    ],
)
def test_alike_is_shown_and_not_assumed(differences, verdict):
    found = alike({"x": differences}, 0.1)
    assert found.verdict == verdict, found.evidence


def test_one_of_several_below_zero_by_chance_is_not_a_contradiction():
    rng = random.Random(6)
    told = [all_greater({str(k): [rng.gauss(0, 1) for _ in range(3)] for k in range(4)}).verdict for _ in range(500)]
    assert told.count(FAILS) <= 25  # 5 % at most; uncorrected it would be 10 %


def test_a_tie_is_seldom_told_as_a_difference():
    rng = random.Random(5)
    told = [all_greater({"x": [rng.gauss(0, 1) for _ in range(3)]}).verdict for _ in range(1000)]
    assert told.count(HOLDS) + told.count(FAILS) <= 70  # 5 % expected


# ---- curves ----------------------------------------------------------------------------------------------------------

STEPS = list(range(0, 4100, 100))
FALLING = [2 + 2 * math.exp(-i / 8) for i in range(41)]


def rising_from(turn: int, slope: float = 0.02, noise: float = 0.003, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [f + slope * max(0, i - turn) + rng.gauss(0, noise) for i, f in enumerate(FALLING)]


def test_noise_is_measured_beside_a_trend():
    rng = random.Random(2)
    assert noise_of([0.01 * i + rng.gauss(0, 0.5) for i in range(4000)]) == pytest.approx(0.5, rel=0.05)
    assert noise_of([0.3 * i for i in range(20)]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("validation", "train", "between", "verdict", "word"),
    [
        (rising_from(30), FALLING, (0.6, 0.9), HOLDS, "of 40"),
        (rising_from(30), FALLING, None, HOLDS, "above that at the end"),
        (rising_from(10), FALLING, (0.6, 0.9), FAILS, "the turn is at"),
        (FALLING, FALLING, (0.6, 0.9), OPEN, "flat at the end"),
        ([4 - 0.04 * i for i in range(41)], FALLING, None, FAILS, "still falling"),
        (rising_from(30, slope=0.0005, noise=0.02), FALLING, None, OPEN, ""),
        (rising_from(20), rising_from(20, slope=0.03, noise=0), None, FAILS, "unstable"),
        (FALLING[:6], FALLING[:6], None, OPEN, "8 are needed"),
    ],
)
def test_overfitting(validation, train, between, verdict, word):
    found = overfits(STEPS[: len(validation)], validation, train, between=between)
    assert found.verdict == verdict, found.evidence
    assert word in found.evidence


def test_a_rise_is_judged_on_the_same_batches_where_they_were_kept():
    curve = rising_from(30)
    small, sure = Interval(0.01, -0.02, 0.04, 9), Interval(0.01, 0.005, 0.015, 9)
    assert overfits(STEPS, curve, FALLING, difference=lambda i, j: small).verdict == OPEN
    found = overfits(STEPS, curve, FALLING, difference=lambda i, j: sure)
    assert found.verdict == HOLDS
    assert "0.010 [0.005, 0.015] above that at the end, paired over the same batches" in found.evidence
    without = overfits(STEPS, curve, FALLING, difference=lambda i, j: None)
    assert without == overfits(STEPS, curve, FALLING)


def test_validations_are_counted_as_the_paper_counts_them():
    v_shaped = [4 - 0.1 * i if i <= 30 else 1 + 0.1 * (i - 30) for i in range(41)]
    train = [4 - 0.1 * i for i in range(41)]
    assert overfits(STEPS, v_shaped, train).evidence.startswith("lowest at validation 30 of 40 (step 3,000)")
    assert overfits(STEPS[1:], v_shaped[1:], train[1:]).evidence.startswith("lowest at validation 30 of 40")


def test_a_flat_noisy_curve_is_seldom_told_as_anything():
    rng = random.Random(3)
    told = [overfits(STEPS, [1 + rng.gauss(0, 0.01) for _ in STEPS], FALLING).verdict for _ in range(400)]
    assert told.count(HOLDS) <= 16


def checkpoints(level, *, noise: float = 0.1, prompts: int = 40, seed: int = 4) -> dict[int, list[float]]:
    rng = random.Random(seed)
    hard = [rng.gauss(0, 1) for _ in range(prompts)]
    return {100 * i: [level(i / 20) + h + rng.gauss(0, noise) for h in hard] for i in range(21)}


def up_and_down(share: float) -> float:
    return 1 - 4 * abs(share - 0.5)


def test_reward_that_falls_after_its_best_checkpoint():
    found = falls_after_best(checkpoints(up_and_down), between=(0.4, 0.6))
    assert found.verdict == HOLDS
    assert found.evidence.startswith("best at step 1,000 of 2,000; from there to the end it falls by 1.99")
    elsewhere = falls_after_best(checkpoints(up_and_down), between=(0.8, 1.0))
    assert elsewhere.verdict == FAILS
    assert "the turn is at 50%" in elsewhere.evidence


def test_reward_that_rises_to_the_end_does_not_fall():
    found = falls_after_best(checkpoints(lambda x: 2 * x))
    assert found.verdict == FAILS
    assert "the last of 21 checkpoints" in found.evidence


def test_the_best_of_many_equal_checkpoints_is_not_said_to_fall():
    told = [falls_after_best(checkpoints(lambda x: 0.0, noise=0.5, seed=s)).verdict for s in range(100)]
    assert told.count(HOLDS) <= 8  # picked and judged on the same prompts it would be nearly all of them


def test_too_few_checkpoints_or_prompts():
    assert falls_after_best({0: [1.0] * 9, 1: [0.0] * 9}).verdict == OPEN
    assert falls_after_best({0: [1.0], 1: [0.0], 2: [0.5]}).verdict == OPEN
    assert falls_after_best({}).verdict == OPEN


# ---- single figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ({"1e-2": [None, None], "1e-3": [4.2, 4.0]}, HOLDS),
        ({"1e-2": [2.0, 2.1], "1e-3": [2.0, 2.2]}, FAILS),
        ({"1e-2": [None, None], "1e-3": [2.0, 2.2]}, OPEN),
        ({"1e-2": []}, OPEN),
        ({}, OPEN),
    ],
)
def test_rates_that_do_not_converge(ends, verdict):
    found = never_learns({name: [4.0] * len(values) for name, values in ends.items()}, ends)
    assert found.verdict == verdict, found.evidence


@pytest.mark.parametrize(
    ("accuracies", "margins", "pairs", "verdict"),
    [
        ([0.65], [0.4], 400, HOLDS),
        ([0.65], [0.4], 20, OPEN),
        ([0.5], [0.0], 400, OPEN),
        ([0.3], [-0.4], 400, FAILS),
        ([0.65], [-0.1], 400, FAILS),
        ([], [], 400, OPEN),
        ([0.65], [0.4], 0, OPEN),
    ],
)
def test_preference_above_chance(accuracies, margins, pairs, verdict):
    assert above_chance(accuracies, margins, {"validation_pairs": pairs}).verdict == verdict
    many = {"validation_pairs": 400, "validation_prompts": pairs}
    assert above_chance(accuracies, margins, many).verdict == verdict, "pairs of one prompt are one example"


def test_paired_over_prompts():
    hard = [random.Random(n).gauss(0, 2) for n in range(40)]
    a = [h + 0.3 + 0.1 * (n % 3) for n, h in enumerate(hard)]
    assert better_paired(a, hard, "a minus b").verdict == HOLDS
    assert better_paired(hard, a, "b minus a").verdict == FAILS
    assert better_paired(hard, hard, "same").verdict == OPEN
    assert better_paired([1.0], [0.0], "one").verdict == OPEN
    assert alike_paired(a, hard, "a minus b").verdict == HOLDS  # 0.4 of a spread of 2
    assert alike_paired([h + 5 for h in hard], hard, "far").verdict == FAILS
    assert alike_paired(hard[:3], hard[:3], "few").verdict == OPEN


def test_step_by_step_equality():
    a = {step: 2.0 + step for step in range(1, 9)}
    assert same_steps(a, {s: v * (1 + 1e-5) for s, v in a.items()}, 1e-4).verdict == HOLDS
    found = same_steps(a, a | {5: 7.7}, 1e-4)
    assert found.verdict == FAILS
    assert "difference of the loss 1.0e-01, at step 5 of 8" in found.evidence
    assert same_steps(a, {}, 1e-4).verdict == OPEN
