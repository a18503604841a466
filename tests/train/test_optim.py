"""Each optimizer against ten lines of numpy; the schedules at their ends."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from reference import numpy_optimizer, random_model
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.optim import OPTIMIZERS, SCHEDULES, build_optimizer, schedule_factor

LR, DECAY, MOMENTUM = 0.03, 0.1, 0.8
NAMES = ["adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov"]


class TwoWeights(nn.Module):
    """A matrix, which decays, and a bias, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, dtype=torch.float64))


def test_the_five_optimizers_of_the_paper_are_there():
    assert set(NAMES) <= set(OPTIMIZERS)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_equal_the_formula_with_decay_on_matrices_only(name, decay):
    model, rng = TwoWeights(), np.random.default_rng(0)
    gradients = {n: [rng.normal(size=p.shape) for _ in range(10)] for n, p in model.named_parameters()}
    expected = {
        n: numpy_optimizer(name, p.detach().numpy().copy(), gradients[n], LR, decay if n == "matrix" else 0.0, MOMENTUM)
        for n, p in model.named_parameters()
    }
    optimizer = build_optimizer(model, name, lr=LR, weight_decay=decay, momentum=MOMENTUM)
    for step in range(10):
        for n, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[n][step].copy())
        optimizer.step()
        for n, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), expected[n][step], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.01), ("adam", 0), ("sgd", 0), ("sgd-momentum", 0)])
def test_without_a_gradient_only_adamws_default_decay_moves_matrices(name, decay):
    """On a whole GPT: embeddings and linear weights shrink by lr x 0.01, biases and norms stay."""
    model = random_model(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=6), dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, name, lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        kept = 1 - 0.5 * decay if not n.endswith("bias") and "ln_" not in n else 1.0
        torch.testing.assert_close(p.detach(), kept * before[n], rtol=1e-12, atol=1e-12, msg=n)


def test_frozen_weights_are_left_alone():
    model = TwoWeights()
    model.matrix.requires_grad_(False)
    optimizer = build_optimizer(model, "adamw", lr=LR)
    assert [p is model.bias for group in optimizer.param_groups for p in group["params"]] == [True]


def factors(name, steps, warmup):
    return [schedule_factor(name, step, steps=steps, warmup_steps=warmup) for step in range(1, steps + 1)]


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_at_their_ends(name, warmup):
    path = factors(name, 20, warmup)
    assert path[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)] if warmup else [])
    if warmup > 0:
        assert path[warmup - 1] == 1.0
    after = schedule_factor(name, 21, steps=20, warmup_steps=warmup)
    assert after == pytest.approx({"constant": 1.0, "linear": 0.0, "cosine": 0.0}[name], abs=1e-12)
    assert path[-1] >= 0.006, "the last step counts"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_single_step_has_the_peak(name):
    assert factors(name, 1, 0) == factors(name, 1, 1) == [1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_to_the_peak_and_never_rise_again(name):
    path = factors(name, 50, 10)
    assert all(a < b for a, b in itertools.pairwise(path[:10]))
    assert all(a >= b for a, b in itertools.pairwise(path[9:]))
    assert all(0 <= f <= 1 for f in path)


def test_linear_and_cosine_follow_their_formulas():
    for step, linear, cosine in zip(range(1, 41), factors("linear", 40, 8), factors("cosine", 40, 8), strict=True):
        if step >= 8:
            assert linear == pytest.approx((41 - step) / 33)
            assert cosine == pytest.approx((1 + math.cos(math.pi * (step - 8) / 33)) / 2)
