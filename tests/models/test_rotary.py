"""Rotary positions and RMS norms against transformers' and torch's own, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tunesmith.models.gated_mlp import gated
from tunesmith.models.rms_norm import rms_norm
from tunesmith.models.rotary import Rotary, read_rotary, rotate

KINDS = {
    "plain": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
}  # fmt: skip


def pieces(kind):
    """transformers' embedding and ours, 64 numbers a head."""
    stated = KINDS[kind]
    theirs = LlamaRotaryEmbedding(TheirConfig(hidden_size=64, num_attention_heads=1, rope_parameters=dict(stated)))
    base, scaling = read_rotary({"rope_parameters": stated}, 2048, "Llama")
    return theirs, Rotary(64, base, scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_transformers_own_to_the_bit_far_out_too(kind):
    theirs, ours = pieces(kind)
    positions = torch.tensor([[0, 1, 2, 17, 4095, 8192, 100_000]])
    assert torch.equal(ours.frequencies(), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(1), positions)
    for mine, right in zip(ours.angles(positions), (cos, sin), strict=True):
        assert torch.equal(torch.cat([mine, mine], -1)[:, :, 0], right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80])
def test_turning_and_its_gradient(dtype, width):
    theirs, ours = pieces("plain")
    x = torch.randn(2, 9, 3, width).to(dtype).requires_grad_()
    positions = torch.arange(9)[None] * 100
    cos, sin = theirs(torch.zeros(1, dtype=torch.float64), positions)
    turned = apply_rotary_pos_emb(x[..., :64].double(), x[..., :64].double(), cos, sin, unsqueeze_dim=2)[0]
    expected = torch.cat([turned, x[..., 64:].double()], -1)
    found = rotate(x, *ours.angles(positions))
    assert found.dtype is dtype
    weight = torch.randn(expected.shape, dtype=torch.float64)
    close = {"rtol": 1e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **close)
    (right,) = torch.autograd.grad(expected, x, weight, retain_graph=True)
    (mine,) = torch.autograd.grad(found, x, weight.to(dtype))
    torch.testing.assert_close(mine.double(), right.double(), **close)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 8)])
def test_an_rms_norm_and_its_gradients_are_torchs(shape):
    x, weight = torch.randn(shape, dtype=torch.float64) * 3, torch.randn(shape[-1], dtype=torch.float64)
    for z in (x, weight):
        z.requires_grad_()
    ours, right = rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    dy = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2)  # laid out otherwise
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (ours, right)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_row_is_normed_alike_whatever_lies_beside_it():
    x, weight = torch.randn(33, 576), torch.randn(576)
    together = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-5)[0], together[i]) for i in range(33))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate_and_its_gradients_are_those_of_the_plain_operations_to_the_bit(activation):
    gate, up, dy = (torch.randn(50, 24) * 2 for _ in range(3))
    for z in (gate, up):
        z.requires_grad_()
    plain = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    ours = gated(gate, up, activation)
    assert torch.equal(ours, plain)
    for mine, right in zip(*(torch.autograd.grad(y, (gate, up), dy) for y in (ours, plain)), strict=True):
        assert torch.equal(mine, right)
