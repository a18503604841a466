"""Points in a device's work, and the time between them, for steps that the host reads later than they are over.

When the host reads a step says little of how long it took: of two steps that were launched one behind the other, both may
be over when the first is read.
"""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The moment at which the device finishes all work given to it so far. On a GPU this does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.current_stream(device).record_event(event)
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one of the same device; waits until the device has reached it."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000  # torch counts milliseconds
