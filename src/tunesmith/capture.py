"""Work recorded as a CUDA graph: steps of training (`train.step_graph`) and of decoding (`generation.token_graph`)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def capture(work: Callable[[], T], device: torch.device, pool: Any, *, rehearse: bool) -> Callable[[], T]:
    """Record `work`, which is not done by that; returns what does it again on the same memory, and gives what it gave.

    Args:
        pool: of the memory that the recording takes, from `torch.cuda.graph_pool_handle`. Of recordings with one pool only the
            latest may be replayed.
        rehearse: do the work once before. Libraries choose kernels and make their workspaces then, which they cannot while
            recording; needless where it has been done often.
    Raises: whatever stood against it; the stream, the allocator and the random generator are as before.
    """
    graph, current, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(current)
    with torch.cuda.device(device), torch.cuda.stream(stream):  # torch does not go back where a recording breaks off
        try:
            if rehearse:
                work()
            given = _recorded(work, graph, pool, stream)
        finally:
            current.wait_stream(stream)

    def replay() -> T:
        graph.replay()
        return given

    return replay


def reason_of(error: BaseException) -> str:
    """Why a recording broke off, in one line. What ends a recording complains once more: the first complaint counts."""
    first = error.__context__ or error
    return (str(first).strip().splitlines() or [type(first).__name__])[0]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where recordings are made, always: libraries keep workspaces of megabytes for every stream that they have met."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _recorded(work: Callable[[], T], graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> T:
    try:
        with _recording(graph, pool, stream):
            return work()
    except BaseException:
        _leave(graph, pool, stream)
        raise


def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.graph:
    # other threads may allocate meanwhile: batches are made ahead (prefetch.py)
    return torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")


def _leave(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Take allocator and random generator out of a recording that broke off.

    Where CUDA itself refused to go on, torch ends in the middle of its own way out: its allocator would go on recording,
    and neither free this memory nor any that two streams have used; and in torch 2.11 its generator would take itself to
    be recorded until a recording ends well, and refuse to draw. So one that holds nothing is made to its end.
    """
    try:
        graph.pool()  # whole: it gives back its memory by itself
    except RuntimeError:
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks that it is empty
            with _recording(torch.cuda.CUDAGraph(), None, stream):
                pass
