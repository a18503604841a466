"""When memory ends: the micro-batch is split, the work done again, and the size remembered.

Losses are sums that `step.optimizer_step` divides by the count of the whole step, so a step in smaller micro-batches is
the same step up to rounding (of bfloat16 where the weights are: gradients are added up in the weights' type). With dropout
it is a step with other masks: they are drawn for a micro-batch's shape.

What is not done again: the update itself, that is clipping and the optimizer's step. It needs the same memory however the
micro-batches are cut (its state is made before the first step), and when it fails some weights may have moved. The run
then ends; no checkpoint is written of such weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.optim import Optimizer

from tunesmith.data.batch import Batch
from tunesmith.device import return_freed_memory
from tunesmith.errors import UserError
from tunesmith.outofmemory import OutOfMemory, is_out_of_memory
from tunesmith.progress import STOP
from tunesmith.train.optim import OneByOne

T = TypeVar("T")


@dataclass
class Halving:
    """How large a micro-batch may be in a training, and what the user is told when one was too large.

    setup: model, precision and device in words. smaller: the options by which one document takes less memory.
    batch_size: as the option. limit: size of the largest micro-batch that is tried; None: any.
    repeatable: False where a step that failed may have moved weights (the optimizer steps inside backward).
    """

    # Not frozen: a limit found in one step holds for all later ones, and for the run that resumes this one.
    setup: str
    smaller: str
    batch_size: int
    repeatable: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Halved:
    """What was found and done. failed: size of the micro-batch that did not fit; limit: of the largest tried from now on."""

    failed: int
    limit: int
    line: str


def split_to(batches: Iterable[Batch], limit: int | None) -> list[Batch]:
    """The same in pieces of at most `limit` tokens, or of one document where that is longer; order kept."""
    pieces: list[Batch] = []
    for batch in batches:
        halves = None if limit is None or batch.size <= limit else batch.halves()
        pieces += [batch] if halves is None else split_to(halves, limit)
    return pieces


def step_in_memory(
    micro_batches: Sequence[Batch],
    step: Callable[[Sequence[Batch]], T],
    optimizer: Optimizer | OneByOne,
    halving: Halving,
    on_halved: Callable[[Halved], None],
    device: torch.device,
) -> T:
    """`step(micro_batches)`, in smaller ones where these do not fit; the limit that was found stays in `halving`.

    A failed try leaves nothing: gradients and graph are freed, the random state is that of before.

    Args:
        step: micro-batches -> `step.optimizer_step` of them.
        on_halved: called for every size that did not fit.
    Raises: UserError if one document does not fit, if the update does not, or if the step cannot be repeated.
    """
    restore = _random_state(device)
    # What did not fit once is not tried again: each failure costs a part of a step, and on a CPU perhaps the process. A step
    # that updates inside backward has to be one micro-batch, so it is taken as it comes.
    batches: Sequence[Batch] = split_to(micro_batches, halving.limit) if halving.repeatable else micro_batches
    while True:
        # The traceback of the error holds the frames, and they the graph: all of it must be gone before anything is freed.
        # So nothing of the error but its text leaves the block, and the work is done below it.
        try:
            return step(batches)
        except OutOfMemory as error:  # inside a micro-batch (`outofmemory.in_micro_batch`): nothing has moved yet
            failed, text = batches[error.micro_batch], _first_line(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed, text = None, _first_line(error)  # in no micro-batch, so in the update after them
        # Gradients of the micro-batches before the failed one: they would be added a second time.
        optimizer.zero_grad(set_to_none=True)
        _free_memory()
        if failed is None:
            raise UserError(
                f"out of memory in the update of the weights ({halving.setup}; {text}). It needs the gradients and the "
                "optimizer's state at once, so smaller micro-batches would not help, and as some weights may "
                "already have changed, the step is not repeated. Use an optimizer with less state "
                "(--optimizer.name), or train fewer weights (--lora.rank, if the command has it)"
            )
        # Halves: an allocator says how much it could not give, which is no measure of how many tokens would have fitted.
        halves = failed.halves() if halving.repeatable else None
        if halves is None:
            raise UserError(_no_way_on(failed, halving, text))
        # Halved is all that is larger, not the failed one alone: another of its size that fitted before it did so by luck.
        halving.limit = max(half.size for half in halves)
        on_halved(_halved(micro_batches, failed, halving))
        batches = split_to(batches, halving.limit)
        restore()  # so that the masks of a step do not depend on how often it was tried


def within_memory(
    batches: Iterable[Batch], compute: Callable[[Batch], T], kept: list[list[T]] | None = None
) -> Iterator[list[T]]:
    """For every batch what `compute` gives: one result, or where memory ends those of its pieces, in order.

    For forward passes, which can be broken off (`STOP`). A size that failed is not tried again with later batches.

    Args:
        kept: what an earlier call gave for the first of these batches and the same weights: it is not computed again, and
            what is computed now is added to it.
    Raises: UserError if one document does not fit; Interrupted.
    """
    limit = None  # of this call alone: to try the whole size again costs one forward pass that fails
    for number, batch in enumerate(batches):
        STOP.check()
        if kept is not None and number < len(kept):
            yield kept[number]
            continue
        # Pieces done stay done: a forward pass moves nothing, so only the failed piece is computed again.
        waiting, results = split_to([batch], limit), []
        while waiting:
            try:
                results.append(compute(waiting[0]))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                text = _first_line(error)
            else:
                del waiting[0]
                continue
            _free_memory()  # outside of the block again, for the traceback's sake
            halves = waiting[0].halves()
            if halves is None:
                raise UserError(
                    f"out of memory in a forward pass over {waiting[0].extent} ({text}), which cannot be split further: "
                    "use a smaller --data.block_size, or a device with more memory"
                )
            limit = max(half.size for half in halves)
            waiting = split_to(waiting, limit)
        if kept is not None:
            kept.append(results)
        yield results


def _halved(micro_batches: Sequence[Batch], failed: Batch, halving: Halving) -> Halved:
    limit, rows = halving.limit, len(micro_batches) * halving.batch_size
    assert limit is not None
    # Settings with the same rows a step, so that whoever starts that way gets the same training: divisors of the rows only.
    # Padded rows differ in width from batch to batch; the widest of this step stands for all.
    per_row = max(batch.size for batch in micro_batches) / halving.batch_size
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * per_row <= limit]
    same = f"--train.batch_size {fitting[-1]} --train.accumulate {rows // fitting[-1]}" if fitting else halving.smaller
    line = (
        f"out of memory with {failed.extent} ({halving.setup}); this step is repeated, and later ones are run, in "
        f"micro-batches of at most {limit:,} tokens, which gives the same result. To start that way: {same}"
    )
    return Halved(failed.size, limit, line)


def _no_way_on(failed: Batch, halving: Halving, text: str) -> str:
    why, ways = "which cannot be split further", halving.smaller
    if not halving.repeatable:  # not cut even where it could be: its weights have begun to move
        why = "and a step that updates inside backward cannot be repeated in parts"
        ways = f"a smaller --train.batch_size, --train.optimizer_in_backward false, {ways}"
    return (
        f"out of memory with {failed.extent} ({halving.setup}; {text}), {why}. Options: {ways}; "
        "`tunesmith plan --fit` finds what fits"
    )


def _first_line(error: BaseException) -> str:
    """What the allocator said, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _free_memory() -> None:
    """Give back what a failed try has left behind: cycles of frames, cached blocks, freed memory of the C library."""
    gc.collect()  # frames and closures in a cycle hold tensors that counting references alone would not free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # cached blocks are of the sizes that failed: given back, they can be cut anew
    if torch.mps.is_available():
        torch.mps.empty_cache()
    return_freed_memory()  # by default the C library keeps what is freed (`device.keep_freed_memory`)


def _random_state(device: torch.device) -> Callable[[], None]:
    """A function that puts the random state back as it is now."""
    # Five kilobytes, copied before every step: when a step has failed it is too late. On the host even for a GPU: no device sync.
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return restore
