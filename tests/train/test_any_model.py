"""Any MODEL into any training: after two steps exactly the tensors that should have moved have moved."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.adapters import CONFIG, read_adapter
from tunesmith.files.names import SAMPLE, load_adapted
from tunesmith.models.lora import lora_layers
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.trainee import check_trainable

TRAININGS = {
    "sft": (ts.sft, SFTConfig),
    "dpo": (ts.dpo, DPOConfig),
    "reward": (ts.train_reward_model, RewardConfig),
}
QUICK = {
    "train__steps": 2, "eval__every": 2, "checkpoint__every": 2, "eval__iters": 1, "data__max_rows": 40,
    "data__block_size": 96, "optimizer__lr": 0.01,
}  # fmt: skip
IDS = torch.randint(0, 6144, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _peft_quietly():
    """Its warnings about tied heads and Conv1D are no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made_by_transformers(path):
    torch.manual_seed(3)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=6144, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    Tokenizer.load(SAMPLE).save(path, 128)
    return path


def adapted_by_peft(base):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """Every kind of MODEL that people train on."""
    root = tmp_path_factory.mktemp("starts")
    plain = made_by_transformers(root / "transformers")
    adapted_by_peft(plain).save_pretrained(root / "adapter")
    adapted_by_peft(plain).merge_and_unload().save_pretrained(root / "merged")
    Tokenizer.load(SAMPLE).save(root / "merged", 128)
    ts.sft(tiny_config(plain, root / "run", **QUICK))
    ts.sft(tiny_config(plain, root / "lora", **QUICK, lora__rank=2))
    return {path.name: path for path in root.iterdir()}


STARTS = ["run", "lora", "adapter", "merged", "transformers"]


def start_weights(name):
    """Of the language model as it is loaded: merged, where it is an adapter."""
    model, _ = ts.load(str(name), device="cpu")
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(kind, model, out, **options):
    train, config = TRAININGS[kind]
    return train(tiny_config(model, out, config, **{**QUICK, **options}))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", TRAININGS)
def test_all_weights_move_and_no_other_thing_is_trained(starts, tmp_path, kind, start):
    run = trained(kind, starts[start], tmp_path / "out")
    before = start_weights(starts[start])
    if kind == "reward":
        scored, _ = ts.load_reward(f"{run.path}@2", device="cpu")
        first, _ = ts.load_reward(f"{run.path}@0", device="cpu")
        assert not torch.equal(scored.score.weight, first.score.weight)
        after = dict(scored.trunk.named_parameters())
        before.pop("lm_head.weight", None)
    else:
        after = start_weights(f"{run.path}@2")
    assert after.keys() == before.keys()
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    # what is added to every state alike adds the same to both scores of a pair: it has no gradient
    assert stayed <= ({"ln_f.bias"} if kind == "reward" else set())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", TRAININGS)
