"""Every method by its command. A new one is a file beside this one, and its name here."""

from __future__ import annotations

from typing import Any

from tunesmith.train.methods.dpo import DPO
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.pretrain import PRETRAIN
from tunesmith.train.methods.reward import REWARD
from tunesmith.train.methods.sft import SFT

METHODS = {method.command: method for method in (PRETRAIN, SFT, REWARD, DPO)}


def method_of(config: Any) -> Method:
    """The method whose options these are, or those that they add to."""
    by_config = {method.config: method for method in METHODS.values()}
    return next(by_config[kind] for kind in type(config).__mro__ if kind in by_config)
