"""A training that is stopped, killed or starved of disk goes on as if nothing had happened: bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tunesmith as ts
from hanging import HANGS, wait_for
from interrupted_runs import assert_same_end, interrupted
from tiny_runs import as_argv, comparable, digest, last_digest, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.files.weights import load_model
from tunesmith.progress import Progress

HERE = Path(__file__).parents[1]
EVERYTHING = {
    "train__steps": 8, "train__accumulate": 2, "model__dropout": 0.2, "eval__every": 4, "checkpoint__every": 4,
    "optimizer__schedule": "cosine", "optimizer__warmup_steps": 3, "data__block_size": 64,
}  # fmt: skip


# k steps and resume = n steps


@pytest.mark.parametrize(
    ("batching", "optimizer", "precision"),
    [
        ("packed", "adamw", "fp32"),
        ("packed", "sgd-momentum", "fp32"),
        ("windows", "adamw", "fp32"),
        ("windows", "sgd-nesterov", "fp32"),
        ("padded", "adam", "fp32"),
        ("padded", "sgd-momentum", "bf16"),
        ("packed", "adamw", "fp16"),
    ],
)
def test_k_steps_and_resume_equal_n_steps_bit_for_bit(tiny_directory, tmp_path, batching, optimizer, precision):
    options = {**EVERYTHING, "data__batching": batching, "optimizer__name": optimizer, "train__precision": precision}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    assert len(set(train_losses(whole))) == 8
    for step in (4, 0):
        run = interrupted(whole, tmp_path / f"from-{step}", step)
        assert last_digest(run) != last_digest(whole)
        ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
        assert_same_end(run, whole)


def test_two_threads_resume_bit_for_bit_too(tiny_directory, tmp_path):
    options = {"train__steps": 2, "checkpoint__every": 1, "eval__at_start": False, "eval__iters": 1}
    torch.set_num_threads(2)
    try:
        whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
        run = interrupted(whole, tmp_path / "cut", 1)
        ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    finally:
        torch.set_num_threads(1)
    assert_same_end(run, whole)


def test_a_run_cut_before_its_first_checkpoint_starts_anew_without_doubled_lines(tiny_directory, tmp_path):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **EVERYTHING))
    run = interrupted(whole, tmp_path / "cut", -1)
    ts.sft(tiny_config(tiny_directory, run.path, **EVERYTHING, resume=True))
    assert_same_end(run, whole)


def test_the_divergence_window_is_carried_over(tiny_directory, tmp_path):
    """The window of four steps begins before the checkpoint and is judged after it."""
    options = {"optimizer__lr": 1.0, "train__diverge_after": 4, "train__steps": 40, "checkpoint__every": 2}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options, checkpoint__keep=9))
    run = interrupted(whole, tmp_path / "cut", 2)
    ts.sft(tiny_config(tiny_directory, run.path, **options, resume=True))
    assert whole.status["state"] == "diverged"
    assert (run.status, comparable(run)) == (whole.status, comparable(whole))


def test_more_steps_can_be_asked_for_and_the_command_needs_only_the_directory(tiny_directory, tmp_path):
    options = {"train__steps": 6, "eval__every": 3, "checkpoint__every": 3}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    half = ts.sft(tiny_config(tiny_directory, tmp_path / "half", **{**options, "train__steps": 3}))
    assert main(["sft", "--resume", "--out", str(half.path), "--train.steps", "6"]) == 0
    assert_same_end(half, whole)
    assert main(["sft", "--resume", "--out", str(half.path)]) == 0  # nothing left to do
    assert_same_end(half, whole)


def test_resuming_nothing_is_refused(tiny_directory, tmp_path):
    with pytest.raises(UserError, match=r"holds no run to continue.*--out"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", resume=True))


def test_settings_that_would_make_it_another_run_are_refused_all_at_once(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", train__steps=1))
    changed = {"data__block_size": 64, "train__accumulate": 2, "optimizer__name": "sgd"}
    with pytest.raises(UserError) as caught:
        ts.sft(tiny_config(tiny_directory, run.path, **changed, resume=True))
    told = ["data.block_size was 128, now 64", "train.accumulate was 1, now 2", "optimizer.name was 'adamw', now 'sgd'"]
    assert all(part in str(caught.value) for part in told)
    assert run.status["state"] == "finished"


@pytest.mark.parametrize("spoilt", ["training_state/state.json", "training_state/optimizer.safetensors", "model.safetensors"])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tiny_directory, tmp_path, spoilt):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **EVERYTHING))
    run = interrupted(whole, tmp_path / "cut", 4)
    last = run.checkpoints()[-1][1]
    (last / spoilt).write_bytes(b"{")
    config = tiny_config(tiny_directory, run.path, **EVERYTHING, resume=True)
    with pytest.raises(UserError, match=f"{last.name}.*"):
        ts.sft(config)
    shutil.rmtree(last)
    ts.sft(config)
    assert_same_end(run, whole)


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_stopped_and_the_run_can_go_on(tiny_directory, tmp_path, monkeypatch, name):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **EVERYTHING))
    advance = Progress.advance

    def signalled(self, step, *args):
        if step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        advance(self, step, *args)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", signalled)
        run = ts.sft(tiny_config(tiny_directory, tmp_path / "cut", **EVERYTHING))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (run.status["state"], run.status["step"]) == ("stopped", 3)
    assert name in run.status["reason"]
    assert "--resume" in run.status["reason"]
    assert run.checkpoints()[-1][0] == 3
    ts.sft(tiny_config(tiny_directory, run.path, **EVERYTHING, resume=True))
    assert_same_end(run, whole)


def test_a_real_process_told_to_stop_saves_and_ends_with_success(tiny_directory, tmp_path):
    endless = {"train__steps": 1_000_000, "eval__every": 1_000_000, "checkpoint__every": 1_000_000}
    run = ts.Run(tmp_path / "cut")
    argv = [sys.executable, "-m", "tunesmith", *as_argv(tiny_config(tiny_directory, run.path, **endless))]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(run.metrics("train")) >= 5, process)
    process.send_signal(signal.SIGTERM)
    printed, complaints = process.communicate(timeout=HANGS)
    assert (process.returncode, complaints) == (0, "")
    step = run.status["step"]
    assert run.status["state"] == "stopped"
    assert f"stopped at step {step:,}" in printed
    assert [found for found, _ in run.checkpoints()] == [0, step]
    assert [line["step"] for line in run.metrics("train")] == list(range(1, step + 1))


# SIGKILL


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory):
    """Eighty steps in one go, of dialogues in two-row micro-batches with dropout; about two seconds."""
    return ts.sft(tiny_config(tiny_directory, tmp_path_factory.mktemp("runs") / "whole", **LONG))


LONG = {**EVERYTHING, "train__steps": 80, "eval__every": 10, "checkpoint__every": 5, "checkpoint__keep": 2}


CHECKPOINT = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
CHECKPOINT |= {"training_state/optimizer.safetensors", "training_state/state.json"}


def assert_sound(run):
    """What a killed run leaves can be read: every line, and every checkpoint that counts as one."""
    assert all(line["step"] <= 80 for line in run.metrics())
    for step, path in run.checkpoints():
        assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == CHECKPOINT
        load_model(path)
        assert json.loads((path / "training_state" / "state.json").read_text())["step"] == step
    if run.checkpoints():
        assert run.best_checkpoint().is_dir()


def test_killed_again_and_again_at_any_moment_a_run_ends_as_the_undisturbed_one(tiny_directory, tmp_path, whole):
    run = ts.Run(tmp_path / "killed")
    chance = random.Random(1)
    moments = [
        ("flush", 5),
        ("seconds", chance.uniform(0.02, 0.25)),
        ("flush", chance.randrange(20, 45)),
        ("removal", 9),
    ]
    steps = []
    for moment, number in moments:
        argv = as_argv(tiny_config(tiny_directory, run.path, **LONG)) + ["--resume"] * bool(steps)
        argv = [sys.executable, str(HERE / "killed.py"), moment, str(number), *argv]
        killed = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert run.status["state"] == "running"
        assert_sound(run)
        steps.append(max((step for step, _ in run.checkpoints()), default=-1))
    assert steps == sorted(steps)
    assert steps[0] == -1
    assert 0 < steps[-1] < 80
    ts.sft(tiny_config(tiny_directory, run.path, **LONG, resume=True))
    assert_same_end(run, whole)
    kept = {step: digest(path) for step, path in run.checkpoints()}
    assert kept == {step: digest(path) for step, path in whole.checkpoints()}
    assert {p.name for p in (run.path / "checkpoints").iterdir()} == {p.name for _, p in whole.checkpoints()}


def test_a_full_disk_during_a_save_leaves_nothing_half_written(tiny_directory, tmp_path, monkeypatch):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **EVERYTHING))
    run, calls, flush = ts.Run(tmp_path / "full"), [], os.fsync

    def full(descriptor):
        calls.append(1)
        if len(calls) == 17:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ts.sft(tiny_config(tiny_directory, run.path, **EVERYTHING))
    assert run.status["state"] == "failed"
    assert "No space left" in run.status["reason"]
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-00000000"]
    ts.sft(tiny_config(tiny_directory, run.path, **EVERYTHING, resume=True))
    assert_same_end(run, whole)
