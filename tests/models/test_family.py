"""A family is one file and one line: a small Llama, registered for a test, goes the whole way with nothing else changed."""

import dataclasses
from types import MappingProxyType

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tunesmith as ts
from tiny_runs import tiny_config
from toy_family import TOY, Toy, ToyConfig
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE, load_adapted, load_plain
from tunesmith.files.reward_models import load_reward_model, save_reward_model
from tunesmith.files.weights import save_model
from tunesmith.generation.engine import decode
from tunesmith.generation.sampling import Sampling
from tunesmith.models import known
from tunesmith.models.attention import Documents
from tunesmith.models.family import Keys
from tunesmith.models.gpt2 import GPT2, GPTConfig
from tunesmith.models.lora import apply_lora, find_targets
from tunesmith.models.model import build_model
from tunesmith.models.reward_head import RewardModel
from tunesmith.options.training import DPOConfig
from tunesmith.plan.memory import Work, activation_bytes, adapted_layers, predict_memory

IDS = torch.arange(40)[None] * 97 % 6000
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    families = MappingProxyType({"gpt2": GPT2, "llama": TOY})
    for module in ("models.known", "judge.scorers", "files.adapted_weights"):
        monkeypatch.setattr(f"tunesmith.{module}.FAMILIES", families)
    assert known.FAMILIES is families


@pytest.fixture
def tokenizer():
    return Tokenizer.load(SAMPLE)


@pytest.fixture
def toy(tokenizer):
    model = Toy(ToyConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture
def directory(toy, tokenizer, tmp_path):
    save_model(toy, tokenizer, tmp_path / "toy")
    return tmp_path / "toy"


def logits(model):
    with torch.no_grad():
        return model.lm_head(model(IDS))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_what_is_saved_computes_the_same_in_transformers_and_here(toy, directory):
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits(toy), their_logits(theirs), **CLOSE)
    assert torch.equal(logits(load_plain(directory)), logits(toy))
    theirs.save_pretrained(directory, max_shard_size="20KB")  # in shards
    (directory / "model.safetensors").unlink()
    assert torch.equal(logits(load_plain(directory)), logits(toy))


def test_its_reward_model_is_the_classifier_of_its_family(toy, tokenizer, tmp_path):
    model = RewardModel(toy)
    model.init_score(0)
    save_reward_model(model, tokenizer, tmp_path)
    theirs, last = AutoModelForSequenceClassification.from_pretrained(tmp_path), torch.tensor([IDS.shape[1] - 1])
    for ours in (model, load_reward_model(tmp_path)):
        torch.testing.assert_close(ours(IDS, rows=last), their_logits(theirs)[:, 0], **CLOSE)


def test_what_it_does_not_compute_is_refused_by_name():
    hf = TOY.to_hf(ToyConfig()) | {"model_type": "llama"}
    assert known.config_from_hf(hf) == ToyConfig()
    with pytest.raises(UserError, match="hidden_act = 'gelu', which tunesmith's Llama does not support"):
        known.config_from_hf(hf | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="'mamba'; tunesmith supports gpt2, llama models"):
        known.config_from_hf({"model_type": "mamba"})


def test_the_sizes_of_a_family_have_a_tokenizer():
    for family in (GPT2, TOY):
        assert family.tokenizer or not family.sizes


@pytest.mark.parametrize(
    "shape", [ToyConfig(), GPTConfig(2, 2, 8, 13, 5, n_inner=20), GPTConfig(1, 2, 8, 13, 5, tied_head=False)]
)
def test_layers_and_weights_are_those_that_a_family_lists(shape):
    model, listed = build_model(shape), shape.family.linear_layers(shape)
    blocks = shape.family.keys.blocks
    assert find_targets(model, "all-linear") == [f"{blocks}.{i}.{name}" for i in range(shape.depth) for name in listed]
    for name, (inputs, outputs, bias) in listed.items():
        layer = model.blocks[0].get_submodule(name)
        assert (layer.in_features, layer.out_features, layer.bias is not None) == (inputs, outputs, bias)
    assert model.get_submodule(shape.family.keys.embedding) is model.embedding
    assert shape.family.count(shape) == model.parameter_count() == sum(shape.family.tensor_sizes(shape))
    assert sorted(shape.family.tensor_sizes(shape)) == sorted(p.numel() for p in model.parameters())


