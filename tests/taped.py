"""What a CUDA graph does, on a CPU: operations recorded with their tensors and host numbers, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(held: Any) -> dict[int, Tensor]:
    """The tensors in any structure, one for each storage."""
    return {x.untyped_storage()._cdata: x for x in tree_leaves(held) if isinstance(x, Tensor)}


class Tape(TorchDispatchMode):
    """Records what is done inside, below autograd. As with a CUDA graph it is not done: memory from outside and the random
    state are put back; the host may not wait for a number; and a replay neither runs Python nor sees a host number change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # they keep every tensor, and so every address
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                for key, tensor in storages(value).items():
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before.setdefault(key, (whole, whole.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """As `capture.capture`."""
        state = torch.get_rng_state()
        try:
            with self:
                seen = work()
        finally:
            for whole, kept in self.before.values():
                whole.copy_(kept)
            torch.set_rng_state(state)

        def replay() -> Any:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in self.calls:
                    given = storages((args, kwargs))
                    found = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                        if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                            old.detach().copy_(new)
            return seen

        return replay
