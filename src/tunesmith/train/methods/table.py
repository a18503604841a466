"""Every method by its command. A new one is a file beside this one, named after its command, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.train.methods.method import Method

ABOUT = {
    "pretrain": "a new model, and its tokenizer, from plain text",
    "sft": "supervised fine-tuning on dialogues: full or LoRA",
    "reward": "train a reward model on preference pairs (Bradley-Terry)",
    "dpo": "direct preference optimisation: full or LoRA",
}
"""Command -> what `tunesmith --help` says of it."""


class _Methods(Mapping[str, "Method"]):
    # Read when asked for: the dataclasses of all their options take as long to make as all else that `tunesmith --help` does.
    def __getitem__(self, command: str) -> Method:
        if command not in ABOUT:
            raise KeyError(command)
        method: Method = importlib.import_module(f"tunesmith.train.methods.{command}").METHOD
        return method

    def __contains__(self, command: object) -> bool:
        return command in ABOUT

    def __iter__(self) -> Iterator[str]:
        return iter(ABOUT)

    def __len__(self) -> int:
        return len(ABOUT)


METHODS = _Methods()
"""Command -> the record of its file."""


def method_of(config: Any) -> Method:
    """The method whose options these are, or those that they add to."""
    by_config = {method.config: method for method in METHODS.values()}
    return next(by_config[kind] for kind in type(config).__mro__ if kind in by_config)
