"""Recorded steps against plain ones, to the bit. A tape stands for the card's graphs (taped.py); test_gpu.py has the card."""

import dataclasses
import math

import pytest
import torch
from test_out_of_memory_runs import steps_short_of

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted, stored_state
from reference import random_model
from taped import Card, Tape
from tiny_runs import comparable, last_digest, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.data.batch import Batch
from tunesmith.errors import UsageError
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.lora import apply_lora
from tunesmith.options.training import DPOConfig, SFTConfig
from tunesmith.train import launch, resolve
from tunesmith.train.optim import build_optimizer, set_learning_rate
from tunesmith.train.resolve import resolve_cuda_graphs
from tunesmith.train.step import Unread, optimizer_step, step_on_device
from tunesmith.train.step_graph import WARM_UP, RecordedStep
from tunesmith.train.token_loss import nll_sum

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=64, block_size=32, tied_head=False)
STEPS, BAD = 20, 63  # a token whose embedding is infinite
OPTIMIZERS = ("adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov")


def window(number, width=24, token=None):
    """Texts that can be learnt, all tokens with loss; `token` in the middle of it."""
    ids = (torch.arange(width + 1) * 3 + 5 * number)[None] % 60
    if token is not None:
        ids[0, width // 2] = token
    return Batch(ids[:, :-1].clone(), torch.arange(width), ids[0, 1:].clone())


def steps_of(accumulate, change=None):
    """The micro-batches of 20 steps; change: step -> what `window` is asked for in the last of its micro-batches."""
    numbers = range(STEPS * accumulate)
    asked = {(step + 1) * accumulate - 1: what for step, what in (change or {}).items()}
    batches = [window(i, **asked.get(i, {})) for i in numbers]
    return [batches[i : i + accumulate] for i in numbers[::accumulate]]


class Trained:
    """20 steps from the same weights. record: how steps are recorded; None: they are the plain ones."""

    def __init__(
        self, steps, record=None, *, name="adamw", dropout=0.0, precision="fp32", lora=0, loss=nll_sum, mode=False
    ):
        torch.manual_seed(3)
        self.model = random_model(dataclasses.replace(SHAPE, dropout=dropout)).train()
        self.model.wte.weight.data[BAD] = math.inf
        self.model.activation_checkpointing = mode
        if lora:
            apply_lora(self.model, rank=lora, alpha=2 * lora)
        self.optimizer, self.said, self.seen = build_optimizer(self.model, name, lr=0.0), [], []
        more = {"loss_sum": lambda b: loss(self.model, b, precision), "optimizer": self.optimizer, "max_norm": 0.5}
        take = lambda batches: optimizer_step(self.model, batches, **more)  # noqa: E731
        if record:
            more["halted"] = torch.zeros(())
            step = lambda batches: step_on_device(self.model, batches, **more)  # noqa: E731
            recorded = RecordedStep(step, self.optimizer, record, torch.device("cpu"), self.said.append)
            take = lambda batches: Unread(recorded(batches))  # noqa: E731
        for number, batches in enumerate(steps, 1):
            set_learning_rate(
                self.optimizer, number / 2**9
            )  # float32 has it, so that tensor and number are the same rate
            self.seen.append(take(batches))
        self.seen = [
            seen.read() for seen in self.seen
        ]  # at the very end: no later step writes over a former one's numbers
        self.random = torch.rand(())

    def is_that_of(self, other):
        assert self.seen == other.seen
        assert all(torch.equal(p, q) for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True))
        assert self.random == other.random
        assert all(p.grad is None for p in self.model.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_20_recorded_steps_are_the_plain_ones_to_the_bit(name, accumulate):
    """Losses, gradient norms, clipping, a rate that changes with every step, several micro-batches."""
    tape, steps = Tape(), steps_of(accumulate)
    plain, recorded = Trained(steps, name=name), Trained(steps, tape.record, name=name)
    recorded.is_that_of(plain)
    assert tape.replays == STEPS - WARM_UP
    assert plain.seen[-1].loss < plain.seen[0].loss
    assert all(s.grad_norm > 0.5 for s in plain.seen), "every step is clipped"


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.2}, {"precision": "bf16"}, {"lora": 2}, {"lora": 2, "dropout": 0.2, "precision": "bf16"}, {"mode": "selective"}],
    ids=str,
)  # fmt: skip
def test_so_they_are_with_dropout_in_bf16_with_adapters_and_activations_made_again(options):
    tape, steps = Tape(), steps_of(2)
    Trained(steps, tape.record, **options).is_that_of(Trained(steps, **options))
    assert tape.replays == STEPS - WARM_UP


