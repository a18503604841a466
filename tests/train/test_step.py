"""The one optimizer step: any split into micro-batches is the same step; clipping; nothing moves on a non-finite loss."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.amp import GradScaler

from reference import batch_nll, pack_batch, random_model
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.optim import build_optimizer
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=16)
FLOAT64 = 1e-12


def make_row(number: int):
    """A packed row of 16 tokens in two documents; row i has about i^2 / 2 supervised tokens, from 1 to 14."""
    generator = torch.Generator().manual_seed(number)
    cut = 3 + number
    return [torch.randint(0, 31, (n,), generator=generator).tolist() for n in (cut, 16 - cut)]


ROWS = [make_row(i) for i in range(7)]


def batch_of(rows):
    """A batch of rows; a row's early predictions carry loss, ever more of them from row to row."""
    limit = {id(d): 1 + 2 * ROWS.index(row) // 2 for row in rows for d in row}
    return pack_batch(rows, lambda document, t: t < limit[id(document)])


def step(micro_batches, *, lr=1.0, max_norm=0.0, dtype=torch.float64, name="sgd"):
    """One step from the same weights; with plain SGD at rate 1 the weights move by the gradient."""
    model = random_model(SHAPE, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, name, lr=lr, weight_decay=0.0)
    stats = optimizer_step(model, micro_batches, lambda b: nll_sum(model, b), optimizer, max_norm=max_norm)
    return stats, [a - p.detach() for a, p in zip(before, model.parameters(), strict=True)]


def norm(tensors) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


WHOLE = step([batch_of(ROWS)])


def test_loss_is_the_mean_over_tokens_of_a_plain_computation():
    stats, _ = WHOLE
    total, count = batch_nll(random_model(SHAPE, dtype=torch.float64), batch_of(ROWS))
    assert stats.count == count
    assert stats.loss == pytest.approx(total / count, rel=1e-12)
    assert stats.updated


@settings(max_examples=40, derandomize=True)
@given(order=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(order, cuts):
    bounds = [0, *sorted(cuts), 7]
    groups = [[ROWS[i] for i in order[a:b]] for a, b in itertools.pairwise(bounds)]
    stats, gradient = step([batch_of(group) for group in groups])
    assert (stats.count, stats.loss) == (WHOLE[0].count, pytest.approx(WHOLE[0].loss, rel=FLOAT64))
    assert stats.grad_norm == pytest.approx(WHOLE[0].grad_norm, rel=FLOAT64)
    for mine, whole in zip(gradient, WHOLE[1], strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=FLOAT64)


def test_filler_rows_of_a_batch_change_nothing():
    batch = batch_of(ROWS)
    rows, targets = (torch.cat([t, t.new_zeros(9)]) for t in (batch.rows, batch.targets))
    stats, gradient = step([dataclasses.replace(batch, rows=rows, targets=targets, filler=9)])
    assert (stats.count, stats.loss) == (WHOLE[0].count, pytest.approx(WHOLE[0].loss, rel=FLOAT64))
    for mine, whole in zip(gradient, WHOLE[1], strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=FLOAT64)


def test_the_mean_of_micro_batch_means_would_be_another_step():
    """What most trainers do; here the micro-batches' token counts differ, and so would loss and gradient."""
    halves = [batch_of(ROWS[:4]), batch_of(ROWS[4:])]
    assert halves[0].count != halves[1].count
    (a, first), (b, second) = step(halves[:1]), step(halves[1:])
    assert abs((a.loss + b.loss) / 2 - WHOLE[0].loss) > 1e-3
    means = [(x + y) / 2 for x, y in zip(first, second, strict=True)]
    assert norm([x - y for x, y in zip(means, WHOLE[1], strict=True)]) > 1e-3


def test_gradients_of_one_step_do_not_leak_into_the_next():
    model = random_model(SHAPE, dtype=torch.float64)
    optimizer = build_optimizer(model, "sgd", lr=0.0)
    norms = [
        optimizer_step(model, [batch_of(ROWS)], lambda b: nll_sum(model, b), optimizer).grad_norm for _ in range(3)
    ]
    assert norms == [norms[0]] * 3


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_clipping_scales_the_whole_gradient_to_the_norm(share):
    stats, gradient = WHOLE
    assert stats.grad_norm == pytest.approx(norm(gradient), rel=1e-10)
    limit = share * stats.grad_norm
    clipped_stats, clipped = step([batch_of([row]) for row in ROWS], max_norm=limit)
    assert clipped_stats.grad_norm == pytest.approx(stats.grad_norm, rel=1e-10)  # reported as it was before
    assert norm(clipped) == pytest.approx(limit, rel=1e-5)
    for mine, whole in zip(clipped, gradient, strict=True):
        torch.testing.assert_close(mine, share * whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_a_gradient_below_the_limit_is_left_alone(max_norm):
    _, gradient = step([batch_of(ROWS)], max_norm=max_norm)
    assert all(torch.equal(mine, whole) for mine, whole in zip(gradient, WHOLE[1], strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw"])
def test_a_non_finite_loss_in_one_micro_batch_leaves_weights_and_optimizer_as_they_were(name, poison):
    good = [batch_of(ROWS[:2]), batch_of(ROWS[2:])]

    def trained(poisoned_step):
        model = random_model(SHAPE)
        optimizer = build_optimizer(model, name, lr=0.1)
        for number in range(3):

            def loss_sum(batch, poisoned=number == poisoned_step):
                return nll_sum(model, batch) * (poison if poisoned and batch is good[1] else 1.0)

            before = [p.detach().clone() for p in model.parameters()]
            stats = optimizer_step(model, good, loss_sum, optimizer, max_norm=1.0)
            assert stats.updated == (number != poisoned_step)
            unmoved = all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
            assert unmoved == (number == poisoned_step)
            if number == poisoned_step:
                assert not math.isfinite(stats.loss)
            if number == 2 - (poisoned_step is None):  # two good steps are done
                return [p.detach() for p in model.parameters()]
        raise AssertionError

    with_poison, without = trained(1), trained(None)
    assert all(torch.equal(p, q) for p, q in zip(with_poison, without, strict=True))


def test_a_finite_loss_with_a_non_finite_gradient_moves_nothing():
    model = random_model(SHAPE)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, "sgd", lr=1.0)

    def loss_sum(batch):
        return nll_sum(model, batch) + (model.wpe.weight[15, 0] * 0).sqrt()  # 0, with an infinite slope

    stats = optimizer_step(model, [batch_of(ROWS)], loss_sum, optimizer)
    assert math.isfinite(stats.loss)
    assert not stats.updated
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_with_loss_scaling_an_overflow_skips_the_step_and_lowers_the_scale():
    model = random_model(SHAPE)
    optimizer, scaler = build_optimizer(model, "adamw", lr=0.01), GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    stats = optimizer_step(model, [batch_of(ROWS)], lambda b: 1000 * nll_sum(model, b), optimizer, scaler=scaler)
    assert not stats.updated
    assert math.isfinite(stats.loss)
    assert scaler.get_scale() < 2.0**127
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_loss_scaling_by_a_power_of_two_changes_nothing_else():
    def one_step(scaler):
        model = random_model(SHAPE)
        optimizer = build_optimizer(model, "adamw", lr=0.01)
        loss_sum = functools.partial(nll_sum, model)
        stats = optimizer_step(model, [batch_of(ROWS)], loss_sum, optimizer, max_norm=0.5, scaler=scaler)
        assert stats.updated
        return stats, list(model.parameters())

    (plain, expected), (scaled, got) = one_step(None), one_step(GradScaler("cpu", init_scale=2.0**10))
    assert (scaled.loss, scaled.grad_norm) == pytest.approx((plain.loss, plain.grad_norm), rel=1e-6)
    for p, q in zip(got, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
