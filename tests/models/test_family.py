"""A family goes the whole way: trained in full, with adapters that PEFT reads, by preferences; here with a small Llama."""

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import tunesmith as ts
from families import here, in_transformers, random_ids
from tiny_runs import tiny_config
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE, load_adapted, load_plain
from tunesmith.files.weights import save_model
from tunesmith.models.attention import Documents
from tunesmith.models.family import Keys
from tunesmith.models.known import SIZES, config_from_hf
from tunesmith.models.llama import LlamaConfig
from tunesmith.models.lora import find_targets
from tunesmith.models.model import build_model
from tunesmith.options.training import DPOConfig

IDS = torch.arange(40)[None] * 97 % 6000
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def case():
    return "llama tied"


@pytest.fixture
def directory(case, tmp_path):
    tokenizer = Tokenizer.load(SAMPLE)
    theirs = in_transformers(case, vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    save_model(here(theirs), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad():
        return model.lm_head(model(IDS))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("case", ["llama tied", "gpt_neox", "gemma3_text"])
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


def test_dpo_trains_it(directory, tmp_path):
    options = {"train__steps": 2, "checkpoint__every": 2, "eval__every": 2}
    run = ts.dpo(tiny_config(directory, tmp_path / "dpo", DPOConfig, **options))
    assert run.checkpoints()
    assert ts.load(str(run.path), device="cpu")[0].config.family.name == "llama"


@pytest.mark.parametrize("case", ["llama biases", "qwen3", "gpt_neox", "gemma3_text"])
def test_compiled_blocks_compute_the_same_and_are_compiled_once(case):
    theirs, versions = in_transformers(case), CompileCounter()
    plain, compiled = (here(theirs).train() for _ in range(2))
    compiled.compile_blocks(backend=versions)
    counts = []
    for lengths in ([[25, 15], [40]], [[7, 33], [20, 20]], [[40], [1, 39]]):
        for model in (plain, compiled):
            model.zero_grad()
            model(random_ids(2, 40), Documents.from_rows(lengths)).square().sum().backward()
        counts.append(versions.frame_count)
        right = dict(plain.named_parameters())
        for name, p in compiled.named_parameters():
            if (grad := right[name].grad) is not None:
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item(), msg=name)
    assert counts[0] == counts[-1] > 0


def test_a_family_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(UserError, match=r"'mamba'; tunesmith supports gpt2, .*llama, mistral, .* models"):
        config_from_hf({"model_type": "mamba"})


def test_a_layer_that_is_not_there_is_answered_with_those_that_are():
    model = build_model(LlamaConfig(11, 8, 16, 2, 2))
    with pytest.raises(UserError, match=r"There are self_attn\.q_proj.*in each block layers\.0.*such as layers\.0\.\*"):
        find_targets(model, "c_attn")


def test_a_head_and_a_prefix_of_other_names():
    keys = Keys(prefix="gpt_neox.", embedding="embed_in", blocks="layers", head="embed_out")
    for name, theirs in {
        "lm_head.weight": "embed_out.weight",
        "lm_head": "embed_out",
        "layers.0.x": "gpt_neox.layers.0.x",
    }.items():
        assert (keys.theirs(name), keys.ours(theirs)) == (theirs, name)
    assert keys.ours("layers.0.x") == "layers.0.x"  # files without the prefix are read too


def test_new_weights_are_drawn_with_the_spread_that_the_shape_names():
    shape = LlamaConfig(64, 64, 128, 2, 4, attention_bias=True, initializer_range=0.05)
    models = [build_model(shape) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    one, same, other = ([*model.parameters()] for model in models)
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    for name, p in models[0].named_parameters():
        if p.dim() == 1:
            assert (p == (not name.endswith("bias"))).all(), name
        else:
            assert p.std().item() == pytest.approx(0.05, rel=0.1), name


SMOL, GEMMA, PYTHIA = (
    SIZES[name] for name in ("HuggingFaceTB/SmolLM2-135M", "google/gemma-3-270m", "EleutherAI/pythia-70m")
)


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (SMOL, {"depth": 3, "longest": 100}, {"num_hidden_layers": 3, "max_position_embeddings": 100}),
        (SMOL, {"width": 96, "heads": 6}, {"intermediate_size": 256, "num_key_value_heads": 3, "head_dim": 16}),
        (SMOL, {"width": 64, "heads": 4}, {"intermediate_size": 176, "num_key_value_heads": 1, "head_dim": 16}),
        (SIZES["Qwen/Qwen3-0.6B"], {"width": 64, "heads": 4}, {"head_dim": 128, "num_key_value_heads": 4}),
        (LlamaConfig(), {"heads": 16}, {"num_key_value_heads": 16, "head_dim": 256}),
        (
            GEMMA,
            {"depth": 7, "heads": 6},
            {"layer_types": (*GEMMA.layer_types[:6], "sliding_attention"), "head_dim": 256},
        ),
        (PYTHIA, {"width": 64, "heads": 4}, {"intermediate_size": 256, "head_width": 16, "rotary_width": 4}),
    ],
)
def test_what_follows_from_a_size_follows_it(base, changes, expected):
    shape = base.resized(**changes)
    assert {name: getattr(shape, name) for name in expected} == expected
    with pytest.raises(UserError, match=f"not a {base.family.title} shape: num_hidden_layers = 0; .*dropout = 1"):
        base.resized(depth=0, dropout=1)
    assert base.resized(depth=1, dropout=0.1).resized(depth=base.depth, dropout=0.0) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemmas_embedding_is_scaled_by_a_root_that_is_rounded_as_transformers_rounds_it(dtype):
    theirs = in_transformers("gemma3_text").to(dtype)
    ours, ids = here(theirs, dtype), random_ids(2, 9)
    right = theirs.model.embed_tokens(ids)
    assert torch.equal(ours.embed(ours.embedding(ids), ids), right)
    assert dtype is torch.float32 or not torch.equal((ours.embedding(ids).float() * 32**0.5).to(dtype), right)
