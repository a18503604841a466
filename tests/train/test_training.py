"""Whole training runs in seconds: what a run leaves behind, that it learns, and how it ends when it cannot."""

import itertools
import json
import math

import pytest
import torch

import tunesmith as ts
from reference import batch_nll, random_model
from tiny_runs import comparable, last_digest, tiny_config, train_losses, write_dialogues
from tunesmith.__main__ import main
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import load_model
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.splits import in_batches, load_splits
from tunesmith.train.token_loss import estimate_loss

BATCHINGS = ["packed", "windows", "padded"]


def weights(run):
    return load_model(run.checkpoints()[-1][1]).state_dict()


# The run directory


@pytest.fixture(scope="module")
def run(tiny_directory, tmp_path_factory):
    """Six steps with an estimate and a checkpoint every two."""
    out = tmp_path_factory.mktemp("runs") / "six"
    return ts.sft(tiny_config(tiny_directory, out, eval__every=2, checkpoint__every=2, optimizer__warmup_steps=4))


def test_a_run_directory_holds_what_the_interface_names(run):
    expected = ["config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "status.json", "tensorboard"]
    assert sorted(p.name for p in run.path.iterdir()) == sorted([*expected, "checkpoints", "losses"])
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
    newest = run.path / "checkpoints" / "step-00000006"
    hugging_face = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {p.name for p in newest.iterdir()} == hugging_face | {"training_state"}
    assert {p.name for p in (newest / "training_state").iterdir()} == {"optimizer.safetensors", "state.json"}


def test_transformers_loads_a_checkpoint_and_computes_the_same(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, ours = AutoModelForCausalLM.from_pretrained(run.best_checkpoint()).eval(), ts.load(str(run.path))[0]
    ids = torch.tensor([AutoTokenizer.from_pretrained(run.best_checkpoint())("Why is the sky blue?")["input_ids"]])
    torch.testing.assert_close(ours.lm_head(ours(ids)), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_metrics_lines_have_the_promised_keys_and_sane_values(run):
    train, estimates = run.metrics("train"), run.metrics("eval")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in estimates] == [0, 2, 4, 6]
    named = {"step", "time", "event", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_gb"}
    assert all(named <= set(line) for line in train)
    assert all({"train_loss", "validation_loss", "validation_perplexity"} <= set(line) for line in estimates)
    assert [line["lr"] for line in train] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001])
    assert all(a["tokens"] < b["tokens"] <= 2 * 128 * b["step"] for a, b in itertools.pairwise(train))
    assert train[0]["loss"] == pytest.approx(math.log(6144), abs=0.1)  # new weights know nothing
    for line in estimates:
        assert line["validation_perplexity"] == pytest.approx(math.exp(line["validation_loss"]))
    assert 0.05 < train[-1]["peak_memory_gb"] < 64


def test_the_run_object_tells_state_metrics_and_best_checkpoint(run):
    best = min(run.metrics("eval"), key=lambda line: line["validation_loss"])["step"]
    assert run.status | {"state": "finished", "step": 6, "best_step": best} == run.status
    assert run.best_checkpoint() == run.path / "checkpoints" / f"step-{best:08d}"
    assert run.metrics() == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert ts.Run(run.path).metrics("train") == run.metrics("train")


def test_metrics_being_written_are_read_up_to_the_last_whole_line(run, tmp_path):
    text = (run.path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-9])
    assert ts.Run(tmp_path).metrics() == run.metrics()[:-1]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_last_few_checkpoints_and_the_best_are_kept(tiny_directory, tmp_path, keep):
    """At this learning rate the loss only rises, so the best is not among the last; the newest stays even with 0."""
    options = {"optimizer__lr": 1.0, "train__steps": 5, "eval__every": 1, "checkpoint__every": 1}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", checkpoint__keep=keep, **options))
    best = run.status["best_step"]
    assert best < 3
    assert {step for step, _ in run.checkpoints()} == {best, *[4, 5][-max(keep, 1) :]}


