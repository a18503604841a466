"""Every way to train in less memory against the plain step: equal to the bit, or within the bound that stands here."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from reference import random_model
from tensors_made import kept_by_autograd
from tiny_runs import tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.models import recompute
from tunesmith.models.attention import Documents
from tunesmith.train import optim
from tunesmith.train.optim import OneByOne, build_optimizer
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum
from tunesmith.train.trainee import store_in_bf16
from twenty_steps import PLAIN, SHAPE, assert_same_weights, batches, losses, train, weights

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (the extra 8bit)"
)


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


def kept_bytes(mode, precision="fp32"):
    """Float tensors that autograd keeps of one forward pass."""
    model = random_model(SHAPE).train()
    model.activation_checkpointing = mode
    ids, documents = torch.randint(128, (2, 32)), Documents.from_rows([[12, 20], [32]])
    return kept_by_autograd(model, ids, documents, half=precision == "bf16")


def test_selective_keeps_neither_what_norms_nor_what_gelu_give():
    """Of a block's 17 C numbers a token it spares the inputs of c_attn (C), c_fc (C) and of the MLP's second layer (4 C)."""
    spared = kept_bytes(False) - kept_bytes("selective")
    assert spared == SHAPE.n_layer * 64 * 6 * SHAPE.n_embd * 4
    assert kept_bytes(False, "bf16") - kept_bytes("selective", "bf16") >= spared / 2


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
    assert "needs --train.accumulate 1 and --train.grad_clip 0 (now 1 and 1)" in capsys.readouterr().err
    assert main([*asked, "--train.grad_clip", "0", "--train.accumulate", "2", "--out", str(tmp_path / "a")]) == 2
    assert "(now 2 and 0)" in capsys.readouterr().err
    assert main([*asked, "--train.grad_clip", "0", "--train.precision", "fp16", "--out", str(tmp_path / "a")]) == 2
    assert "--train.precision fp16 scales the loss" in capsys.readouterr().err


# weights in bfloat16


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
    with pytest.raises(UserError, match=r"pip install 'tunesmith\[8bit\]', or use adamw"):
        build_optimizer(random_model(SHAPE), "adamw8bit", lr=1e-3)


# whole runs

MODES = {
    "lean": {"train__activation_checkpointing": True, "train__optimizer_in_backward": True, "train__grad_clip": 0.0},
    "selective": {"train__activation_checkpointing": "selective", "train__accumulate": 2},
    "bf16": {"train__weights": "bf16"},
    "bf16, precision too": {"train__weights": "bf16", "train__precision": "bf16", "train__activation_checkpointing": "selective"},
    "bf16 lora": {"train__weights": "bf16", "lora__rank": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "mode", [*MODES, pytest.param("8 bits", marks=[needs_torchao, pytest.mark.long])]
)  # it compiles
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
