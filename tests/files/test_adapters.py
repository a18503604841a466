"""Adapters on disk: what is trained here computes the same in PEFT, what PEFT makes computes the same here, the rest is refused."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunesmith as ts
from reference import greedy, random_model
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.adapters import CONFIG, WEIGHTS, read_adapter, save_adapter
from tunesmith.files.names import SAMPLE, load_adapted, load_plain
from tunesmith.files.weights import load_model, save_model, weights_fingerprint
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.lora import lora_layers

TOLERANCE = 1e-5
SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=64)
IDS = torch.randint(0, 6144, (2, 24), generator=torch.Generator().manual_seed(0))
TRAINED = {
    "lora__rank": 4, "train__steps": 4, "optimizer__lr": 0.05, "eval__every": 2, "checkpoint__every": 2, "eval__iters": 1,
}  # fmt: skip
LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"


@pytest.fixture(autouse=True)
def _peft_quietly():
    """Its warnings about tied heads and Conv1D are no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in which every weight matters, with the sample's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), path)
    return path


@pytest.fixture(scope="module")
def run(tiny_directory, tmp_path_factory):
    """Four steps with adapters on every layer of the blocks."""
    return ts.sft(tiny_config(tiny_directory, tmp_path_factory.mktemp("runs") / "lora", **TRAINED))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """A good adapter on `base` as PEFT saves it, for a test to spoil."""
    return made_by_peft(base, tmp_path / "adapter")[0]


def logits(model):
    with torch.no_grad():
        return model.lm_head(model(IDS))


def loaded(name):
    return logits(ts.load(str(name), device="cpu")[0])


