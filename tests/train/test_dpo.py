"""DPO from data to run directory: what a run leaves, that it goes on bit for bit, and that answers become what was preferred."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from made_pairs import read_back
from reference import batch_nll, in_transformers
from tiny_runs import as_argv, comparable, last_digest, tiny_config, train_losses
from tunesmith.data.datasets import open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import load_model, read_safetensors, write_safetensors
from tunesmith.options.training import DataOptions, DPOConfig, PairDataOptions
from tunesmith.train.pair_loss import OBSERVED

HERE = Path(__file__).parents[1]
LN2 = 0.693147
CURVE = 1e-4  # relative, between two float32 trainings of some steps that add up in another order
TRAIN = {
    "event", "step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_gb", "pairs", *OBSERVED
}  # fmt: skip
EVAL = {"event", "step", "time", "train_loss", "train_accuracy", "sft_loss", "validation_loss"}
EVAL |= {f"validation_{name}" for name in (*OBSERVED, "drift_chosen", "drift_rejected")}


def config(model, out, **options):
    return tiny_config(model, out, DPOConfig, **({"data__block_size": 192, "data__max_rows": 40} | options))


def run(model, out, **options):
    return ts.dpo(config(model, out, **options))


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample_pairs(split):
    """The padded batches, two pairs each, that `run` has of the sample."""
    options = PairDataOptions(name="sample", max_rows=40)
    store = PairStore(tokenise(open_dataset(options), split, Tokenizer.load(SAMPLE), form="pairs"))
    return Batches(PairRows(store, range(40), BatchLayout("padded", 192, batch_size=2, seed=options.seed)))


def plain_logp(model, prompt, answer, targets):
    """log p(targets | prompt) under a transformers model."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
    return -F.cross_entropy(logits, torch.tensor(targets), reduction="sum")


# ---- what a run leaves ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_directory, tmp_path_factory):
    return run(tiny_directory, tmp_path_factory.mktemp("runs") / "small")


