"""Weights in bfloat16: rounding, updates in pieces, state in float32, near the plain steps."""

import math

import pytest
import torch

from reference import random_model
from tunesmith.models.head import head_nll_sum
from tunesmith.plan.memory import BF16_SLICE
from tunesmith.train import optim
from tunesmith.train.optim import OneByOne, build_optimizer, round_stochastically
from tunesmith.train.step import clip, optimizer_step
from tunesmith.train.token_loss import nll_sum
from tunesmith.train.trainee import store_in_bf16
from twenty_steps import SHAPE, batches, losses, train, weights


def test_rounding_is_to_a_neighbour_and_right_in_the_mean():
    x = torch.randn(40, 50) * 10.0 ** torch.randint(-20, 20, (40, 50))
    mean = torch.zeros(x.shape, dtype=torch.float64)
    for _ in range(400):
        rounded = round_stochastically(x)
        assert rounded.dtype is torch.bfloat16
        inner = (x.view(torch.int32) & -0x10000).view(torch.float32)  # the neighbour on the side of 0
    outer = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    mean = torch.zeros(x.shape, dtype=torch.float64)
    for _ in range(400):
        rounded = round_stochastically(x)
        assert rounded.dtype is torch.bfloat16
        assert ((rounded.float() == inner) | (rounded.float() == outer)).all()
        mean += rounded.double() / 400
    gap = (outer - inner).double()
    error = (
        mean - x.double()
    ) / gap  # of a mean of 400 draws, each off by at most 1 and with a deviation of at most 1/2
    assert error.abs().max() < 6 * 0.5 / math.sqrt(400)
    assert abs(float(error.mean())) < 5 * 0.5 / math.sqrt(400 * x.numel())


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "sgd"])
def test_a_matrix_updated_in_pieces_is_the_matrix_updated_whole(name, monkeypatch):
    """With nearest rounding, which draws nothing; two steps, so that the state goes through it too."""
    monkeypatch.setattr(optim, "round_stochastically", lambda x: x.to(torch.bfloat16))
    results = []
    for size in (2**22, 70):
        monkeypatch.setattr(optim, "SLICE", size)
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 33 * 7).view(33, 7).to(torch.bfloat16))
        plain = build_optimizer(torch.nn.ParameterList([weight]), name, lr=0.1, weight_decay=0.1)
        optimizer = OneByOne(plain, in_backward=False)
        optimizer.allocate_state()
        for step in range(3):
            weight.grad = torch.sin(weight.detach() * (step + 3))
            optimizer.step()
        results.append([weight.detach(), *optimizer.state.get(weight, {}).values()])
    assert len(results[0]) == {"adamw": 4, "sgd-momentum": 2, "sgd": 1}[name]
    assert all(value == 3 for result in results for value in result if value.dim() == 0)  # the step's number
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole)  # to a rounding: kernels round the ends of a tensor otherwise


def test_the_planner_knows_the_size_of_a_piece():
    assert BF16_SLICE == optim.SLICE


def test_numbers_that_bfloat16_has_stay_and_so_do_infinities():
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, 2.0**-130, 3.0])
    assert torch.equal(round_stochastically(x).float(), x)
    assert round_stochastically(torch.tensor([math.nan])).isnan().all()


def test_changes_too_small_for_bfloat16_still_add_up():
    """1,000 steps of 1e-5 from 1.0, where neighbours are 0.0039 and 0.0078 apart: nearest rounding would stay at 1."""
    weight = torch.nn.Parameter(torch.ones(50, 50, dtype=torch.bfloat16))
    optimizer = OneByOne(torch.optim.SGD([weight], 1e-5), in_backward=False)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=3e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_20_steps_on_bf16_weights_stay_near_the_plain_ones(name, in_backward, precision):
    """Bound: every loss within 3 % of the plain step's, matrices 2 bytes a number, state and vectors still 4."""
    _, seen = train(name=name)
    model, seen_too = train(name=name, bf16=True, in_backward=in_backward, precision=precision)
    assert losses(seen_too) == pytest.approx(losses(seen), rel=0.03)
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.dim() == 1} == {torch.float32}


def test_the_state_of_bf16_weights_is_float32_and_their_gradients_are_clipped_by_their_true_norm():
    model = random_model(SHAPE).train()
    store_in_bf16(model)
    optimizer = OneByOne(build_optimizer(model, "adamw", lr=1e-3), in_backward=False)
    stats = optimizer_step(model, [next(batches())], lambda b: nll_sum(model, b), optimizer, max_norm=1e-3)
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
    first = [s["exp_avg"] for s in optimizer.state.values()]  # a tenth of the clipped gradient
    norm = math.sqrt(sum(float(m.double().square().sum()) for m in first)) * 10
    assert norm == pytest.approx(1e-3, rel=0.01)
    assert stats.grad_norm > 1


def test_the_norm_of_bf16_gradients_is_not_rounded():
    model = random_model(SHAPE)
    store_in_bf16(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype)
    true = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert float(clip(model, 0.0)) == pytest.approx(true, rel=1e-5)


def test_the_heads_gradient_of_bf16_weights_is_summed_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(2)
    hidden, head = (
        torch.randn(64, 32, generator=generator),
        torch.randn(128, 32, generator=generator).to(torch.bfloat16),
    )
    targets, found = torch.randint(128, (64,), generator=generator), []
    for weight in (head.clone(), head.float()):
        head_nll_sum(hidden, weight.requires_grad_(), targets, chunk=2).backward()
        found.append(weight.grad)
    assert found[0].dtype is torch.bfloat16
    assert torch.equal(found[0], found[1].to(torch.bfloat16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_over_a_bf16_base_is_lora_over_the_rounded_base_to_the_bit(precision):
    def rounded(model):
        for p in model.parameters():
            if p.dim() >= 2:
                p.data = p.data.to(torch.bfloat16).float()

    plain, seen = train(lora="all-linear", prepare=rounded, precision=precision)
    small, seen_too = train(lora="all-linear", bf16=True, precision=precision)
    assert seen == seen_too
    for name, p in weights(small).items():
        assert torch.equal(p.float(), weights(plain)[name]), name
        assert p.dtype is (torch.bfloat16 if p.dim() >= 2 and "lora" not in name else torch.float32)


def test_generation_from_bf16_weights_is_that_from_the_rounded_ones():
    model, rounded = random_model(SHAPE), random_model(SHAPE)
    store_in_bf16(model)
    for p, q in zip(model.parameters(), rounded.parameters(), strict=True):
        q.data = p.data.float()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.lm_head(model(tokens)), rounded.lm_head(rounded(tokens)))
