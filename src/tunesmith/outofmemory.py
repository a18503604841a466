"""What running out of memory looks like on each device, and in which micro-batch of a step it happened."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

# torch has a class for its CUDA allocator only; the rest are RuntimeErrors, told by their text. oneDNN, which multiplies
# matrices on a CPU, says no more than that it could not make a primitive when there is no room for its code or scratch.
_TEXTS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|could not (create|execute) a (primitive|memory)"
    r"|MPS backend out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


class OutOfMemory(RuntimeError):
    """Memory ended in a micro-batch of a step, before any weight moved. Its text is that of the allocator."""

    def __init__(self, micro_batch: int, text: str) -> None:
        super().__init__(text)
        self.micro_batch = micro_batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: torch's, of a CUDA card, MPS or the CPU, or Python's own."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_TEXTS.search(str(error)))


@contextlib.contextmanager
def in_micro_batch(number: int) -> Iterator[None]:
    """Inside, a failed allocation becomes an OutOfMemory that knows the micro-batch."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(number, str(error)) from None
