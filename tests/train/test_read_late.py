"""Steps launched before the one before is read: the same log, checkpoints, status and weights as step by step."""

import math
import os
import signal
import time
from collections import deque
from itertools import pairwise

import pytest
import torch

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from short_memory import fail
from tiny_runs import change_step_loss, comparable, last_digest, tiny_config
from tunesmith.data.epochs import Batches
from tunesmith.errors import UserError
from tunesmith.options.training import DPOConfig
from tunesmith.train import launch, loop
from tunesmith.train.step import StepStats, Unread

STEPS = {
    "train__steps": 8, "eval__every": 4, "checkpoint__every": 4, "data__block_size": 64, "train__accumulate": 2,
    "model__dropout": 0.2, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 3,
}  # fmt: skip


@pytest.fixture
def late(monkeypatch):
    """On a CPU as on a card from when it is called; the order of what happens."""

    class Order(list):
        def __call__(self):
            take_step, read = launch.step_on_device, Unread.read

            def launching(model, *args, **more):
                self.append("launch")
                self.model = model
                return take_step(model, *args, **more)

            def reading(unread):
                self.append("read")
                return read(unread)

            monkeypatch.setattr(launch, "READ_LATE_ON", ("cpu",))
            monkeypatch.setattr(launch, "step_on_device", launching)
            monkeypatch.setattr(Unread, "read", reading)

    return Order()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer__name": "sgd-momentum", "data__batching": "windows"},
        {"optimizer__name": "adam", "lora__rank": 2},
        {"kind": DPOConfig, "eval__every": 2, "checkpoint__every": 3},
        {"train__precision": "bf16", "data__batching": "padded", "checkpoint__every": 8},
    ],
    ids=str,
)
def test_a_run_read_late_is_the_same_run(tiny_directory, tmp_path, late, options):
    command = ts.dpo if "kind" in options else ts.sft
    plain = command(tiny_config(tiny_directory, tmp_path / "plain", **{**STEPS, **options}))
    late()
    run = command(tiny_config(tiny_directory, tmp_path / "late", **{**STEPS, **options}))
    told = [[line for line in comparable(r) if line["event"] != "reference"] for r in (run, plain)]
    assert told[0] == told[1]  # (the second run finds the reference of the first)
    assert last_digest(run) == last_digest(plain)
    assert late.count("launch") == late.count("read") == 8


def test_a_step_is_launched_before_the_one_before_is_read_but_for_estimates_and_checkpoints(
    tiny_directory, tmp_path, late
):
    late()
    ts.sft(tiny_config(tiny_directory, tmp_path / "run", **{**STEPS, "checkpoint__every": 3}))
    order = "".join(what[0] for what in late)
    assert order == "llrlrr" + "lr" + "llrr" + "llrr", "nothing is outstanding after steps 3, 4, 6 and 8"


def rates(run):
    """(tokens of a step, tokens a second that its line gives)."""
    lines = run.metrics("train")
    return [(b["tokens"] - a["tokens"], b["tokens_per_s"]) for a, b in pairwise([{"tokens": 0}, *lines])]


@pytest.mark.parametrize("ahead", [True, False])
def test_no_line_gives_a_rate_above_what_a_step_that_lasts_can_have(tiny_directory, tmp_path, late, monkeypatch, ahead):
    """Not those before an estimate and the end either, which are read when they have long been over."""
    taken = "step_on_device" if ahead else "optimizer_step"
    if ahead:
        late()
    take_step = getattr(launch, taken)
    monkeypatch.setattr(launch, taken, lambda *args, **more: (time.sleep(0.02), take_step(*args, **more))[1])
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **STEPS))
    assert late.count("launch") == 8 * ahead
    assert all(0 < rate < tokens / 0.02 for tokens, rate in rates(run))