def test_a_run_leaves_its_configuration_status_metrics_and_checkpoints(small, tiny_directory):
    assert small.status | {"state": "finished", "step": 6, "reason": ""} == small.status
    assert small.config["dpo"] == {
        "beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0, "reference": "cached", "reference_device": None, "sft_data": None
    }  # fmt: skip
    assert [line["event"] for line in small.metrics()][:3] == ["pairs", "reference", "eval"]
    assert all(set(line) == TRAIN for line in small.metrics("train"))
    assert all(set(line) == EVAL for line in small.metrics("eval"))
    assert [line["step"] for line in small.metrics("train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in small.metrics("eval")] == [0, 3, 6]
    assert len(list((small.path / "tensorboard").glob("events*"))) == 1
    best = min(small.metrics("eval"), key=lambda line: line["validation_loss"])["step"]
    assert small.best_checkpoint().name == f"step-{best:08d}"
    before, after = load_model(tiny_directory), load_model(small.checkpoints()[-1][1])
    assert not torch.equal(before.h[0].mlp.c_fc.weight, after.h[0].mlp.c_fc.weight)


def test_the_stored_configuration_repeats_the_run(small, tmp_path):
    from tunesmith.__main__ import main

    assert main(["dpo", "--config", str(small.path / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    again = ts.Run(tmp_path / "again")
    assert again.metrics("reference")[0]["computed"] == 0
    assert train_losses(again) == train_losses(small)
    assert last_digest(again) == last_digest(small)


@pytest.mark.parametrize("options", [{}, {"lora__rank": 4, "dpo__reference": "adapter"}, {"dpo__reference": "model"}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("loss", "start"), [("sigmoid", LN2), ("robust", LN2), ("ipo", 25.0), ("hinge", 1.0)])
def test_at_step_0_nothing_is_preferred_and_the_loss_is_the_known_number(
    tiny_directory, tmp_path, options, loss, start
):
    first = run(tiny_directory, tmp_path / "r", train__steps=1, dpo__loss=loss, **options).metrics("eval")[0]
    assert first["step"] == 0
    assert first["train_loss"] == pytest.approx(start, abs=1e-6)
    assert first["validation_loss"] == pytest.approx(start, abs=1e-6)
    for name in ("margin", "chosen_reward", "rejected_reward", "drift_chosen", "drift_rejected"):
        assert first[f"validation_{name}"] == pytest.approx(0, abs=1e-5), name
    if options:  # policy and reference then are one computation, so that no pair is the better one by rounding
        assert (first["train_accuracy"], first["validation_accuracy"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "formula", "beta"),
    [
        ({}, lambda m: -F.logsigmoid(m), 0.1),
        ({"dpo__beta": 0.5, "dpo__loss": "hinge"}, lambda m: (1 - m).relu(), 0.5),
        (
            {"dpo__beta": 0.2, "dpo__label_smoothing": 0.3},
            lambda m: -0.7 * F.logsigmoid(m) - 0.3 * F.logsigmoid(-m),
            0.2,
        ),
        ({"dpo__loss": "robust"}, lambda m: (-0.9 * F.logsigmoid(m) + 0.1 * F.logsigmoid(-m)) / 0.8, 0.1),
    ],
    ids=["sigmoid", "hinge", "smoothed", "robust, a tenth flipped"],
)
def test_five_losses_are_those_of_a_plain_loop_over_transformers(tiny_directory, tmp_path, settings, formula, beta):
    options = {"data__batching": "padded", "train__steps": 5, "train__accumulate": 2, "optimizer__weight_decay": 0.0}
    ours = run(tiny_directory, tmp_path / "r", **options, **settings)
    batches = sample_pairs("train")
    policy, held = in_transformers(load_model(tiny_directory)), in_transformers(load_model(tiny_directory))
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    losses, margins = [], []
    for step in range(5):
        pairs = [pair for i in (2 * step, 2 * step + 1) for pair in read_back(batches[i])]
        ratios = []
        for prompt, *answers in pairs:
            for answer in answers:
                with torch.no_grad():
                    fixed = plain_logp(held, prompt, *answer)
                ratios.append(plain_logp(policy, prompt, *answer) - fixed)
        margin = beta * torch.stack(ratios).view(-1, 2) @ torch.tensor([1.0, -1.0])
        loss = formula(margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
        margins.append(margin.mean().item())
    assert train_losses(ours) == pytest.approx(losses, rel=CURVE)
    assert [line["margin"] for line in ours.metrics("train")] == pytest.approx(margins, abs=CURVE)
    assert abs(margins[-1]) > 100 * CURVE


def test_the_sft_loss_is_on_the_chosen_answers_or_on_the_data_named(tiny_directory, tmp_path):
    model, tokenizer = load_model(tiny_directory), Tokenizer.load(SAMPLE)
    for split, n in (("train", 20), ("test", 7)):
        texts = [(f"What is {i}?", f"It is {i}.", "So?", "So.") for i in range(n)]
        turns = [[{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(row)] for row in texts]
        write(tmp_path / "sft" / f"{split}.jsonl", [{"messages": row} for row in turns])
    named, default = (
        run(tiny_directory, tmp_path / str(i), dpo__sft_data=name, eval__iters=99).metrics("eval")
        for i, name in enumerate((str(tmp_path / "sft"), None))
    )
    dialogues = tokenise(open_dataset(DataOptions(name=str(tmp_path / "sft"))), "test", tokenizer)
    batches = Batches(text_rows(dialogues, range(7), BatchLayout("padded", 192, batch_size=1)))
    totals = [batch_nll(model, batch) for batch in batches.fixed()]
    assert len(totals) == 7
    assert named[0]["sft_loss"] == pytest.approx(sum(t for t, _ in totals) / sum(n for _, n in totals), rel=CURVE)
    chosen = [(prompt, *answer) for batch in sample_pairs("test").fixed() for prompt, answer, _ in read_back(batch)]
    nll = [-plain_logp(in_transformers(model), *answer).item() for answer in chosen]
    assert len(nll) == 40
    assert default[0]["sft_loss"] == pytest.approx(sum(nll) / sum(len(t) for *_, t in chosen), rel=CURVE)
    for curve in (named, default):
        assert len({line["sft_loss"] for line in curve}) == 3, "it is the policy's, and that moves"


# ---- going on, and the batch split -----------------------------------------------------------------------------------

EVERYTHING = {
    "train__steps": 8, "train__accumulate": 2, "train__batch_size": 1, "model__dropout": 0.2, "eval__every": 4,
    "checkpoint__every": 4, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 3,
}  # fmt: skip
LORA = {"lora__rank": 4, "lora__dropout": 0.2, "lora__targets": "all-linear,lm_head"}


@pytest.mark.parametrize(
    ("lora", "batching", "reference"),
    [({}, "packed", "cached"), ({}, "padded", "model"), (LORA, "packed", "cached"), (LORA, "padded", "adapter")],
    ids=str,
)
def test_k_steps_and_resume_equal_n_steps_bit_for_bit(tiny_directory, tmp_path, lora, batching, reference):
    options = EVERYTHING | lora | {"data__batching": batching, "dpo__reference": reference}
    whole = run(tiny_directory, tmp_path / "whole", **options)
    assert len(set(train_losses(whole)[1:])) == 7
    for step in (4, 0):
        part = interrupted(whole, tmp_path / f"from-{step}", step)
        assert last_digest(part) != last_digest(whole)
        run(tiny_directory, part.path, **options, resume=True)
        assert_same_end(part, whole)


def test_killed_in_the_middle_a_run_ends_as_the_undisturbed_one(tiny_directory, tmp_path):
    options = EVERYTHING | LORA | {"train__steps": 24, "checkpoint__every": 3, "dpo__reference": "adapter"}
    whole = run(tiny_directory, tmp_path / "whole", **options)
    part = ts.Run(tmp_path / "killed")
    argv = [
        sys.executable,
        str(HERE / "killed.py"),
        "flush",
        "60",
        *as_argv(config(tiny_directory, part.path, **options)),
    ]
    killed = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert part.status["state"] == "running"
    assert 0 < part.checkpoints()[-1][0] < 24
    run(tiny_directory, part.path, **options, resume=True)
    assert_same_end(part, whole)


def test_an_adapter_is_the_same_file_whenever_it_is_saved(tiny_directory, tmp_path):
    """Its digest tells whether two runs ended alike."""
    (path,) = run(tiny_directory, tmp_path / "r", **LORA, train__steps=1, eval__at_start=False).path.glob(
        "checkpoints/*"
    )
    tensors, metadata = read_safetensors(path / "adapter_model.safetensors")
    files = set()
    for i in range(20):
        write_safetensors(tensors, tmp_path / f"{i}.safetensors", metadata)
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(files) == 1


def test_more_steps_can_be_asked_for_later_and_find_their_reference(tiny_directory, tmp_path):
    options = {"eval__every": 3, "checkpoint__every": 3, "eval__iters": 1}
    whole = run(tiny_directory, tmp_path / "whole", train__steps=12, **options)
    part = run(tiny_directory, tmp_path / "part", train__steps=3, **options)
    assert part.metrics("reference")[0]["pairs"] < whole.metrics("reference")[0]["pairs"]
    run(tiny_directory, part.path, train__steps=12, **options, resume=True)
    assert last_digest(part) == last_digest(whole)
    assert comparable(part)[2:] == comparable(whole)[2:]


def test_two_pairs_at_once_or_one_after_the_other_are_the_same_training(tiny_directory, tmp_path):
    split = [{"train__batch_size": 2}, {"train__batch_size": 1, "train__accumulate": 2}]
    shared = {"data__batching": "padded", "eval__iters": 99}
    a, b = (run(tiny_directory, tmp_path / str(i), **shared, **own) for i, own in enumerate(split))
    lines = ([line for line in comparable(r) if line.pop("event") in ("train", "eval")] for r in (a, b))
    for mine, other in zip(*lines, strict=True):
        assert mine == pytest.approx(other, rel=CURVE, abs=CURVE)
    ours, others = (load_model(r.checkpoints()[-1][1]).parameters() for r in (a, b))
    assert all(torch.allclose(p, q, atol=CURVE) for p, q in zip(ours, others, strict=True))


def test_settings_that_would_make_it_another_run_are_refused_on_resume(tiny_directory, small):
    changed = {"dpo__beta": 0.3, "dpo__loss": "ipo", "lora__rank": 4, "data__truncation": "drop"}
    with pytest.raises(UserError) as caught:
        run(tiny_directory, small.path, **changed, resume=True)
    told = [
        "dpo.beta was 0.1, now 0.3",
        "dpo.loss was 'sigmoid', now 'ipo'",
        "lora.rank was 0, now 4",
        "'auto', now 'drop'",
    ]
    assert all(part in str(caught.value) for part in told)
    assert small.status["state"] == "finished"


def test_a_rate_that_blows_up_ends_as_diverged_and_names_the_rows(tiny_directory, tmp_path):
    options = {"optimizer__lr": 1.0, "train__steps": 40, "train__diverge_after": 3, "eval__every": 40}
    blown = run(tiny_directory, tmp_path / "r", **options)
    assert blown.status["state"] == "diverged"
    assert "train.jsonl:" in blown.status["reason"]
    assert "--optimizer.lr (now 1)" in blown.status["reason"]
    assert blown.status["step"] < 40
