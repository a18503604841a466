"""Memory counted from the shape against memory of real tensors."""

import itertools

import pytest
import torch

from tensors_made import kept_by_autograd
from tunesmith.data.batch import Batch
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT, GPTConfig
from tunesmith.models.head import head_nll_sum, states_and_head
from tunesmith.models.known import SIZES
from tunesmith.models.lora import apply_lora
from tunesmith.options.training import SLOTS
from tunesmith.plan.memory import (
    Work,
    activation_bytes,
    adapted_layers,
    count_adapters,
    predict_memory,
    state_bytes,
)
from tunesmith.plan.workload import shared_keys
from tunesmith.train.optim import OPTIMIZERS, OneByOne, build_optimizer, state_parts
from tunesmith.train.step import optimizer_step
from tunesmith.train.trainee import store_in_bf16

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=11, block_size=64)


def adapted(targets):
    return adapted_layers(SIZES["gpt2"], targets)


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
    assert shape.family.count(shape) == GPT(shape).parameter_count()


def test_parameters_of_the_published_sizes():
    """As published (docs of the models); the study's shared numbers have the same."""
    counts = {name: shape.family.count(shape) for name, shape in SIZES.items()}
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "HuggingFaceTB/SmolLM2-135M": 134_515_008,
        "HuggingFaceTB/SmolLM2-360M": 361_821_120,
        "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
        "meta-llama/Llama-3.2-1B": 1_235_814_400,
        "meta-llama/Llama-3.2-3B": 3_212_749_824,
        "Qwen/Qwen2.5-0.5B": 494_032_768,
        "Qwen/Qwen2.5-1.5B": 1_543_714_304,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "EleutherAI/pythia-70m": 70_426_624,
        "EleutherAI/pythia-160m": 162_322_944,
        "EleutherAI/pythia-410m": 405_334_016,
        "EleutherAI/pythia-1b": 1_011_781_632,
        "EleutherAI/pythia-1.4b": 1_414_647_808,
        "google/gemma-3-270m": 268_098_176,
        "google/gemma-3-1b-pt": 999_885_952,
    }
    medium = SIZES["gpt2-medium"]
    assert [count_adapters(medium, r, adapted("all-linear")) for r in (1, 8)] == [393_216, 3_145_728]
    assert count_adapters(medium, 1, adapted("all-linear,lm_head")) == 444_497
    assert count_adapters(medium, 1, adapted("c_attn")) == 98_304
    assert adapted("h.0.*") is None


def work(**more):
    targets = more.pop("targets", None)
    rank = 3 if targets else 0
    return Work(**{"tokens": 128, "rank": rank, "targets": adapted(targets) if targets else ()} | more)


@pytest.mark.parametrize("supervised", [None, 50])
@pytest.mark.parametrize("checkpointing", [False, "selective"])
@pytest.mark.parametrize("targets", [None, "all-linear", "c_attn", "attn.c_proj", "mlp.c_fc,mlp.c_proj", "mlp.c_proj"])
@pytest.mark.parametrize("packed", [True, False])
def test_activations_are_what_autograd_keeps(targets, packed, checkpointing, supervised):
    model, tokens = model_of(targets=targets), torch.randint(11, (2, 64))
    model.activation_checkpointing = checkpointing
    rows = None if supervised is None else torch.arange(128)[:supervised]
    found = kept_by_autograd(model, tokens, Documents.from_rows([[20, 44], [64]]) if packed else None, rows)
    counted = work(targets=targets, packed=packed, checkpointing=checkpointing, supervised=supervised)
    assert activation_bytes(SHAPE, counted) == found


def test_answers_that_share_a_prompt_keep_their_keys_and_values_put_together():
    """Each of two answers has the prompt's keys before its own; the masks are there once, for all layers."""
    model, stretches = model_of(), [20, 10, 14, 30, 34, 20]  # two pairs: prompt, chosen, rejected
    documents = Documents.from_rows([stretches], parents=[-1, 0, 0, -1, 3, 3])
    keys = 2 * (20 + 30) + 10 + 14 + 34 + 20
    found = kept_by_autograd(model, torch.randint(11, (1, 128)), documents)
    masks = 4 * (10 * 30 + 14 * 34 + 34 * 64 + 20 * 50)
    assert activation_bytes(SHAPE, work(shared_keys=keys)) + masks == found
    assert keys == shared_keys(128, (10 + 14 + 34 + 20) / 128)