def test_a_layer_that_is_not_there_is_answered_with_those_that_are(toy):
    with pytest.raises(UserError, match=r"There are self_attn\.q_proj.*in each block layers\.0.*such as layers\.0\.\*"):
        find_targets(toy, "c_attn")


def test_a_head_and_a_prefix_of_other_names():
    keys = Keys(prefix="gpt_neox.", embedding="embed_in", blocks="layers", head="embed_out")
    for name, theirs in {
        "lm_head.weight": "embed_out.weight",
        "lm_head": "embed_out",
        "layers.0.x": "gpt_neox.layers.0.x",
    }.items():
        assert (keys.theirs(name), keys.ours(theirs)) == (theirs, name)
    assert keys.ours("layers.0.x") == "layers.0.x"  # files without the prefix are read too


@pytest.mark.parametrize("targets", [None, "all-linear", "down_proj"])
def test_its_activations_are_what_autograd_keeps(tokenizer, targets):
    from tensors_made import kept_by_autograd

    shape, documents = ToyConfig(vocab_size=11), Documents.from_rows([[20, 44], [64]])
    model = Toy(shape).train()
    if targets:
        apply_lora(model, targets, rank=3, alpha=6)
    counted = Work(128, rank=3 if targets else 0, targets=adapted_layers(shape, targets) if targets else ())
    kept = kept_by_autograd(model, torch.randint(11, (2, 64)), documents)
    angles = 2 * model.for_blocks(documents.positions)[0].nbytes  # once, for all blocks
    quotient = 0 if targets else 4 * 128 * shape.width  # of the last norm, which a plan takes for GPT-2's
    assert activation_bytes(shape, counted) + angles + quotient == kept
    assert predict_memory(shape, counted).parameters == 4 * sum(p.numel() for p in model.parameters())


def test_its_answers_are_those_of_reading_everything_anew(toy, tokenizer):
    prompts = [[5, 9, 300, 17], [44, 2], [8, 8, 8, 90, 1, 6, 7]]
    answers = [[] for _ in prompts]
    for row, token, _ in decode(toy, tokenizer, prompts, Sampling(temperature=0), 12):
        answers[row].append(token)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in answer:
            with torch.no_grad():
                ids.append(int(toy.lm_head(toy(torch.tensor([ids]))[:, -1]).argmax()))
        assert ids[len(prompt) :] == answer


def test_it_is_trained_in_full_and_with_adapters_that_peft_reads(directory, tmp_path):
    full = ts.sft(tiny_config(directory, tmp_path / "full", train__steps=4, checkpoint__every=4, eval__every=4))
    losses = [line["validation_loss"] for line in full.metrics("eval")]
    assert losses[-1] < losses[0]
    light = ts.sft(
        tiny_config(full.path, tmp_path / "light", train__steps=2, checkpoint__every=2, eval__every=2, lora__rank=2)
    )
    checkpoint = light.checkpoints()[-1][1]
    base = AutoModelForCausalLM.from_pretrained(full.best_checkpoint())
    theirs = their_logits(peft.PeftModel.from_pretrained(base, checkpoint))
    torch.testing.assert_close(logits(load_adapted(checkpoint)), theirs, **CLOSE)
    torch.testing.assert_close(logits(load_plain(checkpoint)), theirs, **CLOSE)


@pytest.mark.parametrize("mode", [True, "selective"])
def test_memory_modes_change_nothing(toy, mode):
    loss = {}
    for checkpointing in (False, mode):
        toy.activation_checkpointing = checkpointing
        loss[checkpointing] = toy.train()(IDS, Documents.from_rows([[25, 15]])).square().sum()
    assert loss[False] == loss[mode]


def test_dpo_trains_it(directory, tmp_path):
    run = ts.dpo(
        tiny_config(directory, tmp_path / "dpo", DPOConfig, train__steps=2, checkpoint__every=2, eval__every=2)
    )
    assert run.checkpoints()
    assert dataclasses.is_dataclass(ts.load(str(run.path), device="cpu")[0].config)
