"""How long a training step takes here: the step itself, timed on random weights and tokens with one block and with a few.

A step's time is linear in the number of blocks, so t(n) = t(1) + (n - 1) (t(k) - t(1)) / (k - 1). Everything else is as it
will be: width, rows, documents, precision, adapters, memory modes, the update.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch import Batch
from tunesmith.data.cutting import block_size_of
from tunesmith.data.pairs import join_pairs
from tunesmith.device import resolve_compile
from tunesmith.files.names import new_model
from tunesmith.models.attention import Documents
from tunesmith.models.family import Config
from tunesmith.options.configs import AnyConfig, with_options
from tunesmith.plan.workload import Rows
from tunesmith.train.methods.table import method_of
from tunesmith.train.optim import OneByOne
from tunesmith.train.step import optimizer_step
from tunesmith.train.trainee import equip, make_optimizer, prepare_model

BLOCKS = 4  # of the larger of the two models
BUDGET, REPEATS = 8.0, 5  # seconds after the warm-up, and most steps of each


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch, forward and backward, and of the update after them."""

    micro_batch: float
    update: float

    def step(self, micro_batches: int) -> float:
        """Seconds of an optimizer step."""
        return micro_batches * self.micro_batch + self.update


def probe_step(config: AnyConfig, shape: Config, rows: Rows, *, budget: float = BUDGET) -> StepTime:
    """Time steps of a resolved configuration on its device, in about `budget` seconds (longer where a single step is)."""
    few = min(BLOCKS, shape.depth)
    steps = {n: make_step(config, shape.resized(depth=n), rows) for n in {1, few}}
    for step in steps.values():
        step()
    times: dict[int, list[StepTime]] = {n: [] for n in steps}
    began = time.perf_counter()
    for _ in range(REPEATS):
        for n, step in steps.items():  # in turn, so that a drift of the machine meets both
            times[n].append(step())
        if time.perf_counter() - began > budget:
            break

    def whole(part: str) -> float:
        one, several = (float(statistics.median(getattr(t, part) for t in times[n])) for n in (1, few))
        return one if few == 1 else max(one, one + (shape.depth - 1) * (several - one) / (few - 1))

    return StepTime(whole("micro_batch"), whole("update"))


def make_step(config: AnyConfig, shape: Config, rows: Rows, micro_batches: int = 1) -> Callable[[], StepTime]:
    """A model of this shape with random weights, and a function that trains it one step on random tokens and tells the time."""
    config, method = decided(config), method_of(config)
    trunk = new_model(shape, config.train.seed)
    model = equip(trunk, config, scored=method.scored)
    device = prepare_model(model, trunk, config)
    optimizer, in_backward = make_optimizer(model, config), config.train.optimizer_in_backward
    plain = optimizer.optimizer if isinstance(optimizer, OneByOne) else optimizer
    batch = (pair_batch if method.pairs else text_batch)(config, shape, rows).to(device)
    loss_sum = method.loss_sum(model, config)

    def timed() -> StepTime:
        marks: list[float] = []

        def backward_done(*_: Any) -> None:
            _wait(device)
            marks.append(time.perf_counter())

        handle = plain.register_step_pre_hook(backward_done)
        _wait(device)
        began = time.perf_counter()
        optimizer_step(model, [batch] * micro_batches, loss_sum, optimizer, max_norm=config.train.grad_clip)
        _wait(device)
        ended = time.perf_counter()
        handle.remove()
        update_from = ended if in_backward or not marks else marks[0]
        return StepTime((update_from - began) / micro_batches, ended - update_from)

    return timed


def decided(config: AnyConfig) -> AnyConfig:
    """The configuration with what a plan leaves open: whether blocks are compiled, and some learning rate (none changes the time)."""
    compiled, lr = resolve_compile(config.train.compile, torch.device(config.train.device)), config.optimizer.lr
    return with_options(config, {"train.compile": compiled, "optimizer.lr": 1e-6 if lr is None else lr})


def text_batch(config: AnyConfig, shape: Config, rows: Rows) -> Batch:
    """Random texts in rows as the configuration batches them; the end of each carries loss."""
    b, t = config.train.batch_size, block_size_of(config.data)
    generator = torch.Generator().manual_seed(1)
    packed = config.data.batching == "packed"
    lengths = split_evenly(t, rows.text_tokens) if packed else [t]
    row = torch.cat([torch.arange(n) >= n - round(rows.supervised * n) for n in lengths])
    chosen = row.repeat(b).nonzero()[:, 0]
    ids = torch.randint(shape.vocab_size, (b, t), generator=generator)
    targets = torch.randint(shape.vocab_size, (len(chosen),), generator=generator)
    documents = Documents.from_rows([lengths] * b) if packed else None
    return Batch(ids, chosen, targets, documents)


def pair_batch(config: AnyConfig, shape: Config, rows: Rows) -> Batch:
    """Random pairs that fill the rows; the two answers have the share of each pair's tokens that carries loss."""
    block_size, draw = block_size_of(config.data), np.random.default_rng(1)
    parts = []
    for n in split_evenly(config.train.batch_size * block_size, rows.text_tokens):
        answer = max(1, round(rows.supervised * n / 2))
        prompt, chosen, rejected = (
            draw.integers(shape.vocab_size, size=k) for k in (max(1, n - 2 * answer), answer, answer)
        )
        parts.append((prompt, chosen, rejected))
    return join_pairs(parts, [(True, True)] * len(parts), shape.vocab_size - 1, block_size)


def split_evenly(tokens: int, size: int) -> list[int]:
    """Lengths of texts of about `size` tokens that fill `tokens`, none longer than the others by more than one."""
    count = max(1, round(tokens / size))
    return [tokens // count + (i < tokens % count) for i in range(count)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
