"""The options of any training: some of them changed, and what is certain once all are decided. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig

if TYPE_CHECKING:
    from tunesmith.device import Precision

TuningConfig = SFTConfig | DPOConfig | RewardConfig
AnyConfig = TuningConfig | PretrainConfig
C = TypeVar("C")


def with_options(config: C, changes: Mapping[str, Any]) -> C:
    """The configuration with some options set, by their dotted names."""
    whole: Any = config
    for name, value in changes.items():
        group, key = name.split(".")
        whole = dataclasses.replace(whole, **{group: dataclasses.replace(getattr(whole, group), **{key: value})})
    changed: C = whole
    return changed


def precision_of(config: AnyConfig) -> Precision:
    """The arithmetic of a resolved configuration."""
    assert config.train.precision != "auto"
    return config.train.precision


def iters_of(config: AnyConfig) -> int:
    """Batches of each split in an estimate of a resolved configuration."""
    assert config.eval.iters is not None
    return config.eval.iters