def close(ours, theirs, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def in_peft(directory, base):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()(IDS).logits


def made_by_peft(base, directory, **options):
    """An adapter of PEFT's with random values, on disk, and its logits."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, "fan_in_fan_out": True, **options})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(directory)
        return directory, model(IDS).logits


def change_config(directory, **changes):
    """None removes a key."""
    config = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(directory, change):
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS, {"format": "pt"})


# What is trained here, in PEFT


@pytest.mark.parametrize(
    ("targets", "alpha", "listed"),
    [
        ("all-linear", None, LINEAR), ("all-linear,lm_head", 6.0, [*LINEAR, "lm_head"]), ("lm_head", 6.0, ["lm_head"]),
        ("h.0.*", 6.0, [f"transformer.h.0.{name}" for name in LINEAR]), ("c_proj", None, ["attn.c_proj", "mlp.c_proj"]),
    ],
)  # fmt: skip
def test_what_is_trained_here_computes_the_same_in_peft(tiny_directory, tmp_path, targets, alpha, listed):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **TRAINED, lora__targets=targets, lora__alpha=alpha))
    checkpoint = run.checkpoint(4)
    theirs = in_peft(checkpoint, tiny_directory)
    assert (theirs - loaded(tiny_directory)).abs().max() > 0.05  # the training did something
    close(logits(load_adapted(checkpoint)), theirs)
    close(loaded(checkpoint), theirs)
    config = peft.PeftConfig.from_pretrained(checkpoint)
    assert (config.task_type, config.r, config.lora_alpha) == ("CAUSAL_LM", 4, alpha or 8.0)
    assert run.config["lora"]["alpha"] == config.lora_alpha
    assert Tokenizer.load(checkpoint).fingerprint == Tokenizer.load(tiny_directory).fingerprint
    assert (config.target_modules, config.fan_in_fan_out) == (set(listed), targets != "lm_head")
    save_model(*ts.load(str(checkpoint), device="cpu"), tmp_path / "merged")  # a head of its own, if it was adapted
    with torch.no_grad():
        alone = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint).eval()  # finds the base by itself
        assert torch.equal(alone(IDS).logits, theirs)
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits, theirs)


def test_the_same_adapter_is_the_same_file_byte_for_byte(run, tmp_path):
    model = load_adapted(run.checkpoint(4))
    for i in range(9):
        save_adapter(model, tmp_path / str(i), base="base", fingerprint="f" * 64)
    assert len({(tmp_path / str(i) / WEIGHTS).read_bytes() for i in range(9)}) == 1


# What PEFT makes, here

PEFTS = {
    "default": {},
    "list": {"target_modules": ["attn.c_proj", "c_fc"]},
    "pattern": {"target_modules": r".*\.1\.mlp\.c_.*"},
    "layers": {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"c_attn": 2, r"h\.1\.mlp\.c_fc": 7, "h.0.mlp.c_fc": 3},
              "alpha_pattern": {"attn": 99, "mlp.c_proj": 3, r".*h\.0\..*c_attn": 5, "c_attn": 9, "transformer.h.1.mlp.c_fc": 7}},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 3}},
    "head": {"target_modules": ["c_attn", "lm_head"]},
    "head only": {"target_modules": ["lm_head"], "fan_in_fan_out": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFTS)
def test_what_peft_saves_computes_the_same_here_and_after_saving_again(base, tmp_path, kind):
    directory, theirs = made_by_peft(base, tmp_path / "theirs", **PEFTS[kind])
    assert (theirs - loaded(base)).abs().max() > 0.1
    ours = load_adapted(directory)
    close(logits(ours), theirs, 2 * TOLERANCE)
    close(loaded(directory), theirs, 2 * TOLERANCE)
    mark = weights_fingerprint(load_model(base))
    save_adapter(ours, tmp_path / "again", base=str(base), fingerprint=mark)
    close(logits(load_adapted(tmp_path / "again")), logits(ours), TOLERANCE)
    close(in_peft(tmp_path / "again", base), theirs)


def test_an_adapter_trained_in_half_precision_loads_as_float32(base, tmp_path):
    """Also one on the head, beside which PEFT stores the base's weight in the precision of its training."""
    adapter, _ = made_by_peft(base, tmp_path / "adapter", **PEFTS["head"])
    change_weights(adapter, lambda s: s.update({name: value.bfloat16() for name, value in s.items()}))
    layers = lora_layers(load_adapted(adapter))
    assert {layer.lora_A.dtype for layer in layers.values()} == {torch.float32}
    assert torch.equal(layers["h.0.attn.c_attn"].lora_B, load_file(adapter / WEIGHTS)[KEY].float())


def test_only_the_adapters_learn_and_dropout_is_as_it_was(base, tmp_path):
    model = load_adapted(made_by_peft(base, tmp_path / "theirs", lora_dropout=0.25)[0])
    layers = lora_layers(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora_{half}" for name in layers for half in "AB"}
    assert {layer.dropout for layer in layers.values()} == {0.25}
    assert not any(module.training for module in model.modules())


# Names: RUN, RUN@STEP, adapters on adapters, bases in the run


def test_an_adapter_without_a_tokenizer_takes_its_bases(base, adapter):
    assert not (adapter / "tokenizer.json").exists()
    _, tokenizer = ts.load(str(adapter), device="cpu")
    assert tokenizer.fingerprint == Tokenizer.load(base).fingerprint


def test_a_run_and_a_step_of_it_are_models(run, tiny_directory):
    assert torch.equal(loaded(run.path), loaded(run.checkpoint(run.status["best_step"])))
    assert torch.equal(loaded(f"{run.path}@0"), loaded(tiny_directory))  # fresh adapters
    assert not torch.equal(loaded(f"{run.path}@2"), loaded(f"{run.path}@4"))
    model, tokenizer = ts.load(f"{run.path}@4", device="cpu")
    asked = [{"role": "user", "content": "What is fog?"}]
    said = greedy(load_adapted(run.checkpoint(4)), encode_prompt(tokenizer, asked), 8, tokenizer.end_of_text)
    assert ts.generate(model, tokenizer, [asked], temperature=0, max_new_tokens=8) == [tokenizer.decode(said).strip()]


def test_adapters_can_be_trained_on_adapters_and_the_base_is_found_from_everywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    second = ts.sft(tiny_config(run.path.name, tmp_path / "second", **TRAINED, lora__targets="c_attn"))
    monkeypatch.chdir(tmp_path)
    first = run.best_checkpoint()
    assert read_adapter(second.checkpoint(4)).base == str((second.path / "base").resolve())
    assert torch.equal(loaded(f"{second.path}@0"), loaded(first))
    expected = load_adapted(first)  # the first unmerged, the second's products added by hand
    config = json.loads((second.checkpoint(4) / CONFIG).read_text())
    added = load_file(second.checkpoint(4) / WEIGHTS)
    with torch.no_grad():
        for i in range(2):
            a, b = (added[f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{half}.weight"] for half in "AB")
            expected.h[i].attn.c_attn.base.weight += config["lora_alpha"] / config["r"] * b @ a
    assert (logits(expected) - loaded(first)).abs().max() > 0.05
    close(loaded(f"{second.path}@4"), logits(expected))


def test_a_random_base_is_kept_in_the_run(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **TRAINED, model__init="random", train__seed=7))
    assert torch.equal(loaded(f"{run.path}@0"), loaded(run.path / "base"))
    assert not torch.equal(loaded(run.path / "base"), loaded(tiny_directory))
    close(loaded(run.path), in_peft(run.best_checkpoint(), run.path / "base"))


def test_a_random_base_that_a_failed_start_left_behind_is_not_taken_for_this_runs(tiny_directory, tmp_path):
    options = {**TRAINED, "model__init": "random"}
    with pytest.raises(UserError, match="nowhere"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "run", **options, train__seed=1, data__name="nowhere.jsonl"))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "run", **options, train__seed=2))
    assert torch.equal(loaded(f"{run.path}@0"), loaded(run.path / "base"))


