"""Memory counted from the shape against memory of real tensors."""

import pytest
import torch

from tunesmith.documents import Documents
from tunesmith.gpt import GPT, SIZES, GPTConfig
from tunesmith.lora import apply_lora
from tunesmith.memory import SLOTS, activation_bytes, adapted_layers, count_adapters, count_parameters, predict_memory
from tunesmith.optim import OPTIMIZERS, build_optimizer

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=11, block_size=64)


def model_of(shape=SHAPE, targets=None, rank=3):
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    if targets:
        apply_lora(model, targets, rank=rank, alpha=6, dropout=0.0, seed=1)
    return model.train()


@pytest.mark.parametrize(
    "shape", [SHAPE, GPTConfig(3, 2, 8, 13, 5, n_inner=20), GPTConfig(1, 2, 8, 13, 5, tied_head=False)]
)
def test_parameters_are_those_of_the_model(shape):
    assert count_parameters(shape) == GPT(shape).parameter_count()


def test_parameters_of_the_published_sizes():
    """As published (docs of the models); the study's shared numbers have the same."""
    counts = {name: count_parameters(shape) for name, shape in SIZES.items()}
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    medium = SIZES["gpt2-medium"]
    assert [count_adapters(medium, r, adapted_layers("all-linear")) for r in (1, 8)] == [393_216, 3_145_728]
    assert count_adapters(medium, 1, adapted_layers("all-linear,lm_head")) == 444_497
    assert count_adapters(medium, 1, adapted_layers("c_attn")) == 98_304
    assert adapted_layers("h.0.*") is None


@pytest.mark.parametrize("targets", [None, "all-linear", "c_attn", "attn.c_proj", "mlp.c_fc,mlp.c_proj", "mlp.c_proj"])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_are_what_autograd_keeps(targets, packed):
    """Every float tensor saved for backward, each storage once, without the weights."""
    model, tokens = model_of(targets=targets), torch.randint(11, (2, 64))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens, Documents.from_rows([[20, 44], [64]]) if packed else None)
    head = hidden.numel() * 4  # the gradient for the hidden states that the head's loss makes and keeps
    adapted = adapted_layers(targets) if targets else None
    counted = activation_bytes(SHAPE, 128, packed=packed, adapted=adapted, rank=3 if targets else 0)
    assert counted == sum(s.nbytes() for s in kept.values()) + head


def test_checkpointing_keeps_one_block_and_the_inputs_of_all():
    plain, saved = (activation_bytes(SIZES["gpt2"], 1024, checkpointed=c) for c in (False, True))
    assert saved < plain / 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("targets", [None, "all-linear,lm_head"])
def test_parameters_gradients_and_state_are_bytes_of_real_tensors(optimizer, targets):
    model = model_of(targets=targets)
    update = build_optimizer(model, optimizer, lr=0.1)
    hidden = model(torch.randint(11, (1, 8)))
    model.lm_head(hidden).sum().backward()
    update.step()
    rank = 3 if targets else 0
    memory = predict_memory(SHAPE, tokens=64, optimizer=optimizer, rank=rank, targets=targets or "all-linear")
    assert memory.parameters == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    slots = [
        v for s in update.state_dict()["state"].values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()
    ]
    assert memory.optimizer == sum(v.nbytes for v in slots)
    assert memory.total == memory.parameters + memory.gradients + memory.optimizer + memory.activations + memory.logits


def test_every_optimizer_has_its_count():
    assert set(SLOTS) == set(OPTIMIZERS)
