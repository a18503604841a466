"""Where DPO's reference log-probabilities come from: computed once and kept, adapters off, or a second model.

All three give the same numbers, so none changes the loss; they differ in time and memory. The kept ones are stored by
content: the reference's weights and precision name a file, and exactly what is computed of a pair (its tokens as cut,
which ends count) is the key in it. So every later beta, loss, rank and optimizer finds them, and a changed pair is
computed anew.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.data.pairs import PairRows
from tunesmith.data.tokenstore import cache_directory
from tunesmith.device import Precision, put, resolve_device
from tunesmith.models.lora import disabled
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode
from tunesmith.options.configs import precision_of
from tunesmith.options.training import DPOConfig
from tunesmith.progress import Progress
from tunesmith.train.divergence import batches_judged_by
from tunesmith.train.halving import within_memory
from tunesmith.train.pair_loss import Reference, answer_logps
from tunesmith.train.task import Prepared

# float32, as the model gives them: nothing is lost by keeping them. The key is a SHA-256, so pairs need not be stored.
RECORD = np.dtype([("key", "V32"), ("logps", "<f4", (2,))])
DIGEST = 32  # bytes of the SHA-256 of the records, with which the file begins
SAVE_EVERY = 4096  # pairs computed between two writes, so that an interrupted pass is not lost


class LogpStore:
    """Log-probabilities of answer pairs under one reference, kept in a file; what cannot be written is kept in memory.

    Two processes may use one file: each adds to what it finds, and nothing is ever half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[bytes, tuple[float, float]] = {}
        self._read()

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError:
            return
        payload = content[DIGEST:]
        if hashlib.sha256(payload).digest() != content[:DIGEST] or len(payload) % RECORD.itemsize:
            return  # damaged: computed anew, for a wrong reference would go unnoticed
        records = np.frombuffer(payload, RECORD)
        for key, (chosen, rejected) in zip(records["key"], records["logps"].tolist(), strict=True):
            # Never overwritten: the numbers that a run has begun with are those that it ends with.
            self.known.setdefault(key.tobytes(), (chosen, rejected))

    def save(self) -> None:
        """Write everything known, including what other processes have added meanwhile."""
        self._read()  # between this and the replacing another's records may still be lost: they would be computed again
        if not self.known:  # broken off before the first
            return
        records = np.zeros(len(self.known), RECORD)
        records["key"] = np.frombuffer(b"".join(self.known), "V32")
        records["logps"] = list(self.known.values())
        payload = records.tobytes()
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Beside the file and then in its place: a reader finds the old one or the new one whole.
            handle, aside = tempfile.mkstemp(dir=self.path.parent, prefix=".writing-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(payload).digest() + payload)
                Path(aside).replace(self.path)
            except BaseException:
                Path(aside).unlink(missing_ok=True)  # also at Ctrl-C
                raise


def store_path(fingerprint: str, precision: Precision) -> Path:
    """The file for a reference with these weights (`weights.weights_fingerprint`), computed in this precision."""
    return cache_directory() / "reference" / f"{fingerprint[:32]}-{precision}.logps"


class Fill(NamedTuple):
    """What the reference of some pairs cost: pairs needed, and pairs computed now rather than found in the store."""

    pairs: int
    computed: int


def cached(
    rows: PairRows, numbers: Sequence[int], store: LogpStore, compute: Callable[[Batch], Tensor]
) -> tuple[Reference, Fill]:
    """The reference for these pairs of `rows`, computed now where `store` does not have it.

    compute: the untrained model's log-probabilities of a batch, on the CPU, (pairs, 2).
    """
    # By content: what another run or epoch has met, under whatever number, is known already.
    keys = {i: rows.key(i) for i in numbers}
    missing = [i for i in numbers if keys[i] not in store.known]
    if missing:
        # About a micro-batch of training, so it fits; but no less than 1,024 tokens, or there would be many small passes.
        size = min(max(rows.layout.batch_size * rows.layout.block_size, 1024), 8192)
        with Progress(len(missing), unit="reference pair") as bar:
            done = saved = 0
            try:
                for pieces in within_memory(rows.of(missing, size), lambda batch: (batch, compute(batch).tolist())):
                    for batch, logps in pieces:
                        for i, (chosen, rejected) in zip(batch.pairs, logps, strict=True):
                            store.known[keys[i]] = (chosen, rejected)
                        done += batch.count
                        bar.advance(done, None, batch.tokens)
                    if done - saved >= SAVE_EVERY:
                        store.save()
                        saved = done
            finally:
                store.save()  # an interrupted pass keeps what it has
    # NaN where nothing was computed: a pair that was not asked for then shows at once, as a loss that is not finite.
    table = torch.full((len(rows), 2), float("nan"))
    table[list(numbers)] = torch.tensor([store.known[keys[i]] for i in numbers])

    def reference(batch: Batch) -> Tensor:
        # Gathered on the host by host numbers: nothing waits, and a step carries two numbers a pair to the device.
        return put(table[list(batch.pairs)], batch.input_ids.device)

    return reference, Fill(len(keys), len(missing))


def adapter_off(model: Model, precision: Precision) -> Reference:
    """The policy without its adapters is the reference: no second model, a forward pass a batch."""

    def reference(batch: Batch) -> Tensor:
        # Without dropout as well: the reference is the model before training, not a random part of it.
        with evaluation_mode(model), disabled(model):
            return answer_logps(model, batch, precision)

    return reference


def second_model(model: Model, device: torch.device, precision: Precision) -> Reference:
    """A frozen copy of `model` as it is now, perhaps on another device."""
    # Copied now, before the first step, while the policy still is the reference. It takes the weights' memory once more, but
    # neither gradients nor optimizer state.
    frozen: Any = copy.deepcopy(model).to(device).eval().requires_grad_(False)

    def reference(batch: Batch) -> Tensor:
        home = batch.input_ids.device  # the policy's: there the loss needs the result
        return answer_logps(frozen, batch.to(device), precision).to(home)

    return reference


def zeros(batch: Batch) -> Tensor:
    """In place of a reference where only the time of a step counts: what is kept costs a step nothing."""
    return torch.zeros(batch.count, 2, device=batch.input_ids.device)


def live_reference(model: Model, config: DPOConfig) -> Reference | None:
    """The reference of a resolved configuration that is computed in every step; None where its log-probabilities are kept.

    model: the policy on its device, before the first step.
    """
    precision = precision_of(config)
    if config.dpo.reference == "adapter":
        return adapter_off(model, precision)
    if config.dpo.reference == "model":
        device = resolve_device(config.dpo.reference_device or config.train.device, "--dpo.reference_device")
        return second_model(model, device, precision)
    return None


def make_references(run: Prepared) -> tuple[Reference, Reference, dict[str, Any]]:
    """The reference of the training and of the validation pairs that a run will see, and what to log of it.

    Called before the first step, while the policy still is the reference.
    """
    model, config, precision = run.trainee.trunk, run.config, run.precision
    if live := live_reference(model, config):
        where = config.dpo.reference_device or config.train.device
        device = {"device": str(resolve_device(where))} if config.dpo.reference == "model" else {}
        return live, live, {"mode": config.dpo.reference, **device}
    store = LogpStore(store_path(run.trainee.fingerprint, precision))

    def compute(batch: Batch) -> Tensor:
        with evaluation_mode(model):  # fresh adapters add nothing yet
            return answer_logps(model, batch.to(model.device), precision)

    train, validation = run.data.train.rows, run.data.validation.rows
    micro_batches = config.train.steps * config.train.accumulate
    sampled = train.sampled(max(run.iters, batches_judged_by(run.path, config.resume, micro_batches)))
    on_train, of_train = cached(train, sorted({*train.used(micro_batches), *sampled}), store, compute)
    on_validation, of_validation = cached(validation, validation.used(run.iters), store, compute)
    pairs, computed = map(sum, zip(of_train, of_validation, strict=True))
    return on_train, on_validation, {"mode": "cached", "pairs": pairs, "computed": computed}
