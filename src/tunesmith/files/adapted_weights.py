"""What an adapter of PEFT's may change beside its low-rank layers: weights saved whole, and the embedding's rows.

Here all of it is put into the base's own weights when the adapter is loaded; the low-rank layers stay beside theirs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.family import HEAD
from tunesmith.models.known import FAMILIES
from tunesmith.models.model import Model


@dataclass(frozen=True)
class AdaptedWeights:
    """By transformers' names.

    whole: weight -> what replaces it. low_rank: an embedding -> (A, B), of which scaling[embedding] B A is added,
    transposed. rows: an embedding or a head -> what replaces some of its rows, tokens[module] says which.
    A head that is tied to the embedding stays what it was in the first two cases and changes with it in the third: so PEFT
    computes it on a GPT-2, with `ensure_weight_tying` too.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    low_rank: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scaling: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.low_rank or self.rows)


def take(name: str, value: Tensor, config: Mapping[str, Any], adapted: AdaptedWeights) -> bool:
    """Put a tensor of an adapter into `adapted`, if it is one of those; name: without PEFT's prefix. Says whether it was."""
    if match := re.fullmatch(r"(.+)\.lora_embedding_([AB])", name):
        adapted.low_rank.setdefault(match[1], {})[match[2]] = value
        return True
    if match := re.fullmatch(
        r"(.+)\.token_adapter\.trainable_tokens_delta", name
    ):  # not a difference: the rows themselves
        adapted.rows[match[1]] = value
        adapted.tokens[match[1]] = _tokens_of(match[1], config.get("trainable_token_indices"))
        return True
    plain = re.sub(r"\.modules_to_save(\.\w+)?(?=\.)", "", name)
    module = plain.rpartition(".")[0]
    saved = any(f".{module}.".find(f".{asked}.") >= 0 for asked in config.get("modules_to_save") or [])
    if saved or plain in _ends():  # these PEFT adds by itself when the vocabulary has grown
        adapted.whole[plain] = value
        return True
    return False


def _ends() -> set[str]:
    """What the embedding and the head are called, in any family, in files and in transformers."""
    every = [family.keys for family in FAMILIES.values()]
    called = {f(name) for keys in every for name in (keys.embedding, HEAD) for f in (keys.theirs, keys.module)}
    return {f"{name}.weight" for name in called}


def _tokens_of(module: str, indices: Any) -> list[int]:
    """The token ids of `trainable_token_indices`: a list for the embedding, or lists by the module's name."""
    listed = indices
    if isinstance(indices, dict):
        listed = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    return listed if isinstance(listed, list) else []


def apply(model: Model, adapted: AdaptedWeights, where: str) -> None:
    """Put an adapter's weights into its base. A head that was tied and no longer equals the embedding gets its own weight.

    Raises: UserError naming what does not fit.
    """
    if not adapted:
        return
    keys = model.family.keys
    ends = {keys.embedding, HEAD}
    replaced = ends & {keys.ours(name).removesuffix(".weight") for name in adapted.whole}
    low_rank = {keys.ours(module) for module in adapted.low_rank}
    if model.config.tied_head and (replaced or keys.embedding in low_rank):
        model.lm_head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        model.config = dataclasses.replace(model.config, tied_head=False)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapted.whole.items():
            target = weights.get(keys.ours(name))
            value = keys.turned(name, value)
            if target is None or target.shape != value.shape:
                raise UserError(
                    _misfit(where, name, tuple(value.shape), None if target is None else tuple(target.shape))
                )
            target.copy_(value)
        for module, halves in adapted.low_rank.items():
            target = weights.get(f"{keys.ours(module)}.weight")
            if target is None or set(halves) != {"A", "B"}:
                raise UserError(_misfit(where, module, "a low-rank change", None if target is None else "half of it"))
            if (halves["A"].shape[1], halves["B"].shape[0]) != target.shape:
                stored = (halves["A"].shape[1], halves["B"].shape[0])
                raise UserError(_misfit(where, module, stored, tuple(target.shape)))
            change = adapted.scaling[module] * (halves["B"].double() @ halves["A"].double())
            target.copy_((target.double() + change.t()).to(target.dtype))
        for module, rows in adapted.rows.items():
            target, tokens = weights.get(f"{keys.ours(module)}.weight"), adapted.tokens[module]
            fits = target is not None and rows.shape == (len(tokens), target.shape[1])
            if target is None or not fits or not all(0 <= token < len(target) for token in tokens):
                raise UserError(_misfit(where, f"{module}'s rows {tokens}", tuple(rows.shape), None))
            target[torch.tensor(tokens)] = rows.to(target.dtype)


def _misfit(where: str, what: str, stored: object, asked: object) -> str:
    return (
        f"{where} does not fit this base: it holds {stored} for {what}, but the model has {asked or 'no such weight'}"
    )
