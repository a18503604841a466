"""The plan of a training: what it prints, what it picks and why, and what it says where it cannot."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from tunesmith.__main__ import main
from tunesmith.errors import UsageError
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.known import SIZES
from tunesmith.options.parse import from_settings
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.plan.cards import CARDS
from tunesmith.plan.memory import Work, block_matrices
from tunesmith.plan.planning import (
    alternatives,
    candidates,
    fastest_that_fits,
    find_place,
    is_exact,
    make_setting,
    size_in_bytes,
)
from tunesmith.plan.probe import make_step, pair_batch, probe_step, split_evenly, text_batch
from tunesmith.plan.workload import Rows, forward_operations, step_operations
from tunesmith.train.resolve import check_options

MEDIUM = SIZES["gpt2-medium"]
TINY = GPTConfig(n_layer=6, n_head=2, n_embd=32, vocab_size=211, block_size=64)
ROWS = Rows(20, 0.5)
PLAN = ["plan", "--model.name", "gpt2-medium", "--device", "p100"]


def setting(shape=MEDIUM, device="p100", kind=SFTConfig, changes=None, **options):
    config = from_settings(kind, {name.replace("__", "."): value for name, value in options.items()}, "test")
    return make_setting(config, shape, ROWS, find_place(device), changes or {})


def told(capsys, *argv, code=0):
    assert main([*argv]) == code
    out = capsys.readouterr()
    return out.err if code else out.out


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_plan_for_a_card_says_what_is_counted_and_what_is_assumed(capsys, tmp_path):
    out = told(
        capsys, *PLAN, "--out", str(tmp_path / "plan.json"), "--train.steps", "1000", "--data.batching", "windows"
    )
    for word in (
        "parameters",
        "gradients",
        "optimizer state",
        "activations",
        "logits",
        "peak",
        "tokens/s",
        "1,000 steps",
    ):
        assert word in out
    assert "data sheet, not measured" in out
    assert "assumed" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    n = MEDIUM.family.count(MEDIUM)
    assert (found["memory"]["parameters"], found["memory"]["optimizer"]) == (4 * n, 8 * n)
    assert found["precision"] == "fp16"
    assert found["tokens_per_s"] == pytest.approx(1024 / found["seconds_per_step"])
    assert found["training_seconds"] == pytest.approx(1000 * found["seconds_per_step"])


def test_presets_and_every_training_command_have_a_plan(capsys, tmp_path):
    assert "sft of gpt2-medium" in told(capsys, "plan", "--config", "paper/e1", "--device", "p100")
    assert "dpo of gpt2" in told(capsys, "plan", "dpo", "--model.name", "gpt2", "--device", "t4")
    reward = told(capsys, "plan", "reward", "--model.name", "gpt2", "--lora.rank", "8", "--device", "a100")
    assert "LoRA rank 8, adamw, bf16" in reward
    new = ["pretrain", "--data.name", "book.txt", "--model.n_layer", "3", "--model.n_head", "2", "--model.n_embd", "64"]
    assert "pretrain of gpt2 (3 blocks, width 64)" in told(capsys, "plan", *new, "--device", "l4")


def test_a_plan_for_this_machine_is_probed(capsys):
    argv = ["plan", "--model.name", "sample", "--data.block_size", "64", "--train.precision", "fp32", "--device", "cpu"]
    out = told(capsys, *argv)
    assert "probed here" in out
    assert "for Python and torch" in out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--device", "p1000"], 2, ["p1000", "p100", "h200"]),
        (["--fit", "much"], 2, ["--fit much", "16GB"]),
        (["--model.name", "someone/unknown"], 1, ["someone/unknown", "download", "gpt2-medium"]),
        (["--data.block_size", "2048"], 1, ["2,048", "1,024"]),
        (["--supervised", "1.5"], 2, ["--supervised"]),
        (["--lora.rank", "4", "--lora.targets", "h.0.*"], 2, ["h.0.*", "all-linear"]),
        (["--train.batch_size", "0"], 2, ["--train.batch_size"]),
        (["--fit", "2GB"], 1, ["nothing fits", "too much", "--lora.rank 8 needs", "--data.block_size 512 needs", "--fit_inexact"]),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_told_in_one_line(argv, code, words, capsys):
    error = told(capsys, *PLAN, *argv, code=code)
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error


def test_a_wrong_command_is_told(capsys):
    assert "pretrain" in told(capsys, "plan", "train", "--device", "p100", code=2)


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_what_fits_as_asked_stays_as_it_is(capsys):
    assert "nothing needs to change" in told(capsys, *PLAN, "--fit", "device")


def test_fit_calls_nothing_too_much_that_fits_as_asked(capsys):
    """Selective activations are estimated to be faster here, by moving fewer bytes."""
    out = told(capsys, *PLAN, "--train.batch_size", "8", "--device", "t4", "--fit", "device")
    assert "add: --" in out
    assert "which fits too but is estimated to be slower" in out
    assert "too much" not in out


def test_fit_says_what_to_add_and_what_it_saves_and_costs(capsys, tmp_path):
    out = told(capsys, *PLAN, "--train.batch_size", "8", "--fit", "8GB", "--out", str(tmp_path / "p.json"))
    assert "add: --" in out
    assert "by itself saves" in out
    assert "too large" in out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["memory"]["total"] <= 8e9 < found["asked_total"]
    assert found["exact"]


def test_fit_takes_the_fastest_that_fits_and_an_exact_one_where_there_is_one():
    asked = from_settings(SFTConfig, {"train.batch_size": 4}, "test")
    place = find_place("p100")
    every = [make_setting(asked, MEDIUM, ROWS, place, c) for c in alternatives(asked, inexact=True)]
    sizes = sorted(s.total for s in every)
    for room in (sizes[-1], sizes[len(sizes) // 2], sizes[0]):
        found = fastest_that_fits(every, room)
        fitting = [s for s in every if s.total <= room]
        exact = [s for s in fitting if is_exact(s.changes)]
        assert found.total <= room
        assert is_exact(found.changes) == bool(exact)
        assert found.estimate == min(s.estimate for s in exact or fitting)
    assert fastest_that_fits(every, sizes[0] - 1) is None


@pytest.mark.parametrize("options", [{}, {"train.grad_clip": 0.0}, {"train.batch_size": 6, "train.accumulate": 2}])
def test_alternatives_never_change_what_is_learned(options):
    asked = from_settings(SFTConfig, options, "test")
    found = list(alternatives(asked, inexact=False))
    assert {} in found
    assert all(is_exact(c) for c in found)
    for changes in found:
        config = make_setting(asked, TINY, ROWS, find_place("p100"), changes).config
        check_options(config)
        assert config.train.batch_size * config.train.accumulate == asked.train.batch_size * asked.train.accumulate
        decided = {"block_size": TINY.longest, "loss_on": "assistant"}  # what was left for the model and the method
        data = dataclasses.replace(asked.data, **decided)
        assert (config.lora, config.data) == (asked.lora, data)
    early = any("train.optimizer_in_backward" in c for c in found)
    assert early == (asked.train.grad_clip == 0)


def test_where_the_loss_is_scaled_nothing_is_offered_that_fp16_forbids():
    asked = from_settings(SFTConfig, {"train.grad_clip": 0.0}, "test")
    offered = {
        name: {
            option
            for s in candidates(make_setting(asked, TINY, ROWS, find_place(name), {}), inexact=True)
            for option in s.changes
        }
        for name in ("t4", "h100")
    }
    forbidden = {"train.optimizer_in_backward", "train.weights"}
    assert offered["h100"] - offered["t4"] == forbidden
    assert not offered["t4"] & forbidden


def test_on_a_cpu_the_lean_allocator_is_offered_and_taken_where_it_is_enough():
    config = from_settings(SFTConfig, {"train.precision": "fp32", "train.grad_clip": 0.0}, "test")
    here, card = (make_setting(config, GPTConfig(), ROWS, find_place(name), {}) for name in ("cpu", "p100"))
    lean = make_setting(config, here.shape, ROWS, here.place, {"train.allocator": "lean"})
    assert lean.peak < here.peak - 0.1e9
    assert lean.estimate > here.estimate
    offered = candidates(here, inexact=False)
    assert lean.changes in [s.changes for s in offered]
    least = min(s.total for s in offered if "train.allocator" not in s.changes)
    assert fastest_that_fits(offered, least - 1).config.train.allocator == "lean"
    assert "train.allocator" not in fastest_that_fits(offered, here.total).changes
    assert not any("train.allocator" in s.changes for s in candidates(card, inexact=False))


def test_a_second_model_may_become_a_cached_reference():
    s = setting(kind=DPOConfig, dpo__reference="model")
    assert {"dpo.reference": "cached"} in list(alternatives(s.config, inexact=False))
    cached = make_setting(s.config, MEDIUM, ROWS, s.place, {"dpo.reference": "cached"})
    assert s.peak - cached.peak == 4 * MEDIUM.family.count(MEDIUM)
    assert cached.estimate < s.estimate


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16e9), ("16", 16e9), ("1.5 GiB", 1.5 * 2**30), ("800mb", 8e8)]
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


# ---- what the formulas say -------------------------------------------------------------------------------------------


def test_memory_modes_save_what_they_say():
    plain = setting(train__grad_clip=0.0, train__batch_size=4)

    def peak(**changes):
        return make_setting(plain.config, MEDIUM, ROWS, plain.place, changes).peak

    n = MEDIUM.family.count(MEDIUM)
    selective, recomputed = (peak(**{"train.activation_checkpointing": m}) for m in ("selective", True))
    assert recomputed < selective < plain.peak
    assert plain.peak - peak(**{"optimizer.name": "adamw8bit"}) == pytest.approx(6 * n, rel=0.02)
    early = make_setting(plain.config, MEDIUM, ROWS, plain.place, {"train.optimizer_in_backward": True})
    assert early.memory.gradients == 4 * MEDIUM.vocab_size * MEDIUM.n_embd


def test_the_papers_cases_need_less_here():
    """In GB, there eager with full logits: its table 1 (4 x 1 row of 1,024 by accumulation), then its table 2 (1 row)."""
    four = {"train__accumulate": 4}
    table_1 = (
        (four, 13.52),
        (four | {"optimizer__name": "sgd-momentum"}, 11.23),
        (four | {"optimizer__name": "sgd"}, 8.41),
    )
    table_2 = (({}, 11.77), ({"lora__rank": 1}, 8.02))
    for options, published in (*table_1, *table_2):
        ours = setting(data__batching="windows", train__precision="fp32", **options)
        assert ours.memory.peak < 0.75 * published * 1e9


def test_operations_of_a_step():
    shape, work = SIZES["gpt2"], Work(1024)
    matrices = 12 * block_matrices(shape) + shape.vocab_size * shape.n_embd
    forward = forward_operations(shape, attended=1024)
    assert forward == 2 * matrices + 12 * 2 * 1024 * 768
    assert step_operations(shape, work, attended=1024) == 3 * forward
    again = dataclasses.replace(work, checkpointing=True)
    assert step_operations(shape, again, attended=1024) == 4 * forward - 2 * shape.vocab_size * shape.n_embd
    assert step_operations(shape, work, attended=1024, frozen_passes=1) == 4 * forward
    fewer = dataclasses.replace(work, supervised=512)
    assert 0.8 < step_operations(shape, fewer, attended=1024) / (3 * forward) < 1


def test_cards_are_as_their_data_sheets():
    for card in CARDS.values():
        assert 8e9 < card.memory < 3e11
        assert 2e11 < card.bandwidth < 1e13
        assert card.peak["fp32"] < card.peak["fp16"]
    precisions = {name: card.precision for name, card in CARDS.items()}
    assert {name for name, p in precisions.items() if p == "fp16"} == {"p100", "v100", "t4"}
    speeds = {name: setting(device=name).estimate for name in ("t4", "v100", "a100", "h100")}
    assert sorted(speeds, key=speeds.__getitem__) == ["h100", "a100", "v100", "t4"]


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_runs_every_command_and_mode():
    cases = [
        (SFTConfig, {}), (SFTConfig, {"lora.rank": 2, "train.weights": "bf16"}), (SFTConfig, {"data.batching": "windows"}),
        (SFTConfig, {"train.optimizer_in_backward": True, "train.grad_clip": 0.0, "train.activation_checkpointing": True}),
        (DPOConfig, {}), (DPOConfig, {"dpo.reference": "model"}), (DPOConfig, {"dpo.reference": "adapter", "lora.rank": 2}),
        (RewardConfig, {"train.batch_size": 2}),
    ]  # fmt: skip
    for kind, options in cases:
        config = from_settings(kind, {"data.block_size": 64, "train.precision": "fp32", **options}, "test")
        s = make_setting(config, TINY, ROWS, find_place("cpu"), {})
        time = probe_step(s.config, TINY, s.rows)
        assert 0 < time.micro_batch < 30
        assert time.step(3) == pytest.approx(3 * time.micro_batch + time.update)


def test_the_probe_trains_the_model_that_is_asked_for():
    s = setting(TINY, "cpu", data__block_size=64, train__precision="fp32", train__accumulate=2)
    step = make_step(s.config, TINY, s.rows, 2)
    assert step().micro_batch > 0


def test_made_rows_are_as_described():
    s = setting(TINY, "cpu", train__batch_size=3, data__block_size=64, train__precision="fp32")
    batch = text_batch(s.config, TINY, ROWS)
    assert batch.input_ids.shape == (3, 64)
    assert batch.count == pytest.approx(96, abs=6)
    assert batch.documents.lengths == (22, 21, 21) * 3
    pairs = pair_batch(setting(TINY, "cpu", DPOConfig, data__block_size=64).config, TINY, ROWS)
    assert pairs.input_ids.numel() == 64
    assert pairs.count == 3
    assert split_evenly(10, 4) == [5, 5]


def test_a_place_that_is_not_here_is_told():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            find_place("cuda")
    with pytest.raises(UsageError):
        find_place("tpu")


@pytest.mark.long
def test_measured_memory_is_near_the_plan(tmp_path):
    """A real run's own peak against the plan's, at the embedded sample, without a heap's holes: within 7 % of the whole process.

    The run also estimates, writes a checkpoint and has the tokenizer and data, and its texts are not of even length.
    """
    options = ["--model.name", "sample", "--data.name", "sample", "--train.precision", "fp32", "--train.device", "cpu"]
    options += ["--train.steps", "3", "--train.batch_size", "4", "--eval.iters", "1", "--eval.at_start", "false"]
    options += ["--data.block_size", "512", "--train.allocator", "lean"]
    run = [sys.executable, "-m", "tunesmith"]
    subprocess.run([*run, "sft", *options, "--out", str(tmp_path / "run")], check=True, capture_output=True)
    plan = ["plan", "sft", *options, "--device", "cpu", "--out", str(tmp_path / "plan.json")]
    subprocess.run([*run, *plan], check=True, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = max(line["peak_memory_gb"] for line in lines if line["event"] == "train")
    predicted = json.loads((tmp_path / "plan.json").read_text())["memory"]["total"] / 1e9
    assert predicted == pytest.approx(measured, rel=0.07)
