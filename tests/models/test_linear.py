"""Products in oneDNN's kernels against torch's own, with and without gradients, plain and packed."""

import pytest
import torch
import torch.nn.functional as F

from reference import random_model
from tunesmith.models import linear
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.linear import Linear, pack_for_good, packable, packed_weights
from tunesmith.models.lora import apply_lora
from tunesmith.models.modes import evaluation_mode

needs_onednn = pytest.mark.skipif(not packable(Linear(2, 2)), reason="no oneDNN with a kernel for this processor")


@pytest.fixture
def layer():
    return Linear(48, 70)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that went through torch's own product."""
    seen, plain = [], F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, *rest: (seen.append(x.shape), plain(x, *rest))[1])
    return seen


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48), (1000, 48), (0, 48)])
def test_products_equal_torchs_own(calls, shape, bias):
    layer, x = Linear(48, 70, bias=bias), torch.randn(shape)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
        with packed_weights(layer):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == (0 if x.numel() else 2)
    assert layer.packed is None


@needs_onednn
def test_a_row_has_the_same_bits_in_every_batch_packed_or_not(layer):
    x = torch.randn(100, 48)
    with torch.no_grad():
        full = layer(x)
        with packed_weights(layer):
            packed = [layer(x[:n]) for n in (2, 3, 8, 40, 100)]
        plain = [layer(x[:n]) for n in (2, 3, 8, 40, 100)]
    for y in packed + plain:
        assert torch.equal(y, full[: len(y)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (300, 48)])
def test_gradients_equal_torchs_own_in_double_precision(shape, bias):
    layer, x, dy = Linear(48, 70, bias=bias), torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 70)
    theirs, x64 = torch.nn.Linear(48, 70, bias=bias).double(), x.detach().double().requires_grad_()
    theirs.load_state_dict(layer.state_dict())
    theirs(x64).backward(dy.double())
    with packed_weights(layer):  # a pass with gradients never reads the copy
        layer(x).backward(dy)
    for mine, other in zip((x, *layer.parameters()), (x64, *theirs.parameters()), strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_passes_with_gradients_run_in_onednn_to_the_same_bits_as_without(layer, calls):
    x = torch.randn(2, 9, 48)
    y = layer(x)
    y.sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert not calls


def test_what_is_frozen_gets_no_gradient(layer):
    layer.requires_grad_(False)
    x = torch.randn(4, 48, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 48))
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(70, 48))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_autocast_take_torchs_own(layer, calls, dtype):
    x = torch.randn(3, 48)
    with torch.no_grad():
        if dtype is torch.bfloat16:
            with torch.autocast("cpu", dtype):
                assert layer(x).dtype is dtype
        layer.to(dtype)
        assert packable(layer) == []
        assert layer(x.to(dtype)).dtype is dtype
    assert len(calls) == (2 if dtype is torch.bfloat16 else 1)


def test_without_onednn_nothing_is_packed(layer, calls, monkeypatch):
    monkeypatch.setattr(linear, "_has_onednn", lambda: False)
    pack_for_good(layer)
    assert layer.packed is None
    assert layer.weight.shape == (70, 48)
    assert layer(torch.randn(3, 48)).shape == (3, 70)
    assert len(calls) == 1


@needs_onednn
def test_packed_copies_hold_the_weights_of_now_and_are_gone_after_an_error(layer):
    x = torch.randn(4, 48)
    with torch.no_grad():
        for _ in range(2):
            layer.weight.mul_(2)
            with packed_weights(layer):
                assert torch.equal(layer.packed.to_dense(), layer.weight)
                inside = layer(x)
            assert torch.equal(layer(x), inside)
    with pytest.raises(ZeroDivisionError), packed_weights(layer):
        1 / 0  # noqa: B018
    assert layer.packed is None


@needs_onednn
def test_packed_for_good_keeps_no_plain_weight_and_nothing_is_packed_twice(layer):
    x = torch.randn(4, 48)
    with torch.no_grad():
        expected = layer(x)
    pack_for_good(layer)
    assert layer.weight.numel() == 0
    with packed_weights(layer):
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)  # nothing asks for a gradient any more


def test_adapters_add_to_packed_weights_too():
    model = random_model(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=50, block_size=16))
    apply_lora(model, rank=2, alpha=4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    tokens = torch.randint(0, 50, (2, 9))
    expected = model(tokens).detach()
    with evaluation_mode(model), packed_weights(model):
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_a_bare_product_takes_onednn_for_float32_only_transposed_weights_too():
    x, w = torch.randn(30, 48), torch.randn(48, 70)
    torch.testing.assert_close(linear.product(x, w.t()).double(), x.double() @ w.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(linear.product(x, w.t()), linear.product(x, w.t().contiguous()))
    assert torch.equal(linear.product(x.double(), w.double().t()), x.double() @ w.double())
    assert linear.product(x[:0], w.t()).shape == (0, 70)
