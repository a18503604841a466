"""LoRA against its formula, against autograd of the dense model that it stands for, and on what it must leave alone."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from reference import pack_batch, random_model
from tiny_runs import last_digest, tiny_config, train_losses
from tunesmith.data.batch import Batch
from tunesmith.errors import UserError
from tunesmith.files.weights import load_model
from tunesmith.models.gpt2 import GPT, GPTConfig
from tunesmith.models.known import SIZES
from tunesmith.models.lora import LoRALinear, apply_lora, disabled, find_targets, lora_layers, merge, strip, unmerge
from tunesmith.train.optim import build_optimizer
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum
from tunesmith.train.trainee import load_trainee

FLOAT64, FLOAT32, BF16 = 1e-12, 1e-5, 2e-2  # relative to the largest number compared
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=24)
UNTIED = replace(TINY, tied_head=False)
EVERYWHERE = "all-linear,lm_head"
RANK, SCALE = 3, 7.5 / 3
IDS = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


def fill(model):
    """Adapters as after a long training: both halves random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for half in (half for layer in lora_layers(model).values() for half in (layer.lora_A, layer.lora_B)):
            half.copy_(0.2 * torch.randn(half.shape, generator=generator))


def adapted(targets=EVERYWHERE, *, config=TINY, dtype=torch.float64, dropout=0.0):
    model = random_model(config, dtype=dtype)
    apply_lora(model, targets, rank=RANK, alpha=7.5, dropout=dropout)
    fill(model)
    return model.eval()


def layer(dropout=0.0):
    made = LoRALinear(nn.Linear(8, 6).double(), RANK, 7.5, dropout)
    nn.init.normal_(made.lora_B)
    return made


def formula(made, x, seen=None):
    """W x + b + alpha / rank * B A seen, by hand."""
    w, b, a, up = (t.detach().double() for t in (made.base.weight, made.base.bias, made.lora_A, made.lora_B))
    return x @ w.t() + b + SCALE * ((x if seen is None else seen) @ a.t()) @ up.t()


def full_batch():
    """Twenty packed rows: several chunks of the head, unsupervised tokens between."""
    generator = torch.Generator().manual_seed(2)
    rows = [[torch.randint(0, 61, (n,), generator=generator).tolist() for n in (5, 19)] for _ in range(20)]
    batch = pack_batch(rows, lambda document, t: t > 0)
    assert batch.count == 400 > 256
    return batch


def logits(model):
    return model.lm_head(model(IDS)).detach()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# What a layer computes


@pytest.mark.parametrize("shape", [(8,), (5, 8), (0, 8), (2, 3, 8), (2, 1, 2, 8)], ids=str)
def test_the_output_is_the_formulas_for_inputs_of_any_shape(shape):
    made, x = layer(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), formula(made, x), rtol=0, atol=FLOAT64)


def test_under_bf16_autocast_the_output_is_half_precision_and_near_and_gradients_are_float32():
    made, x = layer().float(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    close(y.double(), formula(made, x.double()), BF16)
    y.float().sum().backward()
    assert made.lora_A.grad.dtype == made.lora_B.grad.dtype == torch.float32


def test_dropout_takes_inputs_from_the_adapter_only_and_in_training_only():
    made, x = layer(dropout=0.4), torch.randn(50, 8, dtype=torch.float64)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.4)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.6])
    torch.manual_seed(3)
    torch.testing.assert_close(made(x), formula(made, x, mask * x), rtol=0, atol=FLOAT64)
    torch.testing.assert_close(made.eval()(x), formula(made, x), rtol=0, atol=FLOAT64)


def test_dropout_acts_on_the_heads_adapter_too():
    batch, model, plain = full_batch(), adapted("lm_head", dropout=0.4), adapted("lm_head")
    assert nll_sum(model, batch) == nll_sum(plain, batch)
    assert nll_sum(model.train(), batch) != nll_sum(model, batch)


