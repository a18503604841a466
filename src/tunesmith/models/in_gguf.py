"""How GGUF files (llama.cpp's) say the shape of each architecture, and what their converter changed in its weights.

The facts are those of llama.cpp's convert_hf_to_gguf.py and of its gguf package. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HEAD, EMBEDDING, ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"
LONG_ROPE = "rope_factors_long.weight"
OTHER_ARITHMETIC = (  # entries that change what is computed; 0 and 1 stand for "not there"
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_LENGTH = 1.0, 4.0, 8192  # of Llama 3.1 to 3.3, the only ones that were published


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. values: its metadata. shapes: of its tensors by name, as torch has them.

    equal_head: whether a head that is stored equals the embedding. rope_factors: the content of rope_freqs.weight: by how
    much each rotary angle is slowed down; empty where there is none.
    """

    where: str
    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    equal_head: bool = False
    rope_factors: Sequence[float] = field(default=())

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def says(self, key: str, default: Any = None) -> Any:
        """An entry of the architecture's own."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """An entry that is a number. Raises: UserError where it is missing, or differs from block to block."""
        value = self.says(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"is {str(value)[:40]}, expected one number for all blocks"
            raise UserError(f"{self.where}: {self.architecture}.{key} {found}; tunesmith cannot read such a model")
        return value

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: none is stored, or (in files of GPT-2) the same once more."""
        return HEAD not in self.shapes or self.equal_head


@dataclass(frozen=True)
class InGGUF:
    """An architecture in GGUF files.

    family: its `model_type`. config: what a file says to a `config.json`. restored: (name in the file, its content in
    float32, that config.json) to the weight that was converted, a matrix as (out, in).
    """

    family: str
    config: Callable[[Header], dict[str, Any]]
    restored: Callable[[str, Tensor, Mapping[str, Any]], Tensor] = lambda name, weight, config: weight


def _decoder(h: Header) -> dict[str, Any]:
    """What llama and its descendants share."""
    heads, width = h.number("attention.head_count"), h.number("embedding_length")
    own = h.number("attention.key_length", width // heads)
    if h.number("attention.value_length", own) != own or (rotated := h.number("rope.dimension_count", own)) != own:
        raise UserError(
            f"{h.where}: heads with {own} numbers a key rotate {rotated} of them, and hold "
            f"{h.says('attention.value_length', own)} a value; tunesmith computes only heads of one width, rotated whole"
        )
    return {
        "hidden_size": width,
        "intermediate_size": h.number("feed_forward_length"),
        "num_hidden_layers": h.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": h.number("attention.head_count_kv", heads),
        "head_dim": own,
        "max_position_embeddings": h.number("context_length"),
        "rms_norm_eps": h.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": h.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(h, own),
        "tie_word_embeddings": h.tied,
    }


def _scaling(h: Header, width: int) -> dict[str, Any] | None:
    """`rope_scaling` of a config.json. width: numbers in a head. Raises: UserError for a kind that is not known here."""
    kind, base = h.says("rope.scaling.type", "none"), h.number("rope.freq_base", 10_000.0)
    factor = h.says("rope.scaling.factor", h.says("rope.scale_linear", 1.0))  # the second in old files, without a type
    if factor != 1.0 and kind in ("none", "linear") and not h.rope_factors:
        return {"rope_type": "linear", "factor": factor}
    if kind not in ("none", "linear") or LONG_ROPE in h.shapes:
        kind = kind if kind != "none" else "longrope"
        raise UserError(f"{h.where}: rope scaling {kind!r} is not supported; tunesmith computes linear and llama3")
    if not h.rope_factors:
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": round(max(h.rope_factors), 4),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": h.says("rope.scaling.original_context_length", LLAMA3_LENGTH),
    }
    known = llama3_factors(width, base, scaling)
    if len(known) != len(h.rope_factors) or any(
        not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(known, h.rope_factors, strict=True)
    ):
        raise UserError(
            f"{h.where}: the {len(h.rope_factors)} factors in {ROPE_FACTORS} (1 to {max(h.rope_factors):g}) are not those of "
            "a Llama 3; tunesmith computes linear and llama3 rope scaling"
        )
    return scaling


def llama3_factors(width: int, base: float, scaling: Mapping[str, Any]) -> list[float]:
    """By how much Llama 3 slows each rotary angle down, fastest first: what a file stores in place of `scaling`.

    >>> scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    >>> [round(factor, 2) for factor in llama3_factors(8, 500_000.0, scaling)]
    [1.0, 1.0, 2.69, 8.0]
    """
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    factors = []
    for i in range(0, width, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * base ** (i / width))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)  # 0: slow, scaled whole; 1: fast, left alone
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _llama(h: Header) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return {**_decoder(h), **{key: name in h.shapes for key, name in biases.items()}, "hidden_act": "silu"}