# What is refused


def refused(directory, *told):
    with pytest.raises(UserError) as caught:
        ts.load(str(directory), device="cpu")
    missing = [part for part in (str(directory), *told) if part not in str(caught.value)]
    assert not missing, f"{caught.value} does not name {missing}"


@pytest.fixture
def moved(run, tiny_directory, tmp_path):
    """A run's last checkpoint and its base, both to spoil."""
    base = shutil.copytree(tiny_directory, tmp_path / "base")
    checkpoint = shutil.copytree(run.checkpoint(4), tmp_path / "adapter")
    change_config(checkpoint, base_model_name_or_path=str(base))
    assert torch.equal(loaded(checkpoint), loaded(run.checkpoint(4)))
    return checkpoint, base


def test_an_adapter_of_a_base_that_has_changed_is_refused(moved):
    checkpoint, base = moved
    state = load_file(base / "model.safetensors")
    state["transformer.h.1.ln_2.bias"][3] += 1e-6
    save_file(state, base / "model.safetensors", {"format": "pt"})
    refused(checkpoint, str(base), "different weights", "base_model_name_or_path")


def test_an_adapter_on_another_head_than_the_bases_is_refused(base, tmp_path):
    adapter, _ = made_by_peft(base, tmp_path / "adapter", **PEFTS["head"])
    change_weights(adapter, lambda s: s["base_model.model.lm_head.base_layer.weight"][3].add_(1e-3))
    refused(adapter, str(base), "different weights", "base_model_name_or_path")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_embd": 48}, ["h.0.attn.c_attn", "32 inputs and 96 outputs", "48 and 144"]),
        ({"n_layer": 1}, ["no layer transformer.h.1.attn.c_attn"]),
    ],
    ids=["wider", "shallower"],
)
def test_an_adapter_that_does_not_fit_its_base_names_the_layers(adapter, base, tmp_path, change, told):
    save_model(random_model(replace(SHAPE, **change)), Tokenizer.load(SAMPLE), tmp_path / "other")
    change_config(adapter, base_model_name_or_path=str(tmp_path / "other"))
    refused(adapter, *told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, ["use_dora", "plain LoRA"]), ({"bias": "lora_only"}, ["bias", "plain LoRA"]),
        ({"lora_bias": True}, ["lora_bias", "plain LoRA"]), ({"init_lora_weights": "pissa"}, ["pissa"]),
    ],
    ids=str,
)  # fmt: skip
def test_variants_that_are_not_computed_here_are_refused_by_name(base, tmp_path, options, told):
    """PiSSA changes the base's weights too: beside the untouched base its adapter computes something else."""
    refused(made_by_peft(base, tmp_path / "adapter", **options)[0], *told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model_name_or_path": None}, ["names no base model", "base_model_name_or_path"]),
        ({"base_model_name_or_path": "/no/where"}, ["'/no/where'", "in none of these places"]),
        ({"lora_alpha": None}, ["lora_alpha"]), ({"lora_alpha": "much"}, ["lora_alpha"]), ({"peft_type": "LOHA"}, ["LOHA"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_without_what_is_needed_is_refused_by_key(adapter, changes, told):
    change_config(adapter, **changes)
    refused(adapter, *told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.clear(), ["no adapter"]),
        (lambda s: s.pop(KEY), ["h.0.attn.c_attn", "matrices"]),
        (lambda s: s.update({KEY: torch.ones(96, 5)}), ["h.0.attn.c_attn", "matrices"]),
        (lambda s: s.update({"base_model.model.transformer.ln_f.weight": torch.ones(32)}), ["ln_f.weight", "not part of"]),
    ],
    ids=["nothing", "half", "misfit", "foreign"],
)  # fmt: skip
def test_wrong_tensors_are_named(adapter, change, told):
    change_weights(adapter, change)
    refused(adapter, *told)


def test_damaged_and_missing_files_are_named(adapter):
    whole = (adapter / WEIGHTS).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        (adapter / WEIGHTS).write_bytes(whole[:length])
        refused(adapter, WEIGHTS, "cannot be read")
    (adapter / WEIGHTS).unlink()
    refused(adapter, WEIGHTS, "missing")
    (adapter / CONFIG).write_text("{")
    refused(adapter, CONFIG, "not valid JSON")


# The command line


@pytest.fixture
def fails(capfd):
    def check(argv, code, *told):
        found = main([str(word) for word in argv])
        err = capfd.readouterr().err
        assert (found, len(err.splitlines())) == (code, 1), err
        assert all(part in err for part in ("tunesmith: ", *told)), err

    return check


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("--lora.rank 100000", 1, ["rank 100000", "expected 1 to 48"]), ("--lora.rank -1", 2, ["rank is -1", "at least 0"]),
        ("--lora.rank 2 --lora.targets nonsense", 1, ["--lora.targets", "'nonsense'", "attn.c_attn", "lm_head"]),
        ("--lora.r 8", 2, ["unknown option --lora.r", "Did you mean --lora.rank?"]),
        ("--lora.rank two", 2, ["--lora.rank two", "a whole number"]),
        ("--lora.rank 2 --lora.alpha 0", 2, ["--lora.alpha is 0", "more than 0"]),
        ("--lora.rank 2 --lora.dropout 1", 2, ["--lora.dropout is 1", "dropout < 1"]),
        ("--lora.target_modules c_attn", 2, ["unknown option --lora.target_modules", "Did you mean --lora.targets?"]),
    ],
)  # fmt: skip
def test_wrong_adapter_options_are_told_in_one_line(fails, tiny_directory, tmp_path, words, code, told):
    argv = ["sft", "--model.name", tiny_directory, "--data.name", "sample", "--data.block_size", 64, "--train.steps", 1]
    fails([*argv, "--out", tmp_path / "run", "--train.device", "cpu", *words.split()], code, *told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["chat"], ["evaluate", "sample"]], ids=lambda argv: argv[0])
def test_a_command_on_an_adapter_whose_base_is_gone_says_so(fails, moved, argv):
    checkpoint, base = moved
    shutil.rmtree(base)
    told = (str(checkpoint), f"adapter for '{base}'", "in none of these places", "--model.base")
    fails([argv[0], checkpoint, *argv[1:]], 1, *told)


def test_plain_models_and_adapters_are_told_apart(base, adapter, tmp_path):
    """A whole model beside an adapter's config, as after merging in place, is the whole model."""
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copy(adapter / CONFIG, both)
    assert torch.equal(loaded(both), logits(load_plain(base)))
    (tmp_path / "neither").mkdir()
    refused(tmp_path / "neither", "config.json", CONFIG, "status.json")


def test_a_base_folder_that_happens_to_lie_there_is_not_taken_for_a_missing_base(base, tmp_path):
    """Only for an adapter that says by its fingerprint which weights it needs."""
    adapter = made_by_peft(base, tmp_path / "run" / "checkpoints" / "adapter")[0]
    shutil.copytree(base, tmp_path / "run" / "base")
    change_config(adapter, base_model_name_or_path="/no/where")
    refused(adapter, "'/no/where'", "in none of these places")