@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE])
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_a_fresh_adapter_changes_not_one_bit(config, targets):
    model, base, batch = random_model(config), random_model(config), full_batch()
    names = apply_lora(model, targets, rank=RANK, alpha=6.0)
    assert list(lora_layers(model)) == names == find_targets(base, targets)
    assert torch.equal(logits(model), logits(base))
    assert torch.equal(nll_sum(model, batch), nll_sum(base, batch))
    fill(model)
    assert not torch.equal(logits(model), logits(base))


def test_a_is_uniform_with_its_scale_from_the_inputs_and_b_is_zero():
    """Kaiming uniform with a = sqrt(5): bound 1 / sqrt(in). Stored transposed it would be 1 / sqrt(rank), 2.8 times that."""
    made = LoRALinear(nn.Linear(512, 96), rank=64, alpha=1.0)
    assert (made.lora_A.shape, made.lora_B.shape) == ((64, 512), (96, 64))
    assert not made.lora_B.any()
    assert made.lora_A.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.02)
    assert made.lora_A.abs().max().item() == pytest.approx(512**-0.5, rel=1e-3)


def test_the_a_matrices_depend_on_their_seed_only_and_the_global_state_stays():
    models = [random_model(TINY) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (4, 4, 5), strict=True):
        apply_lora(model, rank=2, alpha=4.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = ([m.lora_A for m in lora_layers(model).values()] for model in models)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len({x.sum().item() for x in (*a, *c)}) == 16  # nor are two layers alike


# Training


@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE, "lm_head,h.1.mlp.*"])
def test_loss_and_gradients_equal_those_of_the_dense_model_by_the_chain_rule(targets):
    """dB = s dW A^T and dA = s B^T dW, with dW of a plain model whose weights are W + s B A, from full logits."""
    model, dense, batch = adapted(targets), random_model(UNTIED, dtype=torch.float64), full_batch()
    dense.load_state_dict(random_model(TINY, dtype=torch.float64).state_dict())
    layers = lora_layers(model)
    with torch.no_grad():
        for name, m in layers.items():
            dense.get_submodule(name).weight += SCALE * m.lora_B @ m.lora_A
    full = dense.lm_head(dense(batch.input_ids, batch.documents)).flatten(0, 1)[batch.rows]
    their_loss, our_loss = F.cross_entropy(full, batch.targets, reduction="sum"), nll_sum(model, batch)
    close(our_loss, their_loss, FLOAT64)
    their_loss.backward()
    our_loss.backward()
    for name, m in layers.items():
        d_w = dense.get_submodule(name).weight.grad
        close(m.lora_B.grad, SCALE * d_w @ m.lora_A.t(), 10 * FLOAT64)
        close(m.lora_A.grad, SCALE * m.lora_B.t() @ d_w, 10 * FLOAT64)
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {f"{name}.lora_{half}" for name in layers for half in "AB"}


def test_the_frozen_base_has_no_gradient_no_optimizer_state_and_keeps_every_bit():
    model = adapted()
    before, optimizer = bits(model), build_optimizer(model, "adamw", lr=1e-2)
    optimizer_step(model, [full_batch()], lambda b: nll_sum(model, b), optimizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == RANK * (2 * (32 + 96 + 32 + 32 + 2 * (32 + 128)) + 32 + 61)
    state = [t for slots in optimizer.state.values() for t in slots.values() if t.dim()]
    assert sum(t.numel() for t in state) == 2 * trained  # AdamW's two moments
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.lora_{half}" for name in lora_layers(model) for half in "AB"}


def test_the_bases_weight_gradients_are_not_even_computed():
    """Matrix products of a step: a layer's forward and backward to its input, and three of the adapter's halves.

    The first layer's input is frozen: nothing is computed for it. With all weights trained there is a third more.
    """
    batch = Batch(torch.arange(60).view(3, 20), torch.arange(60), torch.arange(60))  # all carry loss

    onednn = torch.ops.mkldnn._linear_pointwise

    def products(model):
        uncounted = {  # by torch
            aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1],
            onednn: lambda x, w, *_, **__: 2 * math.prod(x) * w[0],
        }
        with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
            nll_sum(model, batch).backward()
        counted = counter.get_flop_counts()["Global"]
        return sum(counted[op] for op in (aten.mm, aten.addmm, aten.addmm_, onednn) if op in counted) / 2 / 60

    shapes = [(32, 96), (32, 32), (32, 128), (128, 32)] * 2 + [(32, 61)]
    assert products(random_model(TINY)) == sum(3 * i * o for i, o in shapes)
    assert products(adapted()) == sum(2 * i * o + 3 * RANK * (i + o) for i, o in shapes) - 32 * 96 - RANK * 32


