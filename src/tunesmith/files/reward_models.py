"""Reward models on disk: transformers' `...ForSequenceClassification` with one label, which computes the same scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.weights import (
    check_size,
    config_to_hf,
    empty_model,
    from_hf_state_dict,
    stored_weights,
    to_hf_state_dict,
    write_safetensors,
)
from tunesmith.jsontext import read_json, write_json
from tunesmith.models.family import HEAD
from tunesmith.models.known import config_from_hf
from tunesmith.models.reward_head import SCORE, RewardModel


def is_reward_model(directory: Path) -> bool:
    """Whether a model directory holds a sequence classifier."""
    named = read_json(directory / "config.json").get("architectures")
    return isinstance(named, list) and any("SequenceClassification" in str(name) for name in named)


def save_reward_model(model: RewardModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Write `model` and its tokenizer as transformers' sequence classifier of that architecture."""
    directory.mkdir(parents=True, exist_ok=True)
    trunk = model.trunk
    state = to_hf_state_dict(trunk) | {SCORE: model.score.weight}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_safetensors(state, directory / "model.safetensors", {"format": "pt"})
    config = config_to_hf(trunk, tokenizer.end_of_text) | {
        "architectures": [trunk.family.classifier],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        # transformers scores the last token that is no padding
        "pad_token_id": tokenizer.pad(trunk.config.vocab_size),
        "dtype": str(model.score.weight.dtype).removeprefix("torch."),
    }
    write_json(directory / "config.json", config)
    tokenizer.save(directory, trunk.longest, trunk.config.vocab_size)


def load_reward_model(directory: Path) -> RewardModel:
    """The reward model in a directory, on the CPU in float32, in evaluation mode.

    Raises: UserError if the directory holds no model with one score, or is broken.
    """
    hf = read_json(directory / "config.json")
    named = hf.get("id2label")
    labels = len(named) if named and isinstance(named, dict) else 1
    if labels != 1:
        raise UserError(f"{directory} gives {labels} numbers per text; a reward model gives one")
    config = config_from_hf(hf)
    check_size(config, directory)
    model = RewardModel(empty_model(config))
    load_reward_weights(model, directory)
    return model.eval()


def load_reward_weights(model: RewardModel, directory: Path) -> None:
    """Copy the weights in a directory into `model`. Raises: UserError naming what is missing or does not fit."""
    score: list[Tensor] = []
    keys = model.trunk.family.keys

    def trunk() -> Iterator[tuple[str, Tensor]]:
        for name, value in stored_weights(directory):
            if name == SCORE:
                score.append(value)
            elif keys.ours(name) != f"{HEAD}.weight":
                yield name, value

    from_hf_state_dict(model.trunk, trunk(), str(directory))
    set_score(model, score[0] if score else None, directory)


def set_score(model: RewardModel, weight: Tensor | None, where: Path) -> None:
    """Copy a score layer's weight into `model`. Raises: UserError if it is missing or has another shape."""
    if weight is None or weight.shape != model.score.weight.shape:
        stored = "no score.weight" if weight is None else f"a score.weight of the shape {tuple(weight.shape)}"
        expected = tuple(model.score.weight.shape)
        raise UserError(f"{where} holds {stored}, expected {expected}: a reward model gives one number a text")
    with torch.no_grad():
        model.score.weight.copy_(weight)