def test_adapters_move_and_their_base_is_the_model_as_loaded(starts, tmp_path, kind, start):
    run = trained(kind, starts[start], tmp_path / "out", lora__rank=2)
    first, last = (read_adapter(run.checkpoint(step)) for step in (0, 2))
    assert len(last.layers) == 8
    for name, (a, b, _) in last.layers.items():
        assert not torch.equal(a, first.layers[name][0]), name
        assert not torch.equal(b, first.layers[name][1]), name
    assert all(not torch.equal(value, first.extra[name]) for name, value in last.extra.items())
    assert bool(last.extra) == (kind == "reward")
    before = start_weights(starts[start])
    model = load_adapted(run.checkpoint(2))
    frozen = {name.replace(".base.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before), "the base is not bit for bit the start"
    assert len(lora_layers(model)) == 8


@pytest.mark.parametrize("reference", ["cached", "adapter", "model"])
def test_the_reference_of_dpo_is_the_model_as_it_was_loaded(starts, tmp_path, reference):
    """So the first estimate is that of equal models: log 2, whatever the start's own adapter does."""
    run = trained("dpo", starts["lora"], tmp_path / "out", lora__rank=2, dpo__reference=reference)
    first, last = (run.metrics("eval")[i]["validation_loss"] for i in (0, -1))
    assert first == pytest.approx(0.693147, abs=1e-6)
    assert last != pytest.approx(0.693147, abs=1e-4)


# An adapter on an adapter stands on the merged base


def in_peft(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def ours(name):
    model, _ = ts.load(str(name), device="cpu")
    with torch.no_grad():
        return model.lm_head(model(IDS))


@pytest.mark.parametrize("start", ["lora", "adapter"])
def test_an_adapter_on_an_adapter_opens_in_peft(starts, tmp_path, start):
    run = trained("sft", starts[start], tmp_path / "out", lora__rank=2)
    files = read_adapter(run.checkpoint(2))
    assert Path(files.base) == (run.path / "base").resolve()
    assert files.fingerprint == read_adapter(run.checkpoint(0)).fingerprint != ""
    theirs = in_peft(peft.AutoPeftModelForCausalLM.from_pretrained(run.checkpoint(2)))
    torch.testing.assert_close(ours(f"{run.path}@2"), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - ours(starts[start])).abs().max() > 1e-3
    with_base = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.path / "base"), run.checkpoint(2)
    )
    assert torch.equal(in_peft(with_base), theirs)


def test_a_run_with_its_own_base_can_be_moved(starts, tmp_path):
    run = trained("sft", starts["lora"], tmp_path / "out", lora__rank=2)
    before = ours(run.path)
    run.path.rename(tmp_path / "elsewhere")
    assert torch.equal(ours(tmp_path / "elsewhere"), before)


def test_below_the_current_directory_the_base_is_named_by_a_relative_path(starts, tmp_path, monkeypatch):
    """So that a whole project can move; peft reads it from there, tunesmith from everywhere."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    first = trained("sft", starts["transformers"], "runs/first").best_checkpoint().name
    trained("sft", "runs/first", "runs/second", lora__rank=2)
    third = trained("sft", "runs/second", "runs/third", lora__rank=2)
    bases = [
        json.loads((Path("runs") / run / "checkpoints/step-00000002" / CONFIG).read_text())
        for run in ("second", "third")
    ]
    assert [base["base_model_name_or_path"] for base in bases] == [
        f"runs/first/checkpoints/{first}",
        "runs/third/base",
    ]
    before = ours("runs/third")
    torch.testing.assert_close(
        in_peft(peft.AutoPeftModelForCausalLM.from_pretrained(third.best_checkpoint())), before, rtol=1e-5, atol=1e-5
    )
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(ours("moved/runs/third"), before)
    assert ours("moved/runs/second").isfinite().all()


def test_the_merged_base_is_written_once_and_a_resumed_run_goes_on_from_it(starts, tmp_path):
    whole = trained("sft", starts["lora"], tmp_path / "whole", lora__rank=2, train__steps=4)
    run = trained("sft", starts["lora"], tmp_path / "out", lora__rank=2)
    written = (run.path / "base" / "model.safetensors").stat().st_mtime_ns
    resumed = trained("sft", starts["lora"], tmp_path / "out", lora__rank=2, train__steps=4, resume=True)
    assert (run.path / "base" / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(ours(f"{resumed.path}@4"), ours(f"{whole.path}@4"))


# The guard


def test_a_training_that_would_leave_weights_untrained_is_refused(tiny_model):
    check_trainable(tiny_model, lora=False, name="m")
    tiny_model.h[0].requires_grad_(False)
    with pytest.raises(UserError, match=r"m: 12 of the 28 weights .* are frozen \(h\.0\.ln_1\.weight"):
        check_trainable(tiny_model, lora=False, name="m")
    with pytest.raises(UserError, match="0 of the 0 adapters"):
        check_trainable(tiny_model, lora=True, name="m")


def test_a_frozen_model_never_becomes_a_training_of_its_score_head(starts, tmp_path, monkeypatch):
    import tunesmith.train.trainee as trainee

    load = trainee.load_for_training

    def frozen(*args, **options):
        model, tokenizer = load(*args, **options)
        return model.requires_grad_(False), tokenizer

    monkeypatch.setattr(trainee, "load_for_training", frozen)
    for kind in TRAININGS:
        with pytest.raises(UserError, match="are frozen"):
            trained(kind, starts["run"], tmp_path / kind)
