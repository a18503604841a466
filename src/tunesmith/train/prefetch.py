"""The next micro-batches, made and copied to the device while the present one is learned from."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
AHEAD = 2  # micro-batches made ahead
AHEAD_ON = ("cuda",)  # on a CPU the cores are busy with the step: the thread would only take its turn


class Prefetch(Generic[B]):
    """`make`, asked for consecutive numbers, with the next answers made ahead in one thread.

    A number gives what `make` gives for it, whatever was asked before: at a jump the work ahead is thrown away. An
    error of `make` comes out where its number is asked for, with the thread's traceback. On a CUDA device the thread
    has a stream of its own, so that its copies run beside the computation; whoever asks gets tensors ready for the
    current stream.
    """

    def __init__(self, make: Callable[[int], B], device: torch.device) -> None:
        self._make = make
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "tunesmith-prefetch")
        self._coming: deque[tuple[int, Future[tuple[B, Any]]]] = deque()

    def __call__(self, number: int) -> B:
        """Batch `number`, on the device."""
        if not self._coming or self._coming[0][0] != number:
            for _, future in self._coming:
                future.cancel()
            self._coming.clear()
            self._order(number)
        _, future = self._coming.popleft()
        for ahead in range(number + 1 + len(self._coming), number + 1 + AHEAD):
            self._order(ahead)
        batch, copied = future.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(copied)
            for tensor in tensors_of(batch):
                tensor.record_stream(current)  # else its memory could be given away while the step still reads it
        return batch

    def _order(self, number: int) -> None:
        self._coming.append((number, self._thread.submit(self._work, number)))

    def _work(self, number: int) -> tuple[B, Any]:
        if self._stream is None:
            return self._make(number), None
        with torch.cuda.stream(self._stream):
            batch = self._make(number)
            return batch, self._stream.record_event()

    def close(self) -> None:
        """End the thread after the batch that it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def made_ahead(make: Callable[[int], B], device: torch.device) -> Iterator[Callable[[int], B]]:
    """`make` with its results made ahead where that pays (AHEAD_ON); as it is elsewhere. The thread ends with the block."""
    if device.type not in AHEAD_ON:
        yield make
        return
    ahead = Prefetch(make, device)
    try:
        yield ahead
    finally:
        ahead.close()


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch: its own, and those of the objects in it."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from tensors_of(value)