@pytest.mark.parametrize(("launching", "working"), [(1, 10), (10, 1), (10, 10)])
def test_the_rate_is_that_of_the_device_whether_the_host_waits_for_it_or_it_for_the_host(
    tiny_directory, tmp_path, late, monkeypatch, launching, working
):
    """A device of which every step takes 10 s, and 50 s for a checkpoint, which are no step's."""
    late()
    now = {"host": 0.0, "device": 0.0}
    take_step, read, save, ends = launch.step_on_device, Unread.read, loop.save_checkpoint, deque()

    def launched(*args, **more):
        now["device"] = max(max(now.values()) + working, now["host"] + launching)
        now["host"] += launching
        ends.append(now["device"])
        return take_step(*args, **more)

    def waited(unread):
        now["host"] = max(now["host"], ends.popleft())
        return read(unread)

    def saved(*args):
        now["host"] = max(now.values()) + 50
        return save(*args)

    monkeypatch.setattr(launch, "step_on_device", launched)
    monkeypatch.setattr(Unread, "read", waited)
    monkeypatch.setattr(loop, "save_checkpoint", saved)
    monkeypatch.setattr(launch, "mark", lambda device: max(now.values()))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **{**STEPS, "checkpoint__every": 3}))
    assert [rate for _, rate in rates(run)] == [round(tokens / 10, 1) for tokens, _ in rates(run)]


def test_a_resumed_run_read_late_is_the_whole_plain_one(tiny_directory, tmp_path, late):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **STEPS))
    run = interrupted(whole, tmp_path / "cut", 4)
    late()
    ts.sft(tiny_config(tiny_directory, run.path, **STEPS, resume=True))
    assert late.count("launch") == 4
    assert_same_end(run, whole)


def status_without_place(run):
    """What a run's status says, but for its directory, which the reason of a divergence names."""
    return {key: str(value).replace(str(run.path), "RUN") for key, value in run.status.items()}


def planted(monkeypatch, number):
    """The loss of the micro-batch of this number, from 1, is no number."""
    calls = []

    def poisoned(loss_sum, batch):
        calls.append(1)
        return loss_sum(batch) * (math.nan if len(calls) == number else 1.0)

    change_step_loss(monkeypatch, "sft", poisoned)


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_loss_that_is_no_number_ends_the_run_with_the_weights_of_before(
    tiny_directory, tmp_path, late, monkeypatch, step
):
    """Also where a later step, itself good, had been launched."""
    weights, models, plain_step = [], [], launch.optimizer_step

    def stepping(model, *args, **more):
        models.append(model)
        return plain_step(model, *args, **more)

    monkeypatch.setattr(launch, "optimizer_step", stepping)
    runs = []
    for name in ("plain", "late"):
        with monkeypatch.context() as patch:
            planted(patch, 2 * step)
            if name == "late":
                late()
            runs.append(ts.sft(tiny_config(tiny_directory, tmp_path / name, **STEPS)))
        weights.append([p.detach() for p in (late.model if name == "late" else models[-1]).parameters()])
    assert [r.status["state"] for r in runs] == ["diverged"] * 2
    assert f"loss nan or gradient norm nan is not finite at step {step} (rows " in runs[1].status["reason"]
    assert status_without_place(runs[1]) == status_without_place(runs[0])
    assert [str(line) for line in comparable(runs[1])] == [str(line) for line in comparable(runs[0])]  # nan is not nan
    assert late.count("launch") == (step if step in (4, 8) else step + 1)
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_a_mean_loss_that_rises_ends_the_run_at_the_same_step(tiny_directory, tmp_path, late):
    options = {"optimizer__lr": 1.0, "train__diverge_after": 4, "train__steps": 40, "eval__every": 40}
    plain = ts.sft(tiny_config(tiny_directory, tmp_path / "plain", **options))
    late()
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "late", **options))
    assert plain.status["state"] == "diverged"
    assert (run.status, comparable(run)) == (plain.status, comparable(plain))


def test_a_signal_stops_after_what_was_launched_and_the_run_can_go_on(tiny_directory, tmp_path, late, monkeypatch):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **STEPS))
    late()
    take_step = launch.step_on_device

    def signalled(*args, **more):
        if late.count("launch") == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*args, **more)

    monkeypatch.setattr(launch, "step_on_device", signalled)
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **STEPS))
    assert (run.status["state"], run.status["step"]) == ("stopped", 3)
    assert [line["step"] for line in run.metrics("train")] == [1, 2, 3]
    monkeypatch.setattr(launch, "step_on_device", take_step)
    ts.sft(tiny_config(tiny_directory, run.path, **STEPS, resume=True))
    assert last_digest(run) == last_digest(whole)
    assert comparable(run) == comparable(whole)


