"""The architectures that there are, and the models known by name. A new one is a line here and a file beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.errors import UserError
from tunesmith.models.family import Config, Family
from tunesmith.models.gemma3 import GEMMA3
from tunesmith.models.gpt2 import GPT2
from tunesmith.models.gpt_neox import GPT_NEOX
from tunesmith.models.llama import LLAMA
from tunesmith.models.mistral import MISTRAL
from tunesmith.models.published import refuse_quantised, refuse_unless
from tunesmith.models.qwen2 import QWEN2
from tunesmith.models.qwen3 import QWEN3

_ALL = (
    GPT2,
    GPT_NEOX,
    GEMMA3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""Hugging Face's `model_type` -> the family."""

SIZES: Mapping[str, Config] = {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}
"""Name on the hub -> shape."""


def titles() -> str:
    """The names of all architectures, for messages."""
    *most, last = (family.title for family in FAMILIES.values())
    return f"{', '.join(most)} or {last}"


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The shape in a Hugging Face `config.json`, read as transformers reads it: other names and missing ones included.

    Raises: UserError if it is of no family that is known here, uses a variant that is not computed here, or holds an invalid
        size (each is named).
    """
    kind = hf.get("model_type")
    if kind is None:
        family = next((family for family in FAMILIES.values() if family.recognises(hf)), None)
    else:
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"config.json says model_type {kind!r}; tunesmith supports {', '.join(FAMILIES)} models")
    refuse_quantised(hf)
    refuse_unless(hf, {"is_causal": (True, None)}, family.title)
    return family.from_hf(hf)