def test_a_recording_holds_no_host_number_that_changes():
    """What the tape is for: a rate that is a host number stays in a recording as it was."""
    weight, tape = torch.nn.Parameter(torch.ones(3)), Tape()
    optimizer = torch.optim.SGD([weight], 1.0, fused=True)

    def work():
        weight.grad = torch.ones(3)
        optimizer.step()

    replay = tape.record(work)
    assert weight.tolist() == [1, 1, 1], "recording does nothing"
    set_learning_rate(optimizer, 0.25)
    replay()
    assert weight.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [1, 12])
def test_after_a_step_that_is_not_finite_nothing_moves_any_more(name, bad):
    """Not by a later good step either: the host may not have seen the bad one. Once before the recording, once inside."""
    steps = steps_of(2, {bad: {"token": BAD}})
    recorded, plain = Trained(steps, Tape().record, name=name), Trained(steps[:bad], name=name)
    assert [s.updated for s in recorded.seen] == [True] * bad + [False] * (STEPS - bad)
    assert recorded.seen[:bad] == plain.seen
    assert not math.isfinite(recorded.seen[bad].loss)
    assert math.isfinite(recorded.seen[bad + 1].loss)
    assert all(torch.equal(p, q) for p, q in zip(recorded.model.parameters(), plain.model.parameters(), strict=True))
    held = [[v for s in t.optimizer.state.values() for v in s.values()] for t in (recorded, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


def test_a_step_of_another_signature_is_taken_plainly_and_one_that_stays_is_recorded_anew():
    once = {number: {"width": 20} for number in (8, 11)}
    for changed, tapes, replays in [
        (once, 1, STEPS - WARM_UP - 2),
        ({number: {"width": 20} for number in range(8, STEPS)}, 2, 14),
    ]:
        made, steps = [], steps_of(2, changed)

        def record(work, made=made):
            made.append(Tape())
            return made[-1].record(work)

        Trained(steps, record).is_that_of(Trained(steps))
        assert (len(made), sum(t.replays for t in made)) == (tapes, replays)


def test_where_recording_fails_all_steps_are_plain_and_one_line_says_why():
    """Failing in the middle: gradients of the first micro-batch are there, which nobody has computed."""

    losses = []

    def waits(model, batch, precision):
        losses.append(nll_sum(model, batch, precision))
        assert len(losses) % 2 or losses[-1].item() > 0
        return losses[-1]

    tape, steps = Tape(), steps_of(2)
    failed = Trained(steps, tape.record, loss=waits)
    failed.is_that_of(Trained(steps))
    assert tape.replays == 0
    (line,) = failed.said
    assert "not recorded as a CUDA graph (operation not permitted when stream is capturing); their kernels" in line


def test_a_step_that_waits_leaves_the_dropout_of_the_plain_steps_as_it_was(monkeypatch):
    """The masks too: what a recording drew that broke off was not drawn."""

    def waits(model, batch, precision):
        loss = nll_sum(model, batch, precision)
        assert loss.item() > 0
        return loss

    steps = steps_of(1)[:8]
    with Card(monkeypatch) as card:
        failed = Trained(steps, card.record, loss=waits, dropout=0.2)
    failed.is_that_of(Trained(steps, dropout=0.2))
    assert "not recorded as a CUDA graph (operation not permitted when stream is capturing)" in failed.said[0]


def test_memory_that_ends_while_recording_is_a_failure_like_any_other():
    def record(work):
        work()  # as far as gradients
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    steps = steps_of(1)[:WARM_UP]
    assert not Trained(steps, record).said
    assert "(CUDA out of memory. Tried)" in Trained(steps_of(1)[: WARM_UP + 1], record).said[0]


# ---- the command -----------------------------------------------------------------------------------------------------

WINDOWS = {
    "data__batching": "windows", "data__block_size": 64, "train__steps": 12, "eval__every": 6, "checkpoint__every": 6,
    "train__accumulate": 2, "optimizer__lr": 2.0**-10,
}  # fmt: skip


@pytest.fixture
def tapes(monkeypatch):
    """As on a card: steps are read late and may be recorded, on a tape. The tapes."""
    made = []

    def recorder(device):
        made.append(Tape())
        return made[-1].record

    monkeypatch.setattr(resolve, "RECORDS_ON", ("cuda", "cpu"))
    monkeypatch.setattr(launch, "READ_LATE_ON", ("cpu",))
    monkeypatch.setattr(launch, "recorder", recorder)
    return made


def test_a_recorded_run_is_the_plain_run(tiny_directory, tmp_path, tapes, monkeypatch):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "recorded", **WINDOWS))
    assert [t.replays for t in tapes] == [12 - WARM_UP]
    assert run.config["train"]["cuda_graphs"] is True
    monkeypatch.undo()
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", **WINDOWS))
    assert plain.config["train"]["cuda_graphs"] is False
    assert_same_end(run, plain)