def test_config_yaml_repeats_the_run(run, tmp_path):
    assert main(["sft", "--config", str(run.path / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    again = ts.Run(tmp_path / "again")
    assert comparable(again) == comparable(run)
    assert last_digest(again) == last_digest(run)
    assert again.config == run.config


def test_the_seed_decides_dropout_and_the_data_seed_the_order(tiny_directory, tmp_path):
    def losses(number, **options):
        options = {"model__dropout": 0.3, "train__steps": 2, "eval__at_start": False, **options}
        return train_losses(ts.sft(tiny_config(tiny_directory, tmp_path / str(number), **options)))

    first = losses(0)
    assert losses(1) == first
    assert losses(2, train__seed=7) != first
    assert losses(3, data__seed=7) != first


def test_a_second_run_in_the_same_directory_is_refused(run, tiny_directory):
    with pytest.raises(UserError, match=r"already holds a run \(finished at step 6\).*--resume.*--out"):
        ts.sft(tiny_config(tiny_directory, run.path))


def test_every_impossible_option_is_named_at_once(tiny_directory, tmp_path):
    wrong = {"train__batch_size": 0, "train__accumulate": 0, "train__epochs": 1.0, "train__diverge_after": -1}
    with pytest.raises(UserError) as caught:
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", **wrong, model__dropout=1.0))
    told = ["batch_size is 0", "accumulate is 0", "epochs", "diverge_after is -1", "dropout is 1"]
    assert all(part in str(caught.value) for part in told)
    assert not (tmp_path / "r").exists()


def test_a_block_size_above_the_models_positions_is_refused_before_anything_starts(tiny_directory, tmp_path):
    with pytest.raises(UserError, match=r"block_size 512.*256"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", data__block_size=512))
    assert not (tmp_path / "r").exists()


# Accumulation, estimates, precision


@pytest.mark.parametrize("batching", BATCHINGS)
def test_four_micro_batches_of_one_row_equal_one_of_four(tiny_directory, tmp_path, batching):
    shared = {"train__steps": 3, "optimizer__name": "sgd", "optimizer__lr": 0.5, "data__batching": batching}
    small, large = (
        ts.sft(tiny_config(tiny_directory, tmp_path / str(n), train__batch_size=n, train__accumulate=4 // n, **shared))
        for n in (1, 4)
    )
    assert train_losses(small) == pytest.approx(train_losses(large), rel=1e-6)
    before, after = load_model(tiny_directory).state_dict(), weights(large)
    assert max(float((after[k] - before[k]).abs().max()) for k in after) > 1e-2  # they did move
    for name, value in weights(small).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_estimates_weigh_every_token_alike_and_leave_mode_and_random_state(tiny_directory, tmp_path, batching):
    config = tiny_config(tiny_directory, tmp_path, data__batching=batching)
    data = in_batches(load_splits(config.data, Tokenizer.load(SAMPLE)), config)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 6144, "block_size": 128}
    model, plain = random_model(GPTConfig(**shape, dropout=0.5)).train(), random_model(GPTConfig(**shape))
    state = torch.get_rng_state()
    for batches in (data.train, data.validation):
        found = estimate_loss(model, batches.fixed(4))
        assert found == estimate_loss(model, batches.fixed(4))
        sums = [batch_nll(plain, batch) for batch in batches.fixed(4)]
        total, count = (sum(column) for column in zip(*sums, strict=True))
        assert (found.loss, found.tokens) == (pytest.approx(total / count, rel=1e-5), count)
        if batching != "windows":  # the batches differ in weight: a mean of their means would be another number
            assert abs(sum(t / n for t, n in sums) / len(sums) - total / count) > 1e-4
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("precision", "steps"), [("fp32", 20), ("bf16", 20), ("fp16", 8)])
def test_the_loss_falls_in_every_precision(tiny_directory, tmp_path, precision, steps):
    options = {"train__precision": precision, "train__steps": steps, "optimizer__lr": 5e-3, "eval__every": steps}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    first, last = run.metrics("eval")
    assert last["validation_loss"] < first["validation_loss"] - 0.5
    assert load_model(run.best_checkpoint()).wte.weight.dtype == torch.float32


# How it ends


def broken_run(tiny_directory, out, **options):
    run = ts.sft(tiny_config(tiny_directory, out, train__steps=40, eval__every=2, checkpoint__every=2, **options))
    assert run.status["state"] == "diverged"
    return run


def assert_it_names_step_and_rows_and_keeps_a_good_checkpoint(run, config):
    status = run.status
    (event,) = run.metrics("diverged")
    assert event["step"] == status["step"] + (event["loss"] is None)  # a step that cannot be taken is not counted
    splits = load_splits(config.data, Tokenizer.load(SAMPLE))
    batch = in_batches(splits, config).train[event["step"] - 1]
    rows = [splits.train.place(row) for row in batch.sources]
    assert f"at step {event['step']} (rows {rows[0]}" in status["reason"]
    assert "lower --optimizer.lr" in status["reason"]
    model = load_model(run.best_checkpoint())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    last = run.metrics("eval")[0]["validation_loss"]
    assert status["best_validation_loss"] <= last


def test_a_loss_that_is_no_number_ends_the_run_as_diverged(tiny_directory, tmp_path):
    options = {"optimizer__name": "sgd", "optimizer__lr": 1e30, "train__grad_clip": 0.0}
    run = broken_run(tiny_directory, tmp_path / "r", **options)
    assert "is not finite" in run.status["reason"]
    assert run.metrics("diverged")[0]["loss"] is None
    assert run.status["step"] < 3
    assert_it_names_step_and_rows_and_keeps_a_good_checkpoint(run, tiny_config(tiny_directory, tmp_path / "r"))


def test_a_loss_that_stays_above_the_start_ends_the_run_as_diverged(tiny_directory, tmp_path):
    run = broken_run(tiny_directory, tmp_path / "r", optimizer__lr=1.0, train__diverge_after=4)
    losses = train_losses(run)
    (event,) = run.metrics("diverged")  # its loss is that of the rows by which it is judged, not of the last batch
    assert event["loss"] > 1.05 * run.metrics("eval")[0]["train_loss"]
    assert f"on the same rows it is {event['loss']:.3f} now" in run.status["reason"]
    assert sum(losses[-4:]) / 4 > 1.05 * run.metrics("eval")[0]["train_loss"]
    assert f"mean loss of the last 4 steps {sum(losses[-4:]) / 4:.3f}" in run.status["reason"]
    assert_it_names_step_and_rows_and_keeps_a_good_checkpoint(run, tiny_config(tiny_directory, tmp_path / "r"))


def test_a_noisy_but_falling_loss_is_no_divergence(tiny_directory, tmp_path):
    options = {"train__steps": 12, "train__batch_size": 1, "train__diverge_after": 1, "eval__at_start": True}
    assert ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options)).status["state"] == "finished"


def test_the_command_line_tells_of_a_divergence_in_one_line_and_a_lower_rate_goes_on(tiny_directory, tmp_path, capsys):
    run = broken_run(tiny_directory, tmp_path / "r", optimizer__lr=1.0, train__diverge_after=4)
    argv = ["sft", "--out", str(run.path), "--resume", "--train.steps", "9", "--resume_changes", "accept"]
    capsys.readouterr()
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("tunesmith: mean loss of the last 4 steps")
    assert main([*argv, "--optimizer.lr", "1e-3", "--train.diverge_after", "0"]) == 0
    assert run.status["state"] == "finished"


# It learns

PLACES = ["river", "desk", "moon", "ship", "barn", "hill", "cave", "shop", "tent", "dock"]
OWNERS = ["an owl", "Ann", "a cat", "Tom", "a fox", "my aunt", "no one", "Bo", "a bear", "Lee"]
FIRST = [(f"Who lives in the {p}?", f"In the {p} lives {o}.") for p, o in zip(PLACES, OWNERS, strict=True)]
SECOND = [(f"Where does {o} live now?", f"Now in the {p}.") for p, o in zip(PLACES[::-1], OWNERS, strict=True)]
PAIRS = FIRST + SECOND


def test_a_small_model_learns_twenty_dialogues_by_heart_and_repeats_them_word_for_word(tiny_directory, tmp_path):
    (tmp_path / "data").mkdir()
    write_dialogues(tmp_path / "data" / "train.jsonl", PAIRS)
    write_dialogues(tmp_path / "data" / "test.jsonl", PAIRS[:2])
    options = {"data__name": str(tmp_path / "data"), "train__steps": 150, "train__batch_size": 4, "optimizer__lr": 5e-3}
    late = {"optimizer__schedule": "cosine", "eval__every": 150, "checkpoint__every": 150, "data__block_size": 256}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, **late))
    assert run.metrics("eval")[-1]["train_loss"] < 0.05
    model, tokenizer = ts.load(str(run.path), device="cpu")
    questions = [[{"role": "user", "content": question}] for question, _ in PAIRS]
    answers = ts.generate(model, tokenizer, questions, temperature=0, max_new_tokens=40)
    assert answers == [answer for _, answer in PAIRS]
