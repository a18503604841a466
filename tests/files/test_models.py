"""What a MODEL name means: a directory, a run, RUN@STEP, `sample`; and what is told about a name that means nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tunesmith as ts
from reference import random_model
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE, load_for_training
from tunesmith.files.weights import save_model
from tunesmith.models.gpt2 import GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=24)


@pytest.fixture(scope="module")
def small_tokenizer():
    return Tokenizer.load(SAMPLE)


@pytest.fixture
def run(tmp_path, small_tokenizer) -> Path:
    """A run directory with checkpoints of three steps, each with its own weights; the second is the best."""
    path = tmp_path / "run"
    for step in (0, 5, 10):
        save_model(random_model(SHAPE, seed=step), small_tokenizer, path / f"checkpoints/step-{step:08d}")
    (path / "checkpoints" / ".writing-step-00000015").mkdir()
    (path / "status.json").write_text(json.dumps({"state": "finished", "step": 10, "best_step": 5}))
    return path


def first_weight(name):
    return ts.load(str(name), device="cpu")[0].wte.weight


@pytest.mark.parametrize(
    ("suffix", "seed"), [("", 5), ("@0", 0), ("@10", 10), ("/checkpoints/step-00000010", 10)], ids=str
)
def test_a_run_means_its_best_checkpoint_and_at_a_step_that_one(run, suffix, seed):
    assert torch.equal(first_weight(f"{run}{suffix}"), random_model(SHAPE, seed=seed).wte.weight)


def test_a_run_without_estimates_means_its_last_checkpoint(run):
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 10, "best_step": None}))
    assert torch.equal(first_weight(run), random_model(SHAPE, seed=10).wte.weight)


def test_the_embedded_sample_loads_in_the_asked_dtype():
    model, tokenizer = ts.load("sample", device="cpu", dtype=torch.bfloat16)
    assert model.wte.weight.dtype == torch.bfloat16
    assert model.config.vocab_size == tokenizer.vocab_size == 6144


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{run}@7", "no checkpoint of step 7; it has: 0, 5, 10"),
        ("{run}@best", "RUN@STEP with a number"),
        ("{run}/checkpoints", "neither a model .* nor a run"),
        ("{run}-absent", "no such directory"),
        ("./absent", "no such directory"),
        ("no-one/nothing-of-this-name", "cannot be downloaded .* local directory"),
    ],
)
def test_names_that_mean_nothing_are_told_what_was_looked_for(run, name, told):
    with pytest.raises(UserError, match=told):
        ts.load(name.format(run=run), device="cpu")


def test_a_run_without_checkpoints_says_so(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        ts.load(str(run), device="cpu")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, small_tokenizer):
    save_model(random_model(replace(SHAPE, vocab_size=100)), small_tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"6,144 tokens.*100"):
        ts.load(str(tmp_path), device="cpu")


def test_random_weights_keep_shape_and_tokenizer_and_follow_the_seed(tmp_path, small_tokenizer):
    save_model(random_model(SHAPE), small_tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not needed
    made = [load_for_training(str(tmp_path), init="random", dropout=0.1, seed=seed) for seed in (1, 1, 2)]
    (a, tokenizer), (b, _), (c, _) = made
    assert a.config == replace(SHAPE, dropout=0.1)
    assert tokenizer.fingerprint == small_tokenizer.fingerprint
    assert torch.equal(a.wte.weight, b.wte.weight)
    assert not torch.equal(a.wte.weight, c.wte.weight)
