"""Small GGUF files, written by the gguf package from models of transformers as llama.cpp's converter writes them."""

import gguf
import numpy as np
import torch
import transformers as t

from tunesmith.data.backend import gpt2_byte_symbols

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
SMALL |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SIZES_GPT2 = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "vocab_size": 300,
    "n_positions": 1024,
}  # transformers reads no other context of a GPT-2
CONFIGS = {  # heads of Qwen3 and Gemma are as wide as the published ones: transformers reads no other from GGUF
    "llama": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=False, rope_parameters=ROPE),
    "llama, tied, llama3": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama, linear, biases": lambda: t.LlamaConfig(
        **SMALL,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    ),
    "qwen2": lambda: t.Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=ROPE),
    "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=128, tie_word_embeddings=True, rope_parameters=ROPE),
    "gemma3_text": lambda: (
        t.Gemma3TextConfig(  # heads as wide as in those that are published: transformers reads no other
            **SMALL | {"num_hidden_layers": 7}, head_dim=256, query_pre_attn_scalar=256, sliding_window=16
        )
    ),
    "gpt2": lambda: t.GPT2Config(**SIZES_GPT2, bos_token_id=0, eos_token_id=0),
    "gpt_neox": lambda: t.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, tie_word_embeddings=False
    ),
}
NAMES = {"gemma3_text": "gemma3", "gpt_neox": "gptneox"}  # model_type -> architecture, where they differ


def model_of(kind):
    """A model of transformers with random weights, its norms and biases too, so that none stands for another."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
            if "norm" in name or ".ln_" in name:
                parameter += 1
    return model


def entries_of(config):
    """The metadata of a model's shape, under llama.cpp's names, without the architecture."""
    kind = config.model_type
    if kind == "gpt2":
        shape = {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
        }
        shape |= {"block_count": config.n_layer, "attention.head_count": config.n_head}
        return shape | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    width = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    shape = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if kind == "gpt_neox":
        shape["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 0.25) * width)
        return shape | {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "use_parallel_residual": config.use_parallel_residual,
        }
    shape["attention.head_count_kv"] = config.num_key_value_heads
    shape["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if kind == "gemma3_text":
        shape |= {"attention.sliding_window": config.sliding_window, "rope.freq_base": 1_000_000.0}
    else:
        shape["rope.freq_base"] = rope["rope_theta"]
        if rope["rope_type"] == "linear":
            shape |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if kind in ("gemma3_text", "qwen3"):
        shape |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return shape


def stored(name, weight, config):
    """A weight as llama.cpp's converter changes it. name: in the file."""
    kind = config.model_type
    if kind == "gpt2" and weight.ndim == 2 and name.startswith("blk."):
        return weight.T
    if kind == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    if kind == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    if kind == "gpt_neox" and ".attn_qkv." in name:
        each = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        return np.concatenate([each[:, part].reshape(-1, *weight.shape[1:]) for part in range(3)])
    return weight


def tensors_of(model):
    """Name in the file -> weight, of every tensor that the converter writes."""
    config = model.config
    kind = NAMES.get(config.model_type, config.model_type)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, found = gguf.get_tensor_name_map(architecture, config.num_hidden_layers), {}
    for name, value in model.state_dict().items():
        module, _, end = name.rpartition(".")
        if not (config.tie_word_embeddings and module == "lm_head"):
            inside = f"{names.get_name(module)}.{end}"
            found[inside] = np.ascontiguousarray(stored(inside, value.numpy(), config), dtype=np.float32)
    if config.model_type != "gpt2" and (config.rope_parameters or {}).get("rope_type") == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.numpy()
        width = config.hidden_size // config.num_attention_heads
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
        found["rope_freqs.weight"] = (plain / frequencies).astype(np.float32)
    return found


def byte_tokens(size=300):
    """A vocabulary of an end, a mark, the bytes, a few merges and the unused rest."""
    merges = ["h e", "l l", "Ġ t", "Ġt he"]
    tokens = ["<|endoftext|>", "<mark>", *gpt2_byte_symbols(), *(merge.replace(" ", "") for merge in merges)]
    unused = size - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in range(unused))],
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(tokens) - 2) + [5] * unused,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def write_file(path, architecture, entries, tensors, tokenizer=None, kind=gguf.GGMLQuantizationType.F32):
    """A GGUF file. entries: of the architecture. tensors: by name; matrices are stored as `kind`, or as bytes with their own."""
    writer = gguf.GGUFWriter(path, architecture)
    named = {f"{architecture}.{key}": value for key, value in entries.items()}
    for key, value in (named | (byte_tokens() if tokenizer is None else tokenizer)).items():
        ways = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        ways[type(value)](key, value)
    for name, value in tensors.items():
        value, own = (
            value if isinstance(value, tuple) else (value, kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32)
        )
        if value.dtype == np.float32 and own != gguf.GGMLQuantizationType.F32:
            value = gguf.quants.quantize(value, own)
        writer.add_tensor(name, value, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, **options):
    """The file of a model of transformers."""
    kind = NAMES.get(model.config.model_type, model.config.model_type)
    entries = entries_of(model.config) | options.pop("entries", {})
    tensors = tensors_of(model) | options.pop("tensors", {})
    return write_file(path, kind, entries, tensors, **options)
