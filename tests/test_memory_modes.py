"""Every way to train in less memory against the plain step: equal to the bit, or within the bound that stands here."""

import contextlib
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

import tunesmith as ts
from reference import pack_batch, random_model
from test_resume import assert_same_end, interrupted
from tiny_runs import tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.models import recompute
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.head import head_nll_sum
from tunesmith.models.lora import apply_lora
from tunesmith.plan.memory import BF16_SLICE
from tunesmith.train import optim
from tunesmith.train.optim import OneByOne, build_optimizer, round_stochastically, set_learning_rate
from tunesmith.train.step import clip, optimizer_step
from tunesmith.train.token_loss import nll_sum
from tunesmith.train.trainee import store_in_bf16

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=128, block_size=32)
STEPS = 20
PLAIN = ("adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (the extra 8bit)"
)


def batches():
    """20 packed batches of 2 x 32 tokens in three documents, loss on two thirds of them; the texts can be learnt."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        starts = torch.randint(0, 128, (3,), generator=generator).tolist()
        a, b, c = ([(s + 3 * i) % 128 for i in range(n)] for s, n in zip(starts, (12, 20, 32), strict=True))
        yield pack_batch([[a, b], [c]], lambda document, t: t % 3 < 2)


def train(
    *, checkpointing=False, in_backward=False, bf16=False, lora=None, name="adamw", precision="fp32", dropout=0.0, max_norm=0.0,
    prepare=lambda model: None, seen_by=lambda optimizer: None,
):  # fmt: skip
    """20 steps from the same weights: the model, and what each step saw."""
    torch.manual_seed(11)
    model = random_model(GPTConfig(**{**vars(SHAPE), "dropout": dropout}))
    prepare(model)
    if lora:
        apply_lora(model, lora, rank=3, alpha=6, seed=1)
    if bf16:
        store_in_bf16(model)
    model.train().activation_checkpointing = checkpointing
    optimizer = build_optimizer(model, name, lr=0.0)
    if in_backward or bf16:
        optimizer = OneByOne(optimizer, in_backward=in_backward)
    seen = []
    for number, batch in enumerate(batches()):
        set_learning_rate(optimizer, 1e-2 / (1 + number))
        seen.append(
            optimizer_step(model, [batch], lambda b: nll_sum(model, b, precision), optimizer, max_norm=max_norm)
        )
    seen_by(optimizer)
    return model, seen


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(one, other):
    for name, p in weights(one).items():
        assert torch.equal(p, weights(other)[name]), name


def losses(seen):
    return [s.loss for s in seen]


# activations computed again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, "all-linear", "mlp.c_proj,lm_head"])
@pytest.mark.parametrize("mode", ["selective", True])
def test_20_steps_with_activations_computed_again_are_the_plain_ones_to_the_bit(mode, lora, precision):
    plain, seen = train(lora=lora, precision=precision)
    other, seen_too = train(lora=lora, precision=precision, checkpointing=mode)
    assert_same_weights(plain, other)
    assert seen == seen_too
    assert lora or losses(seen)[-1] < losses(seen)[0]


@pytest.mark.parametrize("mode", ["selective", True])
def test_dropout_draws_the_same_masks_in_a_second_pass(mode):
    assert_same_weights(train(dropout=0.2)[0], train(dropout=0.2, checkpointing=mode)[0])


def kept_bytes(mode, monkeypatch, precision="fp32"):
    """Float tensors that autograd keeps of one forward pass, each storage once, without the weights."""
    model = random_model(SHAPE).train()
    model.activation_checkpointing = mode
    ours, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(x):
        if x.is_floating_point() and (storage := x.untyped_storage()).data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return x

    @contextlib.contextmanager
    def noting_too(pack, unpack):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: packed if not isinstance(packed := pack(x), torch.Tensor) else note(packed), unpack
        ):
            yield

    monkeypatch.setattr(recompute, "saved_tensors_hooks", noting_too)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        hidden = model(torch.randint(128, (2, 32)), Documents.from_rows([[12, 20], [32]]))
    assert hidden.requires_grad
    return sum(s.nbytes() for s in kept.values())


def test_selective_keeps_neither_what_norms_nor_what_gelu_give(monkeypatch):
    """Of a block's 17 C numbers a token it spares the inputs of c_attn (C), c_fc (C) and of the MLP's second layer (4 C)."""
    spared = kept_bytes(False, monkeypatch) - kept_bytes("selective", monkeypatch)
    assert spared == SHAPE.n_layer * 64 * 6 * SHAPE.n_embd * 4
    assert kept_bytes(False, monkeypatch, "bf16") - kept_bytes("selective", monkeypatch, "bf16") >= spared / 2


def test_what_is_not_wanted_is_not_computed_again(monkeypatch):
    """Without gradients nothing is kept, so the plain way is taken."""
    monkeypatch.setattr(recompute, "saved_tensors_hooks", None)
    model = random_model(SHAPE)
    model.activation_checkpointing = "selective"
    with torch.no_grad():
        assert torch.equal(model(torch.arange(8)[None]), random_model(SHAPE)(torch.arange(8)[None]))


# the update inside backward


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("lora", [None, "all-linear"])
def test_20_steps_with_the_update_in_backward_are_the_plain_ones_to_the_bit(name, lora):
    plain, seen = train(name=name, lora=lora)
    other, seen_too = train(name=name, lora=lora, in_backward=True)
    assert_same_weights(plain, other)
    assert losses(seen) == losses(seen_too)
    assert [s.grad_norm for s in seen_too] == pytest.approx([s.grad_norm for s in seen], rel=1e-6)


def test_gradients_are_gone_as_soon_as_they_are_used():
    """At every update no other parameter holds a gradient."""
    model = random_model(SHAPE).train()
    optimizer = OneByOne(build_optimizer(model, "adamw", lr=1e-3), in_backward=True)
    alive, update = [], optimizer._update

    def counting(p):
        alive.append(sum(q.grad is not None for q in model.parameters()))
        update(p)

    optimizer._update = counting
    optimizer_step(model, [next(batches())], lambda b: nll_sum(model, b), optimizer)
    assert alive == [1] * len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [*PLAIN, pytest.param("adamw8bit", marks=needs_torchao)])
def test_state_made_before_the_first_step_changes_nothing(name, bf16):
    weights_after = []
    for early in (False, True):
        model = random_model(SHAPE)
        if bf16:
            store_in_bf16(model)
        before = {n: p.clone() for n, p in weights(model).items()}
        optimizer = OneByOne(build_optimizer(model, name, lr=1e-2, weight_decay=0.1), in_backward=False)
        if early:
            optimizer.allocate_state()
            assert_same_weights(model, SimpleNamespace(named_parameters=before.items))
            assert all(p.grad is None for p in model.parameters())
            held = [v for s in optimizer.state.values() for key, v in s.items() if key != "step"]
            assert len(held) == {"sgd": 0, "sgd-momentum": 1, "sgd-nesterov": 1}.get(name, 2) * len(before)
        torch.manual_seed(3)
        for batch in list(batches())[:2]:
            optimizer_step(model, [batch], lambda b, m=model: nll_sum(m, b), optimizer)
        weights_after.append(model)
    assert_same_weights(*weights_after)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    def poison(model):
        model.ln_f.weight.data[0] = math.inf

    model, seen = train(in_backward=True, prepare=poison)
    before = random_model(SHAPE)
    poison(before)
    assert_same_weights(model, before)
    assert not any(s.updated for s in seen)


def test_what_cannot_be_done_in_backward_is_refused(tmp_path, capsys):
    asked = ["sft", "--train.optimizer_in_backward", "true", "--model.name", "sample", "--data.name", "sample"]
    assert main([*asked, "--out", str(tmp_path / "a")]) == 2
    assert "wants --train.accumulate 1 and --train.grad_clip 0 (now 1 and 1)" in capsys.readouterr().err
    assert main([*asked, "--train.grad_clip", "0", "--train.accumulate", "2", "--out", str(tmp_path / "a")]) == 2
    assert "(now 2 and 0)" in capsys.readouterr().err
    assert main([*asked, "--train.grad_clip", "0", "--train.precision", "fp16", "--out", str(tmp_path / "a")]) == 2
    assert "--train.precision fp16 scales the loss" in capsys.readouterr().err


# weights in bfloat16


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


# 8 bits of state


@needs_torchao
def test_20_steps_with_8_bit_state_stay_near_adamw_at_a_byte_a_number():
    """Bound: every loss within 1 % of AdamW's. Parameters of fewer than 4,096 numbers keep float32."""
    _, seen = train()
    held = {}
    model, seen_too = train(name="adamw8bit", seen_by=lambda optimizer: held.update(optimizer.state))
    assert losses(seen_too) == pytest.approx(losses(seen), rel=0.01)
    assert losses(seen_too) != losses(seen)
    for p in model.parameters():
        parts = optim.state_parts(held[p]["exp_avg"])
        size = sum(part.nbytes for key, part in parts.items() if key != ".qmap")
        assert size == (p.numel() + 4 * p.numel() // 256 if p.numel() >= 4096 else 4 * p.numel())
    other, _ = train(name="adamw8bit", in_backward=True)
    assert_same_weights(model, other)


def test_8_bit_state_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tunesmith\[8bit\]', or take adamw"):
        build_optimizer(random_model(SHAPE), "adamw8bit", lr=1e-3)


# whole runs

MODES = {
    "lean": {"train__activation_checkpointing": True, "train__optimizer_in_backward": True, "train__grad_clip": 0.0},
    "selective": {"train__activation_checkpointing": "selective", "train__accumulate": 2},
    "bf16": {"train__weights": "bf16"},
    "bf16, precision too": {"train__weights": "bf16", "train__precision": "bf16", "train__activation_checkpointing": "selective"},
    "bf16 lora": {"train__weights": "bf16", "lora__rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("mode", [*MODES, pytest.param("8 bits", marks=needs_torchao)])
def test_a_run_in_this_mode_learns_and_resumes_bit_for_bit(mode, tiny_directory, tmp_path):
    options = MODES.get(mode) or {"optimizer__name": "adamw8bit"}
    reference = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    assert train_losses(reference)[-1] < train_losses(reference)[0]
    run = interrupted(reference, tmp_path / "cut", 3)
    assert_same_end(ts.sft(tiny_config(tiny_directory, run.path, resume=True, **options)), reference)


@pytest.mark.parametrize("mode", ["lean", "selective"])
def test_an_exact_mode_gives_the_checkpoint_of_the_plain_run(mode, tiny_directory, tmp_path):
    clip = {"train__grad_clip": 0.0, "train__accumulate": MODES[mode].get("train__accumulate", 1)}
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", **clip))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "mode", **{**clip, **MODES[mode]}))
    assert train_losses(run) == train_losses(plain)
    for ours, theirs in zip(run.checkpoints(), plain.checkpoints(), strict=True):
        assert (ours[1] / "model.safetensors").read_bytes() == (theirs[1] / "model.safetensors").read_bytes()