def out_of_memory_from(monkeypatch, step, room):
    """From this step on a micro-batch of more than `room` tokens does not fit."""
    calls = []

    def limited(loss_sum, batch):
        calls.append(1)
        if len(calls) >= step and batch.size > room:
            fail()
        return loss_sum(batch)

    change_step_loss(monkeypatch, "sft", limited)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_memory_that_ends_in_a_step_launched_ahead_is_told_in_its_place(
    tiny_directory, tmp_path, late, monkeypatch, step
):
    options = {**STEPS, "train__accumulate": 1, "model__dropout": 0.0}
    runs = []
    for name in ("plain", "late"):
        with monkeypatch.context() as patch:
            out_of_memory_from(patch, step, 100)
            if name == "late":
                late()
            runs.append(ts.sft(tiny_config(tiny_directory, tmp_path / name, **options)))
    assert [line["step"] for line in runs[0].metrics("split")] == [step]
    assert comparable(runs[1]) == comparable(runs[0])
    assert last_digest(runs[1]) == last_digest(runs[0])
    assert status_without_place(runs[1]) == status_without_place(runs[0])


def failing(kind, patch):
    """Step 3 cannot be launched: its batch cannot be read, or nothing of it fits. Called before the run."""
    if kind == "memory":
        out_of_memory_from(patch, 3, 0)
        return
    assemble = Batches.__getitem__

    def broken(self, index):
        if index == 2:
            raise RuntimeError("this row cannot be read")
        return assemble(self, index)

    patch.setattr(Batches, "__getitem__", broken)


@pytest.mark.parametrize("kind", ["memory", "data"])
def test_when_a_step_cannot_be_launched_the_one_before_is_in_the_log(tiny_directory, tmp_path, late, monkeypatch, kind):
    options = {**STEPS, "train__accumulate": 1}
    runs = []
    for name in ("plain", "late"):
        with monkeypatch.context() as patch:
            failing(kind, patch)
            if name == "late":
                late()
            with pytest.raises((UserError, RuntimeError)):
                ts.sft(tiny_config(tiny_directory, tmp_path / name, **options))
        runs.append(ts.Run(tmp_path / name))
    assert [line["step"] for line in runs[1].metrics("train")] == [1, 2]
    assert (comparable(runs[1]), runs[1].status) == (comparable(runs[0]), runs[0].status)


@pytest.mark.parametrize("kind", ["memory", "data"])
def test_a_step_that_cannot_be_launched_matters_no_more_where_the_run_is_over_already(
    tiny_directory, tmp_path, late, monkeypatch, kind
):
    runs = []
    for name in ("plain", "late"):
        with monkeypatch.context() as patch:
            failing(kind, patch)
            planted(patch, 2)
            if name == "late":
                late()
            runs.append(ts.sft(tiny_config(tiny_directory, tmp_path / name, **{**STEPS, "train__accumulate": 1})))
    assert runs[1].status["state"] == "diverged"
    assert status_without_place(runs[1]) == status_without_place(runs[0])
    assert [str(line) for line in comparable(runs[1])] == [str(line) for line in comparable(runs[0])]


@pytest.mark.parametrize(
    "options",
    [
        {"train__optimizer_in_backward": True, "train__grad_clip": 0, "train__accumulate": 1},
        {"train__weights": "bf16"},
        {"train__precision": "fp16"},
    ],
    ids=str,
)
def test_what_decides_on_the_host_is_read_at_once(tiny_directory, tmp_path, late, options):
    late()
    ts.sft(tiny_config(tiny_directory, tmp_path / "run", **{**STEPS, **options, "train__steps": 3}))
    assert late == []


def test_a_step_that_was_read_is_what_it_says():
    stats = StepStats(1.0, 2, 3.0, True)
    assert stats.read() is stats
