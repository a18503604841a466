"""Mistral, of the versions whose attention has no window: Llama's blocks under a name of their own.

Jiang et al. 2023, arXiv 2310.06825. Mistral 7B has a window of 4,096 tokens in version 0.1 and none since 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tunesmith.errors import UserError
from tunesmith.models.family import Family
from tunesmith.models.llama import LLAMA, SETTINGS, LlamaConfig, read_shape, shape_to_hf

WINDOW = 4096  # what transformers takes where config.json leaves it out


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Shape of a Mistral; attention_bias and mlp_bias are False."""

    title: ClassVar[str] = "Mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131_072

    @property
    def family(self) -> Family:
        """Mistral's."""
        return MISTRAL


def _from_hf(hf: Mapping[str, Any]) -> MistralConfig:
    config = MistralConfig(**read_shape(hf, MistralConfig, SETTINGS))
    window = hf.get("sliding_window", WINDOW)
    if window is not None and not (isinstance(window, int) and window >= config.longest):
        raise UserError(
            f"config.json asks for sliding_window = {window!r} in texts of up to {config.longest:,} tokens, which tunesmith's "
            "Mistral does not support; a window of at least max_position_embeddings, or null, is none"
        )
    return config


MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="Mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    from_hf=_from_hf,
    to_hf=lambda config: {**shape_to_hf(config, SETTINGS), "sliding_window": None},
    recognises=lambda hf: "MistralForCausalLM" in (hf.get("architectures") or ()),
    sizes={},
)