# Switching off, merging, taking off


@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE])
def test_disabled_gives_the_base_bit_for_bit_and_afterwards_all_is_as_it_was(targets, merged):
    model, base, batch = adapted(targets, dtype=torch.float32), random_model(TINY), full_batch()
    model.h[0].attn.c_attn.enabled = False
    if merged:
        merge(model)
    on, off = logits(model), logits(base)
    with disabled(model):
        assert torch.equal(logits(model), off)
        assert torch.equal(nll_sum(model, batch), nll_sum(base, batch))
        with disabled(model):
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), on)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)
    assert not torch.equal(on, off)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=str)
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_merged_equals_unmerged_once_or_twice_and_unmerging_gives_back_every_bit(config, dtype, tolerance):
    model, batch = adapted(config=config, dtype=dtype), full_batch()
    before, beside, loss = bits(model), logits(model), nll_sum(model, batch)
    merge(model)
    once = bits(model)
    assert not torch.equal(once["lm_head.base.weight"], before["lm_head.base.weight"])
    assert torch.equal(once["wte.weight"], before["wte.weight"])  # though the head was tied to it
    close(logits(model), beside, tolerance)
    close(nll_sum(model, batch), loss, tolerance)
    merge(model)
    assert same_bits(bits(model), once)
    for _ in range(2):
        unmerge(model)
        assert same_bits(bits(model), before)
        assert torch.equal(logits(model), beside)
        assert (model.lm_head.base.weight is model.wte.weight) == config.tied_head


def test_strip_leaves_a_plain_model_merged_or_the_base():
    base, merged, off = random_model(TINY), adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    merge(merged)
    expected = logits(merged)
    strip(merged)
    strip(off)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in base.named_modules()]
    assert torch.equal(logits(merged), expected)
    assert same_bits(bits(off), bits(base))


# Which layers, how many numbers

LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BLOCKS = [f"h.{i}.{name}" for i in range(2) for name in LINEAR]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", BLOCKS), (" lm_head , all-linear", [*BLOCKS, "lm_head"]), ("*", [*BLOCKS, "lm_head"]),
        ("c_attn", [BLOCKS[0], BLOCKS[4]]), ("c_proj", [BLOCKS[i] for i in (1, 3, 5, 7)]), ("h.0.*", BLOCKS[:4]),
        ("mlp.c_proj,c_attn", [BLOCKS[i] for i in (0, 3, 4, 7)]), ("h.1.mlp.c_fc", [BLOCKS[6]]),
        ("*.attn.*, h.?.mlp.c_fc, h.[1].*", [*BLOCKS[:3], *BLOCKS[4:]]),
    ],
)  # fmt: skip
def test_targets_are_ends_of_names_or_patterns_or_all_in_the_models_order(targets, found):
    assert find_targets(random_model(TINY), targets) == found
    with torch.device("meta"):
        deep = GPT(replace(TINY, n_layer=11))
    assert find_targets(deep, "mlp.c_fc,c_attn") == [f"h.{i}.{name}" for i in range(11) for name in LINEAR[::2]]


@pytest.mark.parametrize("parts", [
    ["nonsense"], [""], ["proj"], ["attn"], ["wte", "h.2.*"], ["C_ATTN"], ["all_linear"], ["tn.c_attn"],
])  # fmt: skip
def test_every_target_that_fits_no_layer_is_named_with_those_there_are(parts):
    with pytest.raises(UserError) as caught:
        apply_lora(random_model(TINY), ",".join(["c_attn", *parts]), rank=2, alpha=4.0)
    told = str(caught.value)
    assert all(part in told for part in ["--lora.targets", *map(repr, parts), *LINEAR, "lm_head", "all-linear"])
    assert "'c_attn'" not in told


