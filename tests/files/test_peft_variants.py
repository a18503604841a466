"""Adapters of PEFT's that change more than linear layers compute here what they compute there; the rest names the way out."""

import json
import shlex
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunesmith as ts
from reference import random_model
from tiny_runs import tiny_config
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.adapters import CONFIG, OLD_WEIGHTS, WEIGHTS
from tunesmith.files.names import SAMPLE, load_adapted
from tunesmith.files.weights import save_model
from tunesmith.models.gpt2 import GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=128)
IDS = torch.cat(
    [torch.tensor([[5, 6, 7]]), torch.randint(0, 6144, (1, 24), generator=torch.Generator().manual_seed(0))], 1
)


@pytest.fixture(autouse=True)
def _peft_quietly():
    """Its warnings about tied heads and Conv1D are no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    shape = GPTConfig(**{**vars(SHAPE), "tied_head": request.param})
    save_model(random_model(shape), Tokenizer.load(SAMPLE), path)
    return path


def made_by_peft(base, directory, **options):
    """An adapter of PEFT's whose every trained number is random, on disk, and its logits when PEFT loads it again."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(directory)
    return in_peft(base, directory)


def in_peft(base, directory):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    with torch.no_grad():
        return model.eval()(IDS).logits


def logits(model):
    with torch.no_grad():
        return model.lm_head(model(IDS))


VARIANTS = {
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "last norm saved whole": {"modules_to_save": ["ln_f"]},
    "layers of the blocks saved whole": {"modules_to_save": ["mlp.c_fc", "ln_1"]},
    "embedding saved whole": {"modules_to_save": ["wte"]},
    "positions saved whole": {"modules_to_save": ["wpe"]},
    "embedding and head saved whole": {"modules_to_save": ["wte", "lm_head"]},
    "embedding": {"target_modules": ["wte", "c_attn"]},
    "embeddings alone": {"target_modules": ["wte", "wpe"], "fan_in_fan_out": False},
    "embedding, scaled by its root": {
        "target_modules": ["wte", "c_attn"],
        "use_rslora": True,
        "alpha_pattern": {"wte": 3},
    },
    "tokens": {"trainable_token_indices": {"wte": [5, 6]}},
    "a list of tokens": {"trainable_token_indices": [5, 6]},
    "head beside its layers": {"target_modules": ["lm_head", "c_attn"], "modules_to_save": ["ln_f"]},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_peft_computes_is_computed_here(base, tmp_path, kind):
    theirs = made_by_peft(base, tmp_path / "adapter", **VARIANTS[kind])
    model, tokenizer = ts.load(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_adapted(tmp_path / "adapter")), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - logits(ts.load(str(base), device="cpu")[0])).abs().max() > 0.01
    save_model(model, tokenizer, tmp_path / "whole")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(IDS).logits
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"modules_to_save": ["wte"]}, {"target_modules": ["wte", "c_attn"]}], ids=str)
def test_asking_peft_to_keep_a_head_tied_changes_nothing_on_a_gpt2_and_so_it_does_here(tmp_path, options):
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), tmp_path / "base")
    theirs = made_by_peft(tmp_path / "base", tmp_path / "adapter", **options, ensure_weight_tying=True)
    model, _ = ts.load(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5)


def test_weights_in_an_old_bin_file_load_without_running_code(base, tmp_path):
    theirs = made_by_peft(base, tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "adapter" / OLD_WEIGHTS)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.testing.assert_close(
        logits(ts.load(str(tmp_path / "adapter"), device="cpu")[0]), theirs, rtol=1e-5, atol=1e-5
    )
    torch.save({"a": Path}, tmp_path / "adapter" / OLD_WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_model\.bin cannot be read as weights .*run code"):
        ts.load(str(tmp_path / "adapter"), device="cpu")


def test_such_an_adapter_can_be_trained_on(tmp_path):
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), tmp_path / "base")
    theirs = made_by_peft(tmp_path / "base", tmp_path / "adapter", modules_to_save=["lm_head"])
    quick = {"train__steps": 2, "eval__iters": 1, "eval__every": 2, "data__max_rows": 20, "data__block_size": 64}
    for rank in (0, 2):
        run = ts.sft(tiny_config(tmp_path / "adapter", tmp_path / f"run{rank}", **quick, lora__rank=rank))
        first = ts.load(f"{run.path}@0", device="cpu")[0]
        torch.testing.assert_close(logits(first), theirs, rtol=1e-5, atol=1e-5)
        assert (logits(ts.load(str(run.path), device="cpu")[0]) - theirs).abs().max() > 1e-4
    torch.testing.assert_close(
        in_peft(run.path / "base", run.best_checkpoint()),
        logits(ts.load(str(run.path), device="cpu")[0]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_what_is_not_computed_here_names_lines_that_merge_it(tmp_path, options):
    """They are run as they stand, and the result computes what PEFT computes."""
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), tmp_path / "base")
    theirs = made_by_peft(tmp_path / "base", tmp_path / "adapter", **options)
    with pytest.raises(UserError, match="Merge it with peft") as caught:
        ts.load(str(tmp_path / "adapter"), device="cpu")
    assert "\n" not in str(caught.value)
    words = shlex.split(str(caught.value).partition("-merged: ")[2])
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})
    merged, _ = ts.load(str(tmp_path / "adapter-merged"), device="cpu")
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "cannot be merged"), ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"), ({"lora_dropout": "none"}, "lora_dropout"),
        ({"lora_alpha": True}, "lora_alpha"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"modules_to_save": ["ln_f"], "trainable_token_indices": {"wte": [7000, 6]}}, r"rows \[7000, 6\]"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_settings_are_one_clear_line(tmp_path, changes, told):
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter", **VARIANTS["tokens"])
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        ts.load(str(tmp_path / "adapter"), device="cpu")


def test_a_weight_of_another_shape_is_named(tmp_path):
    save_model(random_model(SHAPE), Tokenizer.load(SAMPLE), tmp_path / "base")
    made_by_peft(tmp_path / "base", tmp_path / "adapter", modules_to_save=["ln_f"])
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    state["base_model.model.transformer.ln_f.weight"] = torch.ones(31)
    save_file(state, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"\(31,\) for transformer\.ln_f\.weight, but the model has \(32,\)"):
        ts.load(str(tmp_path / "adapter"), device="cpu")
