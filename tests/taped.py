"""What a CUDA graph does, on a CPU: operations recorded with their tensors and host numbers, and done again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith import capture


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
        self.refused = False  # CUDA would not go on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.refused = True
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

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Work inside is noted."""
        state = torch.get_rng_state()
        try:
            with self:
                yield
        finally:
            for whole, kept in self.before.values():
                whole.copy_(kept)
            torch.set_rng_state(state)

    def replay(self) -> None:
        """Do it."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                given = storages((args, kwargs))
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                        old.detach().copy_(new)

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """As `capture.capture`."""
        with self.recording():
            seen = work()
        return lambda: (self.replay(), seen)[1]


class Card(TorchDispatchMode):
    """Inside, `torch.cuda` is a card on a CPU as far as `capture.capture` asks it: its graphs are tapes.

    Its generator is that of torch 2.11: one flag tells that it is recorded, and only a recording that ends well takes it
    back. Meanwhile it neither draws nor lets a graph be replayed.
    """

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.taking_part = False  # the generator's flag
        self.tape: Tape | None = None  # of the recording that is going on
        own = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "CUDAGraph": lambda: SimpleNamespace(tape=None, pool=None, replay=None), "graph": self.graph,
            "Stream": lambda device: own, "current_stream": lambda device: own, "current_device": lambda: 0,
            "device": lambda device: contextlib.nullcontext(), "stream": lambda stream: contextlib.nullcontext(),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda device, pool: None, raising=False)
        monkeypatch.setattr(capture, "_stream", lambda device: own)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags and self.taking_part and self.tape is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As `torch.cuda.graph`."""
        graph.pool = self.no_pool
        self.taking_part, self.tape = True, Tape()
        tape = self.tape
        try:
            with tape.recording():
                yield
        finally:
            self.tape = None
            if tape.refused:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.taking_part = False
            graph.pool, graph.replay = lambda: pool, lambda: self.replay(tape)

    def no_pool(self) -> None:
        raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def replay(self, tape: Tape) -> None:
        if self.taking_part:
            raise RuntimeError("Cannot prepare for replay during capturing stage.")
        tape.replay()

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """As `train.step_graph.recorder` and `generation.token_graph.cuda_graphs`."""
        return capture.capture(work, torch.device("cpu"), (0, 7), rehearse=False)