@pytest.mark.parametrize("rank", [-1, 0, 33, 10**6])
def test_a_rank_that_the_matrix_cannot_have_is_refused_with_the_range(rank):
    with pytest.raises(UserError, match=rf"rank {rank} .*32 inputs and 96 outputs; expected 1 to 32"):
        apply_lora(random_model(TINY), rank=rank, alpha=4.0)


def test_adapters_cannot_be_put_on_twice():
    with pytest.raises(UserError, match="adapters"):
        apply_lora(adapted("all-linear"), rank=2, alpha=4.0)


COLUMNS = ["c_attn", "c_attn,attn.c_proj", "c_attn,c_proj", "all-linear", EVERYWHERE]
COUNTS = {
    ("gpt2", 1): [36_864, 55_296, 101_376, 147_456, 198_481],
    ("gpt2-large", 1): [184_320, 276_480, 506_880, 737_280, 788_817],
    ("gpt2-xl", 1): [307_200, 460_800, 844_800, 1_228_800, 1_280_657],
    ("gpt2-medium", 1): [98_304, 147_456, 270_336, 393_216, 444_497],
    ("gpt2-medium", 2): [196_608, 294_912, 540_672, 786_432, 888_994],
    ("gpt2-medium", 4): [393_216, 589_824, 1_081_344, 1_572_864, 1_777_988],
    ("gpt2-medium", 8): [786_432, 1_179_648, 2_162_688, 3_145_728, 3_555_976],
    ("gpt2-medium", 16): [1_572_864, 2_359_296, 4_325_376, 6_291_456, 7_111_952],
}


def trainable(size, targets, rank):
    with torch.device("meta"):
        model = GPT(SIZES[size])
    apply_lora(model, targets, rank=rank, alpha=1.0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("size", "rank"), COUNTS)
def test_trainable_parameters_of_the_published_sizes(size, rank):
    assert [trainable(size, targets, rank) for targets in COLUMNS] == COUNTS[size, rank]


# A whole run

RUN = {"lora__rank": 4, "lora__targets": EVERYWHERE, "optimizer__lr": 1e-2}
EVERYTHING = {
    **RUN, "lora__dropout": 0.2, "model__dropout": 0.1, "train__steps": 6, "train__accumulate": 2, "eval__every": 2,
    "checkpoint__every": 2, "checkpoint__keep": 9, "optimizer__schedule": "cosine", "data__block_size": 64,
}  # fmt: skip


def test_fine_tuning_with_adapters_lowers_the_loss_and_leaves_the_base_alone(tiny_directory, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "tunesmith.commands.training.load_trainee", lambda *a, **k: kept.append(load_trainee(*a, **k)) or kept[0]
    )
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **RUN, train__steps=20))
    losses = [line["validation_loss"] for line in run.metrics("eval")]
    assert losses[-1] < losses[0] - 1.0
    model = kept[0].trunk
    assert all(layer.lora_B.any() for layer in lora_layers(model).values())
    strip(model)
    assert same_bits(bits(model), bits(load_model(tiny_directory)))


def test_k_steps_and_resume_equal_n_steps_bit_for_bit(tiny_directory, tmp_path):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **EVERYTHING))
    for step in (4, 0):
        run = interrupted(whole, tmp_path / f"from-{step}", step)
        assert last_digest(run) != last_digest(whole)
        ts.sft(tiny_config(tiny_directory, run.path, **EVERYTHING, resume=True))
        assert_same_end(run, whole)


def test_a_step_split_into_micro_batches_is_the_same_step(tiny_directory, tmp_path):
    options = {**RUN, "data__batching": "padded", "eval__at_start": False}
    one = ts.sft(tiny_config(tiny_directory, tmp_path / "one", **options, train__batch_size=2))
    two = ts.sft(tiny_config(tiny_directory, tmp_path / "two", **options, train__batch_size=1, train__accumulate=2))
    assert train_losses(two) == pytest.approx(train_losses(one), rel=1e-6)
    assert len(set(train_losses(one))) == 6
