"""What the methods that learn from preference pairs share. No torch at import, as in `method`."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.options.training import PairDataOptions

OBSERVED = ("accuracy", "margin", "chosen_reward", "rejected_reward")
"""What their summed losses give beside the loss. accuracy: share of pairs with chosen above rejected."""


def check_pair_options(data: PairDataOptions) -> list[str]:
    """What is wrong with the data options of a command that trains on pairs."""
    problems = []
    if data.batching == "windows":
        problems.append(
            "--data.batching windows cuts through dialogues and does not support pairs; use packed or padded"
        )
    if data.truncation == "split":
        problems.append("--data.truncation split is for plain texts; for pairs use keep_end, keep_start or drop")
    return problems


def pair_metrics(on_train: Mapping[str, float], on_validation: Mapping[str, float]) -> dict[str, float]:
    """An estimate's metrics by the names of the log; `sft_loss` is of the validation pairs alone and keeps its name."""
    named = {name if name == "sft_loss" else f"validation_{name}": value for name, value in on_validation.items()}
    return {"train_loss": on_train["loss"], "train_accuracy": on_train["accuracy"], **named}
