"""Evaluation mode as a context that restores what it found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; training or evaluation mode as it was afterwards."""
    was_training = model.training
    if was_training:  # walking through all modules twice a generated token would be felt
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()