def _in_halves(name: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """llama.cpp turns neighbouring numbers of a head, transformers those of its two halves: rows of q and k are reordered."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return weight
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _qwen2(h: Header) -> dict[str, Any]:
    return {**_decoder(h), "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(h: Header) -> dict[str, Any]:
    return {**_qwen2(h), "attention_bias": "blk.0.attn_q.bias" in h.shapes}


def _gemma3(h: Header) -> dict[str, Any]:
    config, blocks = _decoder(h), h.number("block_count")
    slides = h.says("attention.sliding_window_pattern", 6)  # one full block in so many, or a value for each
    slides = slides if isinstance(slides, list) else [bool((i + 1) % slides) for i in range(blocks)]
    # not stored; llama.cpp too knows the largest model, whose scale is not its heads' width, by its 62 blocks
    scale = config["hidden_size"] // config["num_attention_heads"] if blocks == 62 else config["head_dim"]
    return {
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": h.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides_there else "full_attention" for slides_there in slides],
        "rope_theta": h.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": h.number("rope.freq_base_swa", 10_000.0),
    }


def _norm_less_one(name: str, weight: Tensor, _config: Mapping[str, Any]) -> Tensor:
    """Gemma multiplies by 1 + w, llama.cpp by w: a file holds 1 + w."""
    return weight - 1 if name.endswith("norm.weight") else weight


def _gpt2(h: Header) -> dict[str, Any]:
    return {
        "n_layer": h.number("block_count"),
        "n_head": h.number("attention.head_count"),
        "n_embd": h.number("embedding_length"),
        "n_inner": h.number("feed_forward_length"),
        "n_positions": h.number("context_length"),
        "layer_norm_epsilon": h.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": h.tied,
    }


def _gpt_neox(h: Header) -> dict[str, Any]:
    heads, width = h.number("attention.head_count"), h.number("embedding_length")
    return {
        "hidden_size": width,
        "intermediate_size": h.number("feed_forward_length"),
        "num_hidden_layers": h.number("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": h.number("context_length"),
        "layer_norm_eps": h.number("attention.layer_norm_epsilon"),
        "rotary_pct": h.number("rope.dimension_count", width // heads) / (width // heads),
        "rotary_emb_base": h.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(h, width // heads),
        "use_parallel_residual": bool(h.says("use_parallel_residual", True)),
        "hidden_act": "gelu",
        "tie_word_embeddings": h.tied,
    }


def _by_heads(name: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """GPT-NeoX keeps q, k and v of a head together, llama.cpp those of all heads."""
    if ".attn_qkv." not in name:
        return weight
    of_all = weight.reshape(3, config["num_attention_heads"], -1, *weight.shape[1:])
    return of_all.transpose(0, 1).reshape(weight.shape)


ARCHITECTURES: Mapping[str, InGGUF] = {
    "llama": InGGUF("llama", _llama, _in_halves),
    "qwen2": InGGUF("qwen2", _qwen2),
    "qwen3": InGGUF("qwen3", _qwen3),
    "gemma3": InGGUF("gemma3_text", _gemma3, _norm_less_one),
    "gpt2": InGGUF("gpt2", _gpt2),
    "gptneox": InGGUF("gpt_neox", _gpt_neox, _by_heads),
}
"""`general.architecture` of a file -> what it is here."""


def config_of(header: Header, known: Sequence[str]) -> dict[str, Any]:
    """The `config.json` of the model in a file, of one of the `known` families.

    Raises: UserError for a different one, or if the file asks for arithmetic that is not computed here.
    """
    stored = ARCHITECTURES.get(header.architecture)
    if stored is None or stored.family not in known:
        there = ", ".join(name for name, other in ARCHITECTURES.items() if other.family in known)
        raise UserError(f"{header.where}: GGUF architecture {header.architecture!r}; tunesmith supports {there}")
    if odd := [key for key in OTHER_ARITHMETIC if header.says(key, 0) not in (0, 1)]:
        raise UserError(f"{header.where} asks for {', '.join(odd)}, which tunesmith does not compute")
    rows = header.shapes.get(EMBEDDING)
    if not rows:
        raise UserError(f"{header.where} holds no {EMBEDDING}: it is no language model, or only a part of one")
    return {"model_type": stored.family, **stored.config(header), "vocab_size": rows[0]}
