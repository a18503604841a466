"""Activations that are cheaper to compute again in backward than to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

Chain = Callable[[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(cheap, x, layer) -> layer(cheap(x))."""


def plain(cheap: Callable[[Tensor], Tensor], x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """layer(cheap(x))."""
    return layer(cheap(x))


def recomputed(cheap: Callable[[Tensor], Tensor], x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """layer(cheap(x)), where `layer` keeps x for its backward pass in place of cheap(x), which is computed once more there.

    Loss and gradients are the same to the bit. cheap: deterministic, and such that its own backward keeps x anyway
    (a norm, GELU), so that nothing is kept instead. Compiled code chooses by itself what to compute again.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return layer(cheap(x))
    y, source = cheap(x), x.detach()
    place, size, origin = y.data_ptr(), y.numel(), y.grad_fn  # no closure may hold y itself

    def pack(kept: Tensor) -> Tensor | tuple[torch.dtype, torch.Size]:
        same = kept.numel() == size and kept.is_contiguous() and (kept.data_ptr() == place or _copies(kept, origin))
        return (kept.dtype, kept.shape) if same else kept

    def unpack(kept: Tensor | tuple[torch.dtype, torch.Size]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        dtype, shape = kept
        with torch.no_grad():
            return cheap(source).to(dtype).view(shape)

    with saved_tensors_hooks(pack, unpack):
        return layer(y)


def _copies(kept: Tensor, origin: Node | None) -> bool:
    """Whether `kept` is what `origin` made, but for its shape or type (autocast gives every product a copy of its own)."""
    node = kept.grad_fn
    while (
        node is not None
        and node is not origin
        and node.name() in ("ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0")
    ):
        node = node.next_functions[0][0]
    return origin is not None and node is origin
