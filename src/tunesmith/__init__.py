"""tunesmith: turn a small base model into a dialogue model, and measure how good it became.

>>> import tunesmith as ts
>>> model, tokenizer = ts.load("sample", device="cpu")
>>> answers = ts.generate(model, tokenizer, [[{"role": "user", "content": "What is love?"}]], max_new_tokens=8)

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.commands.training import dpo as dpo
    from tunesmith.commands.training import pretrain as pretrain
    from tunesmith.commands.training import sft as sft
    from tunesmith.commands.training import train_reward_model as train_reward_model
    from tunesmith.errors import Interrupted as Interrupted
    from tunesmith.errors import UserError as UserError
    from tunesmith.files.names import load as load
    from tunesmith.files.names import load_reward as load_reward
    from tunesmith.files.run import Run as Run
    from tunesmith.generation.engine import generate as generate
    from tunesmith.models.gpt2 import GPT as GPT
    from tunesmith.models.gpt2 import GPTConfig as GPTConfig
    from tunesmith.options.pretraining import PretrainConfig as PretrainConfig
    from tunesmith.options.training import DPOConfig as DPOConfig
    from tunesmith.options.training import RewardConfig as RewardConfig
    from tunesmith.options.training import SFTConfig as SFTConfig

__version__ = "0.1.0"

WINGS = ("options", "models", "data", "files", "generation", "train", "judge", "plan", "study", "commands")
"""The package's folders, lowest first. A module imports its own wing and those below, never one above; what lies directly
in the package is the ground, which all may use and which uses nothing of ours (tests/house/test_layers.py)."""

_HOME = {
    "DPOConfig": "options.training",
    "GPT": "models.gpt2",
    "GPTConfig": "models.gpt2",
    "Interrupted": "errors",
    "PretrainConfig": "options.pretraining",
    "RewardConfig": "options.training",
    "Run": "files.run",
    "SFTConfig": "options.training",
    "UserError": "errors",
    "generate": "generation.engine",  # no module of the name: importing it would hide the function
    "dpo": "commands.training",
    "load": "files.names",
    "load_reward": "files.names",
    "pretrain": "commands.training",
    "sft": "commands.training",
    "train_reward_model": "commands.training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tunesmith.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
