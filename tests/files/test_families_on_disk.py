"""Models, adapters and reward models of every family between here and transformers or PEFT; and what is refused, by name."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from families import CASES, hf_config, in_transformers
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.adapters import save_adapter
from tunesmith.files.names import SAMPLE, load_adapted, load_plain, shape_of
from tunesmith.files.reward_models import load_reward_model, save_reward_model
from tunesmith.files.weights import save_model, weights_fingerprint
from tunesmith.models.known import SIZES, config_from_hf
from tunesmith.models.lora import apply_lora, lora_layers
from tunesmith.models.reward_head import RewardModel

cases = pytest.mark.parametrize("case", CASES)
IDS = torch.arange(40)[None] * 97 % 6000
CLOSE = {"rtol": 2e-4, "atol": 5e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(SAMPLE)


@pytest.fixture
def theirs(case, tokenizer):
    return in_transformers(case, vocab_size=tokenizer.vocab_size)


@pytest.fixture
def directory(theirs, tokenizer, tmp_path):
    """As transformers saves it, beside our tokenizer."""
    path = tmp_path / "theirs"
    theirs.save_pretrained(path)
    tokenizer.save(path, 96, tokenizer.vocab_size)
    return path


def logits(model):
    with torch.no_grad():
        return model.lm_head(model(IDS))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@cases
def test_what_one_saves_computes_the_same_in_the_other(theirs, directory, tokenizer, tmp_path):
    ours, right = load_plain(directory), their_logits(theirs)
    torch.testing.assert_close(logits(ours), right, **CLOSE)
    save_model(ours, tokenizer, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(their_logits(again), right)
    assert shape_of(str(tmp_path / "ours")) == shape_of(str(directory)) == ours.config


@cases
def test_shards_and_bfloat16_are_read_as_transformers_reads_them(theirs, directory):
    theirs.to(torch.bfloat16).save_pretrained(directory, max_shard_size="30KB")
    (directory / "model.safetensors").unlink()
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(load_plain(directory)), their_logits(again), **CLOSE)


@cases
def test_an_adapter_of_ours_computes_the_same_in_peft_and_merged(theirs, directory, tmp_path):
    model = load_plain(directory)
    fingerprint = weights_fingerprint(model)
    apply_lora(model, "all-linear", rank=2, alpha=8)
    for i, layer in enumerate(lora_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
    save_adapter(model, tmp_path / "adapter", base=str(directory), fingerprint=fingerprint)
    in_peft = their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter"))
    assert not torch.allclose(in_peft, logits(load_plain(directory)), **CLOSE)
    for ours in (model, load_adapted(tmp_path / "adapter"), load_plain(tmp_path / "adapter")):
        torch.testing.assert_close(logits(ours), in_peft, **CLOSE)


@cases
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]], ids=str)
def test_an_adapter_of_peft_computes_the_same_here_and_merged(theirs, directory, tmp_path, targets):
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, config)
    adapted.peft_config["default"].base_model_name_or_path = str(directory)
    right = their_logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    for ours in (load_adapted(tmp_path / "adapter"), load_plain(tmp_path / "adapter")):
        torch.testing.assert_close(logits(ours), right, **CLOSE)


@cases
def test_a_reward_model_is_the_classifier_of_its_family(directory, tokenizer, tmp_path):
    model = RewardModel(load_plain(directory))
    model.init_score(0)
    save_reward_model(model, tokenizer, tmp_path / "reward")
    theirs, last = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward"), torch.tensor([39])
    theirs.save_pretrained(tmp_path / "again")
    for ours in (model, load_reward_model(tmp_path / "reward"), load_reward_model(tmp_path / "again")):
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS, rows=last), their_logits(theirs)[:, 0], **CLOSE)


# ---- what is not computed here ---------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu', which tunesmith's Llama does not support"),
    ("llama", {"rope_parameters": None, "rope_scaling": YARN}, "rope_type = 'yarn'.*Llama.*default.*linear or llama3"),
    ("llama", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling = 'linear'; expected an object"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor = None; expected a number above 0"),
    ("llama", {"rope_parameters": None, "rope_theta": "big"}, "rope_theta = 'big'"),
    ("llama", {"rope_scaling": LLAMA3}, "low_freq_factor = 4 and high_freq_factor = 1"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    ("llama", {"head_dim": 5}, "head_dim = 5 is odd"),
    ("llama", {"head_dim": None, "hidden_size": 34}, "hidden_size = 34 is not a multiple of num_attention_heads = 4"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias = 'yes'"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "weights are quantised .fp8., which tunesmith does not read"),
    ("gpt2", {"compression_config": {"format": "int-quantized"}}, "weights are quantised .quantization_config."),
    ("llama", {"is_causal": False}, "is_causal = False, which tunesmith's Llama does not support"),
    ("mistral", {"sliding_window": 50}, "sliding_window = 50 in texts of up to 96 tokens.*Mistral"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True, which tunesmith's Qwen2"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', which tunesmith's Qwen3"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', which tunesmith's Llama"),
    ("gpt_neox", {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention', which tunesmith's GPT-NeoX"),
    ("gpt_neox", {"hidden_act": "silu"}, "hidden_act = 'silu', which tunesmith's GPT-NeoX does not support"),
    ("gpt_neox", {"rope_parameters": YARN}, "rope_type = 'yarn'.*GPT-NeoX"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.2}, "rotary_pct = 0.2 turns 1 of a head's 8 numbers"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": "all"}, "rotary_pct = 'all'"),
    ("gpt_neox", {"num_attention_heads": 5}, "hidden_size = 32 is not a multiple of num_attention_heads = 5"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, which tunesmith's Gemma 3"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "layer_types = .*chunked_attention.* for 3 layers; expected"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "for 3 layers; expected"),
    ("gemma3_text", {"layer_types": "full_attention"}, "layer_types = 'full_attention'; expected a list"),
    ("gemma3_text", {"sliding_window": None}, "no sliding_window; state its width"),
    ("gemma3_text", {"sliding_window": 0}, "sliding_window = 0"),
    ("gemma3_text", {"rope_parameters": {"full_attention": YARN}}, "rope_type = 'yarn'.*Gemma 3"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "in layers with a window, which tunesmith's Gemma 3 does not support"),
    ("gemma3_text", {"rope_parameters": {"full_attention": "far"}}, "full_attention.*'far'; expected an object"),
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling = 'linear'; expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "changes", "told"), REFUSED, ids=[told.split(",")[0] for *_, told in REFUSED])
def test_what_is_not_computed_is_refused_by_name(case, changes, told, tmp_path):
    hf = hf_config(case).to_dict()
    config_from_hf(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf | changes))
    with pytest.raises(UserError, match=told):
        load_plain(tmp_path)


def test_a_window_that_no_text_can_leave_is_none():
    hf = hf_config("mistral").to_dict()
    assert config_from_hf(hf | {"sliding_window": 96}) == config_from_hf(hf | {"sliding_window": None})
    left_out = {name: value for name, value in hf.items() if name != "sliding_window"}  # transformers then takes 4,096
    assert config_from_hf(left_out).longest == 96
    with pytest.raises(UserError, match="sliding_window = 4096 in texts of up to 32,768"):
        config_from_hf(left_out | {"max_position_embeddings": 32_768})


@pytest.mark.parametrize("case", ["llama biases", "llama linear"])
def test_positions_are_read_in_both_forms(case):
    new = hf_config(case).to_dict()
    stated = dict(new.pop("rope_parameters"))
    old = new | {"rope_theta": stated.pop("rope_theta"), "rope_scaling": stated}
    kind = {"type" if name == "rope_type" else name: value for name, value in stated.items()}
    config = config_from_hf(hf_config(case).to_dict())
    assert config.rope_scaling is not None
    assert config == config_from_hf(old) == config_from_hf(old | {"rope_scaling": kind})


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_the_first_longest_text_may_stand_beside_the_scaling(case, tmp_path):
    scaling = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    theirs = in_transformers(case)
    theirs.save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["rope_parameters"]
    old |= {"rope_scaling": scaling, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = load_plain(tmp_path)
    assert ours.config.rope_scaling.longest == 64
    ids = IDS % 61
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(ids)), again.eval()(ids).logits, **CLOSE)


AS_ON_THE_HUB = {  # in the form of before transformers 5
    "EleutherAI/pythia-70m": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "google/gemma-3-270m": {
        "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
        "initializer_range": 0.02, "intermediate_size": 2048, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "use_bidirectional_attention": False, "vocab_size": 262144,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
    "google/gemma-3-1b-pt": {
        "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AS_ON_THE_HUB)
def test_a_published_shape_is_the_one_on_the_hub_as_transformers_reads_it(name):
    hf = AS_ON_THE_HUB[name]
    assert config_from_hf(hf) == SIZES[name] == config_from_hf(AutoConfig.for_model(**hf).to_dict())
    assert config_from_hf({"model_type": hf["model_type"]}) == config_from_hf(
        AutoConfig.for_model(hf["model_type"]).to_dict()
    ), "what config.json leaves out"


def test_positions_of_both_kinds_of_layers_are_read_in_both_forms():
    new = hf_config("gemma3_text wide").to_dict()
    stated = new.pop("rope_parameters")
    scaling = dict(stated["full_attention"])
    old = new | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "rope_local_base_freq": 100.0}
    config = config_from_hf(hf_config("gemma3_text wide").to_dict())
    assert (config.rope_theta, config.rope_local_base_freq) == (50_000.0, 100.0)
    assert config == config_from_hf(old) == config_from_hf(AutoConfig.for_model(**old).to_dict())


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["low rank", "whole"])
@pytest.mark.parametrize("case", ["gpt_neox"])
def test_an_adapter_on_a_head_of_another_name_in_files(theirs, directory, tmp_path, saved):
    """transformers loads and saves GPT-NeoX's head as `embed_out` and has it as `lm_head`, which is what PEFT sees."""
    assert "embed_out.weight" in load_file(directory / "model.safetensors")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["dense", "lm_head"][: 1 if saved else 2], modules_to_save=saved,
                             task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    adapted = peft.get_peft_model(theirs, config)
    adapted.peft_config["default"].base_model_name_or_path = str(directory)
    if saved:
        torch.nn.init.normal_(adapted.base_model.model.lm_head.modules_to_save["default"].weight)
    right = their_logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_adapted(tmp_path / "adapter")
    torch.testing.assert_close(logits(model), right, **CLOSE)
    if not saved:
        save_adapter(model, tmp_path / "again", base=str(directory), fingerprint="")
        base = AutoModelForCausalLM.from_pretrained(directory)
        torch.testing.assert_close(
            their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "again")), right, **CLOSE
        )
