"""The chunked head-and-loss operation against cross-entropy on full logits, and the memory it is there to save."""

import pytest
import torch
import torch.nn.functional as F

from tensors_made import LargestTensor, largest
from tunesmith.models.head import head_nll_sum, token_nll

N, C, V = 37, 12, 101
FLOAT64 = 1e-11


def problem(n=N, dtype=torch.float64, seed=0):
    """Hidden states, head and targets; logits reach a few tens, so that a careless softmax would show."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(n, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def full(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 3, 256, 10_000])
@pytest.mark.parametrize("n", [1, 3, N, 600])
def test_value_and_both_gradients_equal_cross_entropy_on_full_logits(n, chunk):
    hidden, weight, targets = problem(n)
    ours, theirs = head_nll_sum(hidden, weight, targets, chunk=chunk), full(hidden, weight, targets)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=0)
    for mine, right in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(mine, right, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.12 has no linear_cross_entropy")
def test_equals_torchs_own_linear_cross_entropy():
    hidden, weight, targets = problem()
    theirs = F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    ours = head_nll_sum(hidden, weight, targets, chunk=5)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=0)
    for mine, right in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(mine, right, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("count", [0, 1, 7, 20, N])
def test_filler_at_the_end_counts_nothing_forward_and_backward(count):
    hidden, weight, targets = problem()
    ours = head_nll_sum(hidden, weight, targets, chunk=7, count=count)
    theirs = full(hidden[:count], weight, targets[:count])
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)
    for mine, right in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(mine, right, rtol=FLOAT64, atol=FLOAT64)


def test_a_second_backward_is_refused_and_not_silently_wrong():
    hidden, weight, targets = problem()
    loss = head_nll_sum(hidden, weight, targets)
    loss.backward(torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
    with pytest.raises(RuntimeError, match="computed once"):
        loss.backward()


def test_without_tokens_the_loss_and_the_heads_gradient_are_zero():
    hidden, weight, targets = problem(0)
    loss = head_nll_sum(hidden, weight, targets)
    d_hidden, d_weight = gradients(loss, hidden, weight)
    assert loss.item() == 0
    assert d_hidden.shape == (0, C)
    assert not d_weight.any()
    assert token_nll(hidden, weight, targets).shape == (0,)


@pytest.mark.parametrize("scale", [1 / 37, -2.5, 0.0])
def test_the_upstream_gradient_scales_both(scale):
    hidden, weight, targets = problem()
    ours = gradients(scale * head_nll_sum(hidden, weight, targets, chunk=7), hidden, weight)
    theirs = gradients(scale * full(hidden, weight, targets), hidden, weight)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_right_one(frozen):
    hidden, weight, targets = problem()
    right = gradients(full(hidden, weight, targets), hidden, weight)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = head_nll_sum(hidden, weight, targets, chunk=7)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    learning, still, expected = (weight, hidden, right[1]) if frozen == "hidden" else (hidden, weight, right[0])
    assert still.grad is None
    torch.testing.assert_close(learning.grad, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_estimate_makes_no_gradients(mode, monkeypatch):
    hidden, weight, targets = problem()
    right = head_nll_sum(hidden, weight, targets, chunk=7)
    monkeypatch.setattr("tunesmith.models.head._Chunks.add_gradients", lambda *_: pytest.fail("gradients are made"))
    with mode():
        assert head_nll_sum(hidden, weight, targets, chunk=7) == right


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    _, weight, targets = problem()
    ours = gradients(head_nll_sum(torch.tanh(weight[targets]), weight, targets, chunk=7), weight)
    theirs = gradients(full(torch.tanh(weight[targets]), weight, targets), weight)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)


def test_a_hidden_state_that_is_a_view_gets_its_gradient_in_place():
    base = torch.randn(C, N, dtype=torch.float64, requires_grad=True)
    _, weight, targets = problem()
    ours = gradients(head_nll_sum(base.t(), weight, targets, chunk=7), base)
    torch.testing.assert_close(ours, gradients(full(base.t(), weight, targets), base), rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_loss_and_gradients_stay_close_to_float32(half):
    hidden, weight, targets = problem(dtype=torch.float32)
    right, right_gradients = (loss := full(hidden, weight, targets)).detach(), gradients(loss, hidden, weight)
    with torch.autocast("cpu", half):
        loss = head_nll_sum(hidden, weight, targets, chunk=7)
    assert loss.dtype == torch.float32
    rounding = torch.finfo(half).eps
    torch.testing.assert_close(loss, right, rtol=4 * rounding, atol=0)
    for mine, expected in zip(gradients(loss, hidden, weight), right_gradients, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - expected).norm() < 8 * rounding * expected.norm()


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_token_losses_are_those_of_cross_entropy_and_sum_to_the_same(chunk):
    hidden, weight, targets = problem()
    each = token_nll(hidden, weight, targets, chunk=chunk)
    right = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert not each.requires_grad
    torch.testing.assert_close(each, right, rtol=FLOAT64, atol=FLOAT64)
    assert each.sum().item() == pytest.approx(head_nll_sum(hidden, weight, targets).item(), rel=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_huge_logits_stay_finite_and_a_shift_changes_nothing(shift):
    """Adding a constant to all logits of a token leaves its distribution as it is; exp() of it alone would overflow."""
    hidden, weight, targets = problem()
    with_one = torch.cat([hidden, torch.full((N, 1), shift, dtype=torch.float64)], 1)
    constant = torch.cat([weight, torch.ones(V, 1, dtype=torch.float64)], 1)
    shifted = head_nll_sum(with_one, constant, targets, chunk=7)
    torch.testing.assert_close(shifted, head_nll_sum(hidden, weight, targets), rtol=1e-9, atol=0)


def test_the_full_logits_never_exist_forward_or_backward():
    n, width, vocabulary, chunk = 2000, 8, 3000, 16
    hidden, weight = torch.randn(n, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (n,))
    allowed = max(chunk * vocabulary, vocabulary * width, n * width)
    assert largest(lambda *a: head_nll_sum(*a, chunk=chunk), hidden, weight, targets) <= allowed
    assert largest(full, hidden, weight, targets) >= n * vocabulary  # the measure does see full logits


def test_token_losses_need_no_full_logits_either():
    hidden, weight = torch.randn(2000, 8), torch.randn(3000, 8)
    with LargestTensor() as seen:
        token_nll(hidden, weight, torch.randint(0, 3000, (2000,)), chunk=16)
    assert 16 * 3000 <= seen.numbers <= 16 * 3000 + 2000 * 8