def test_checkpointing_keeps_the_inputs_of_all_blocks():
    model = model_of()
    model.activation_checkpointing = True
    kept = activation_bytes(SHAPE, work(checkpointing=True))
    assert kept == kept_by_autograd(model, torch.randint(11, (2, 64)), Documents.from_rows([[64], [64]]))
    plain, saved = (activation_bytes(SIZES["gpt2"], Work(1024, checkpointing=c)) for c in (False, True))
    assert saved < plain / 10


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw8bit"])
@pytest.mark.parametrize("targets", [None, "all-linear,lm_head"])
@pytest.mark.parametrize("bf16", [False, True])
def test_parameters_gradients_and_state_are_bytes_of_real_tensors(optimizer, targets, bf16):
    model = model_of(targets=targets)
    if bf16:
        store_in_bf16(model)
    plain = build_optimizer(model, optimizer, lr=0.1)
    hidden = model(torch.randint(11, (1, 8)))
    model.lm_head(hidden).sum().backward()
    memory = predict_memory(SHAPE, work(tokens=64, optimizer=optimizer, targets=targets, bf16_weights=bf16))
    assert memory.parameters == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    (OneByOne(plain, in_backward=False) if bf16 and not targets else plain).step()
    slots = [
        v for s in plain.state_dict()["state"].values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()
    ]
    assert memory.optimizer == sum(v.nbytes for v in slots)


def test_state_in_8_bits_is_that_of_torchao():
    ao = pytest.importorskip("torchao.optim", reason="torchao is not installed (tunesmith[8bit])")
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=300, block_size=64))
    update = ao.AdamW8bit(model.parameters())
    found = 0
    for p in model.parameters():
        for signed in (True, False):
            state = update._new_buffer(p, signed)
            found += sum(part.nbytes for name, part in state_parts(state).items() if name != ".qmap")
    assert state_bytes(model.config, Work(64, "adamw8bit")) == found


def test_the_peak_is_that_of_real_tensors():
    """Weights, state and all that a step makes, by torch's profiler: every mode within 3 % (small tensors are not counted)."""
    shape = GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=8192, block_size=256)
    for number, mode in enumerate(MODES):
        counted = work(tokens=256, supervised=128, chunk=64, **mode)
        peak = peak_of_a_step(shape, counted)
        assert predict_memory(shape, counted).peak == pytest.approx(peak, rel=0.03), (number, mode)


MODES = [
    {}, {"optimizer": "sgd"}, {"checkpointing": "selective"}, {"checkpointing": True}, {"in_backward": True},
    {"in_backward": True, "checkpointing": True, "optimizer": "sgd-momentum"}, {"bf16_weights": True},
    {"bf16_weights": True, "in_backward": True}, {"targets": "all-linear"}, {"targets": "c_attn", "checkpointing": "selective"},
    {"targets": "all-linear", "bf16_weights": True}, {"micro_batches": 2}, {"packed": False},
]  # fmt: skip


def peak_of_a_step(shape, counted):
    """Bytes of weights, state and the most that a step has beside them, by torch's profiler."""
    model = model_of(shape, ",".join(counted.targets) if counted.rank else None)
    if counted.bf16_weights:
        store_in_bf16(model)
    model.activation_checkpointing = counted.checkpointing
    plain = build_optimizer(model, counted.optimizer, lr=1e-3)
    one_by_one = counted.in_backward or (counted.bf16_weights and not counted.rank)
    update = OneByOne(plain, in_backward=counted.in_backward) if one_by_one else plain
    documents = Documents.from_rows([[100, 156]]) if counted.packed else None
    rows, targets = torch.arange(counted.supervised) * 2, torch.randint(shape.vocab_size, (counted.supervised,))
    batch = Batch(torch.randint(shape.vocab_size, (1, counted.tokens)), rows, targets, documents)

    def loss_sum(b):
        hidden, weight, low_rank = states_and_head(model, b)
        return head_nll_sum(hidden, weight, b.targets, low_rank=low_rank, chunk=counted.chunk)

    def step():
        optimizer_step(model, [batch] * counted.micro_batches, loss_sum, update)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    state = [v for s in plain.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    held = sum(p.nbytes for p in model.parameters()) + sum(v.nbytes for v in state)
    return held + max(itertools.accumulate(sizes))


def test_every_optimizer_has_its_count():
    assert set(SLOTS) == set(OPTIMIZERS)