def test_a_resumed_recorded_run_is_the_whole_one(tiny_directory, tmp_path, tapes):
    """A cosine in float32: to the bit among recorded runs, near the plain one."""
    options = {**WINDOWS, "model__dropout": 0.2, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 3}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    run = interrupted(whole, tmp_path / "cut", 6)
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert [t.replays for t in tapes] == [12 - WARM_UP, 6 - WARM_UP]
    assert_same_end(run, whole)
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", **options, train__cuda_graphs=False))
    assert train_losses(whole) == pytest.approx(train_losses(plain), rel=1e-5)
    assert stored_state(whole)[0]["progress"]["tokens"] == stored_state(plain)[0]["progress"]["tokens"]


def test_memory_that_ends_splits_the_step_and_the_parts_are_recorded(tiny_directory, tmp_path, tapes, monkeypatch):
    options = {**WINDOWS, "train__batch_size": 4}
    failures = steps_short_of(monkeypatch, "sft", 150)
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "recorded", **options))
    assert failures == [256]
    assert [t.replays for t in tapes] == [12 - WARM_UP]
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", **options, train__cuda_graphs=False))
    assert comparable(run) == comparable(plain)
    assert last_digest(run) == last_digest(plain)


def test_what_cannot_be_recorded_is_refused_with_every_reason(tmp_path, capsys):
    asked = [
        "sft",
        "--train.cuda_graphs",
        "true",
        "--model.name",
        "sample",
        "--data.name",
        "sample",
        "--train.device",
        "cpu",
    ]
    assert main([*asked, "--out", str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    assert (
        "--train.cuda_graphs true: --train.device is cpu, and graphs need a CUDA device; --data.batching packed changes"
        in told
    )
    assert "Use false, or auto" in told


AGAINST = {
    "packed changes": {"data__batching": "packed"}, "padded changes": {"data__batching": "padded"},
    "optimizer_in_backward": {"train__optimizer_in_backward": True}, "weights bf16": {"train__weights": "bf16"},
    "adamw8bit": {"optimizer__name": "adamw8bit"}, "checkpointing true": {"train__activation_checkpointing": True},
    "fp16": {"precision": "fp16"}, "is cpu": {"device": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("reason", AGAINST)
def test_each_reason_against_recording_counts_alone(reason):
    options = {"data__batching": "windows", **AGAINST[reason]}
    device, precision = torch.device(options.pop("device", "cuda")), options.pop("precision", "bf16")
    wanted, auto = (tiny_config("m", "o", **options, train__cuda_graphs=asked) for asked in (True, "auto"))
    with pytest.raises(UsageError, match=reason) as caught:
        resolve_cuda_graphs(wanted, device, precision)
    assert ";" not in str(caught.value)
    assert resolve_cuda_graphs(auto, device, precision) is False


def test_auto_records_small_batches_on_a_card_and_true_large_ones_too():
    def resolved(kind=SFTConfig, **options):
        return resolve_cuda_graphs(tiny_config("m", "o", kind, **options), torch.device("cuda:1"), "bf16")

    paper = {"data__batching": "windows", "data__block_size": 1024}
    assert resolved(**paper, train__batch_size=8) is True
    assert resolved(**paper, train__batch_size=9) is False
    assert resolved(**paper, train__batch_size=9, train__cuda_graphs=True) is True
    assert resolved(**paper, train__cuda_graphs=False) is False
    assert resolved(**paper, train__weights="bf16", lora__rank=4) is True, "the frozen base only"
    assert resolved(DPOConfig) is False
