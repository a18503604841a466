"""Activations that are cheaper to compute again in backward than to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

Out = TypeVar("Out")
Tensors = Tensor | tuple[Tensor, ...]


class Chain(Protocol):
    """(cheap, x, layer) -> layer(cheap(x)). x may be several tensors, and `layer` may stand for several layers."""

    def __call__(self, cheap: Callable[..., Tensor], x: Tensors, layer: Callable[[Tensor], Out], /) -> Out: ...


def plain(cheap: Callable[..., Tensor], x: Tensors, layer: Callable[[Tensor], Out]) -> Out:
    """layer(cheap(x))."""
    return layer(cheap(*x) if isinstance(x, tuple) else cheap(x))


def recomputed(cheap: Callable[..., Tensor], x: Tensors, layer: Callable[[Tensor], Out]) -> Out:
    """layer(cheap(x)), where `layer` keeps x for its backward pass in place of cheap(x), which is computed once more there.

    Loss and gradients are the same to the bit. cheap: deterministic, and such that its own backward keeps x anyway
    (a norm, GELU), so that nothing is kept instead. Compiled code chooses by itself what to compute again.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return plain(cheap, x, layer)
    inputs = x if isinstance(x, tuple) else (x,)
    y, sources = cheap(*inputs), tuple(z.detach() for z in inputs)
    place, size, origin = y.data_ptr(), y.numel(), y.grad_fn  # no closure may hold y itself
    left, again = 0, list[Tensor]()  # places that still wait for it in backward; it, from the first of them to the last

    def pack(kept: Tensor) -> Tensor | tuple[torch.dtype, torch.Size]:
        nonlocal left
        same = kept.numel() == size and kept.is_contiguous() and (kept.data_ptr() == place or _copies(kept, origin))
        left += same
        return (kept.dtype, kept.shape) if same else kept

    def unpack(kept: Tensor | tuple[torch.dtype, torch.Size]) -> Tensor:
        nonlocal left
        if isinstance(kept, Tensor):
            return kept
        dtype, shape = kept
        left -= 1
        if not again:
            with torch.no_grad():
                again.append(cheap(*sources))
        return (again[0] if left > 0 else again.pop()).to(dtype).view(shape)

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
