"""Small random models of every family, built by transformers and read here: what tests/models/test_families.py runs through.

A new family is held to all of it by its lines in CASES.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.files.weights import from_hf_state_dict
from tunesmith.models.known import config_from_hf
from tunesmith.models.model import build_model

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {  # model_type and a word -> what its config.json says beside SMALL
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "resid_pdrop": 0.0},
    "llama": {"num_key_value_heads": 2},
    "llama tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_parameters": LLAMA3},
    "llama linear": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4,
                     "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0}},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2 tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "qwen3 biases": {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True},
    "gpt_neox": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "gpt_neox sequential": {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
    "gpt_neox tied": {"rotary_pct": 1.0, "rotary_emb_base": 500, "layer_norm_eps": 1e-3, "tie_word_embeddings": True,
                      "rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    "gemma3_text": {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 12,
                    "sliding_window": 7, "sliding_window_pattern": 2},
    "gemma3_text wide": {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 24,
                         "sliding_window": 64, "rms_norm_eps": 1e-4,
                         "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                         "rope_parameters": {"full_attention": {**LLAMA3}, "sliding_attention": {"rope_theta": 100.0}}},
    "gemma3_text untied": {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 8, "query_pre_attn_scalar": 8,
                           "sliding_window": 2, "sliding_window_pattern": 2, "attention_bias": True,
                           "tie_word_embeddings": False},
}  # fmt: skip


def hf_config(case, **changes):
    """transformers' configuration of a case."""
    kind = case.partition(" ")[0]
    general = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0} if kind == "gpt2" else SMALL
    return AutoConfig.for_model(kind, **{**general, **CASES[case], "attn_implementation": "eager", **changes})


def in_transformers(case, seed=0, **changes):
    """A model of transformers in which every weight matters: matrices, biases and norms are all drawn at random."""
    model = AutoModelForCausalLM.from_config(hf_config(case, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p.round() + 0.2 * noise if p.dim() == 1 else 0.15 * noise)  # norms begin as ones, or zeros
    return model


def here(theirs, dtype=torch.float32):
    """The same model as ours, without a file in between."""
    model = build_model(config_from_hf(theirs.config.to_dict())).to(dtype)
    from_hf_state_dict(model, theirs.state_dict().items(), "transformers")
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
