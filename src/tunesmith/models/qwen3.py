"""Qwen3, dense: Llama's blocks with a norm over every head's query and key, and a head width of its own.

Yang et al. 2025, arXiv 2505.09388; norms on queries and keys: Dehghani et al. 2023, arXiv 2302.05442, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache
from tunesmith.models.family import Family, Kept
from tunesmith.models.llama import BIASES, LLAMA, SETTINGS, Attention, Llama, LlamaConfig, kept, read_shape, shape_to_hf
from tunesmith.models.published import refuse_windows
from tunesmith.models.rms_norm import RMSNorm


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """Shape of a Qwen3; mlp_bias is False."""

    title: ClassVar[str] = "Qwen3"

    vocab_size: int = 151_936
    intermediate_size: int = 22016
    head_dim: int | None = 128
    max_position_embeddings: int = 32_768

    @property
    def family(self) -> Family:
        """Qwen3's."""
        return QWEN3


class NormedAttention(Attention):
    """Llama's attention with queries and keys normed before they turn."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_width, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_width, config.rms_norm_eps)

    def mix(
        self, heads: tuple[Tensor, ...], turn: tuple[Tensor, Tensor], documents: Documents | None, cache: Cache | None
    ) -> Tensor:
        """As Llama's."""
        q, k, v = heads
        return super().mix((self.q_norm(q), self.k_norm(k), v), turn, documents, cache)


class Qwen3(Llama):
    """Token ids to hidden states; `lm_head` turns hidden states into logits."""

    attention = NormedAttention


def _kept(config: Qwen3Config) -> tuple[Kept, ...]:
    heads = config.heads + config.key_heads
    norms = Kept(exact=4 * heads * (config.head_width + 1))  # their inputs in float32, and 1 / rms of each head
    first, read, *rest = kept(config)
    return (first, read, norms, *rest)


def _from_hf(hf: Mapping[str, Any]) -> Qwen3Config:
    refuse_windows(hf, Qwen3Config.title)
    return Qwen3Config(**read_shape(hf, Qwen3Config, SETTINGS | {"attention_bias": BIASES["attention_bias"]}))


def _to_hf(config: Qwen3Config) -> dict[str, Any]:
    return {**shape_to_hf(config, SETTINGS), "attention_bias": config.attention_bias, "use_sliding_window": False}


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="Qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    build=Qwen3,
    from_hf=_from_hf,
    to_hf=_to_hf,
    recognises=lambda hf: "Qwen3ForCausalLM" in (hf.get("architectures") or ()),
    vectors=lambda config: (config.width, config.width, config.head_width, config.head_width),
    kept=_kept,
    sizes={
        "Qwen/Qwen3-0.6B": Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128, 40960, rope_theta=1e6, tied_head=True),
        "Qwen/Qwen3-1.7B": Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128, 40960, rope_theta=1e6, tied_head=True),
    },
)
