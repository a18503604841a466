"""Qwen2 and Qwen2.5: Llama's blocks, with biases where queries, keys and values are made and nowhere else.

Yang et al. 2024, arXiv 2407.10671 and 2412.15115.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tunesmith.models.family import Family
from tunesmith.models.llama import LLAMA, SETTINGS, LlamaConfig, read_shape, shape_to_hf
from tunesmith.models.published import refuse_windows


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Shape of a Qwen2; attention_bias (of the output projection) and mlp_bias are False."""

    title: ClassVar[str] = "Qwen2"

    vocab_size: int = 151_936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32_768

    @property
    def family(self) -> Family:
        """Qwen2's."""
        return QWEN2

    @property
    def key_bias(self) -> bool:
        """Queries, keys and values have biases."""
        return True


def _from_hf(hf: Mapping[str, Any]) -> Qwen2Config:
    refuse_windows(hf, Qwen2Config.title)
    return Qwen2Config(**read_shape(hf, Qwen2Config, SETTINGS))


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    title="Qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    from_hf=_from_hf,
    to_hf=lambda config: {**shape_to_hf(config, SETTINGS), "use_sliding_window": False},
    recognises=lambda hf: "Qwen2ForCausalLM" in (hf.get("architectures") or ()),
    sizes={
        "Qwen/Qwen2.5-0.5B": Qwen2Config(151936, 896, 4864, 24, 14, 2, rope_theta=1e6, tied_head=True),
        "Qwen/Qwen2.5-1.5B": Qwen2Config(151936, 1536, 8960, 28, 12, 2, None, 131072, rope_theta=1e6, tied_head=True),
    },
)
