"""What a computation makes and keeps: its largest tensor, and the bytes saved for backward."""

import contextlib
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.models import recompute


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def largest(loss, *inputs) -> int:
    with LargestTensor() as seen:
        loss(*inputs).backward()
    return seen.numbers


def kept_by_autograd(model, tokens, documents, rows=None, half=False):
    """Bytes of every float tensor saved for backward, each storage once, without the weights and what is computed again."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    @contextlib.contextmanager
    def keep_too(pack, unpack):  # the hooks of `recomputed`, of which only the innermost are asked
        with saved_tensors_hooks(lambda x: keep(y) if isinstance(y := pack(x), torch.Tensor) else y, unpack):
            yield

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        mock.patch.object(recompute, "saved_tensors_hooks", keep_too),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        hidden = model(tokens, documents, rows=rows)
    head = hidden.numel() * 4  # the gradient for the hidden states that the head's loss makes and keeps
    return sum(s.nbytes() for s in kept.values()) + head
