"""What a training will take, from its configuration alone, and which settings fit: memory counted, time from a probe or a card.

No data is read and no weights are loaded. `Setting` is a configuration with what follows from it; `alternatives` are the
same training in less memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.cutting import block_size_of
from tunesmith.device import has_lean_allocator, resident_memory, resolve_device, resolve_precision
from tunesmith.errors import UsageError
from tunesmith.models.family import HEAD, Config
from tunesmith.models.head import head_chunk
from tunesmith.options.configs import AnyConfig, with_options
from tunesmith.plan.cards import CARDS, CONTEXT, Card, card_seconds
from tunesmith.plan.memory import Memory, Work, adapted_layers, predict_memory
from tunesmith.plan.workload import Rows, forward_operations, shared_keys, step_operations
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.table import method_of
from tunesmith.train.resolve import MOST_ITERS, default_iters, resolve_data

LEAN_TIME = 1.25  # of a step with --train.allocator lean, in times of one with fast; measured with GPT-2, small models take more
LIBRARIES = 42e6  # bytes that threads, oneDNN's kernels and the like take with the first step on a CPU; measured
COMPILER = 0.44e9  # bytes of torch's compiler and what it makes, for adamw8bit; measured once
HOLES = {True: (20e6, 0.3, 0.8, 0.2), False: (40e6, 0.8, 0.8, 0.0)}
"""What a CPU's heap cannot use again with --train.allocator fast: bytes, and times one block's activations, the largest single
block, all activations; with LoRA and without. Fitted to measured peaks (benchmarks/plan.py and steady.py): glibc gives a freed place
anew only where its alignment happens to fit, so that the same training differs by some percent from run to run."""
CONVERTED = 0.4
"""Where all weights are trained in bfloat16: of the float32 ones that they were made from, what stays of their places on that heap."""
ESTIMATES = 40  # of a training, as `resolve.resolve_length` spreads them where eval.every is left out
CPU = Card("this processor", 0.0, 1e10, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11})  # only to compare settings with


@dataclass(frozen=True)
class Place:
    """Where the training will run. name: as --device has it; card: None where it is this machine."""

    name: str
    card: Card | None
    cpu: bool
    memory: float
    """Bytes available."""
    base: float
    """Bytes that the program takes before it has a model."""


@dataclass(frozen=True)
class Setting:
    """A configuration with its counted memory. changes: options that differ from what was asked."""

    config: AnyConfig
    shape: Config
    rows: Rows
    work: Work
    memory: Memory
    place: Place
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes at the peak over the program's base: counted, and on a CPU with what libraries and the heap's holes take."""
        m = self.memory
        if not self.place.cpu:
            return m.peak
        libraries = LIBRARIES + COMPILER * (self.work.optimizer == "adamw8bit")
        if self.config.train.allocator == "lean":
            return m.peak + libraries
        some, block, largest, activations = HOLES[self.work.rank > 0]
        read = 4 * self.shape.family.count(self.shape) if self.work.bf16_weights and not self.work.rank else 0
        holes = some + block * m.heap + largest * m.largest + activations * m.activations + CONVERTED * read
        return m.peak + libraries + holes

    @property
    def total(self) -> float:
        """Bytes that the whole process needs."""
        return self.place.base + self.peak

    @property
    def method(self) -> Method:
        """The way to train that is planned."""
        return method_of(self.config)

    @property
    def operations(self) -> float:
        """Floating-point operations of an optimizer step, without its update."""
        frozen = self.method.step_work(self.config).frozen_passes
        a_token = step_operations(self.shape, self.work, attended=self.rows.text_tokens, frozen_passes=frozen)
        return self.work.micro_batches * self.work.tokens * a_token

    @property
    def forward_operations(self) -> float:
        """Floating-point operations of a forward pass over a micro-batch."""
        share = self.work.losses / self.work.tokens
        return self.work.tokens * forward_operations(self.shape, attended=self.rows.text_tokens, supervised=share)

    @property
    def estimate(self) -> float:
        """Seconds of a step by the card's data sheet; on this machine only good to compare settings with."""
        card, precision = self.place.card or CPU, self.config.train.precision
        seconds = card_seconds(card, precision, self.operations, self.memory, self.work)
        return seconds * (LEAN_TIME if self.config.train.allocator == "lean" else 1.0)


def find_place(name: str) -> Place:
    """The device that `--device` names. Raises: UsageError listing what there is."""
    if name in CARDS:
        return Place(name, CARDS[name], False, CARDS[name].memory, CONTEXT)
    if name != "auto" and name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or one of the cards {', '.join(CARDS)}")
    device = resolve_device(name, "--device")
    if device.type == "cuda":
        import torch

        return Place(str(device), None, False, torch.cuda.get_device_properties(device).total_memory, CONTEXT)
    import torch._dynamo  # 70 MB that torch's optimizers load with their first use: a part of what every training has

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Place(str(device), None, device.type == "cpu", float(memory), resident_memory())


def size_in_bytes(text: str) -> float:
    """`16GB` (10^9), `16GiB`, `800MB` in bytes. Raises: UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b?|b)?", text.strip().lower())
    if not match or not float(match[1]):
        raise UsageError(f"--fit {text}: expected a size such as 16GB or 800MB, or `device`")
    unit = (match[2] or "gb")[0]
    step = 1024 if "i" in (match[2] or "") else 1000
    return float(match[1]) * float(step) ** {"b": 0, "k": 1, "m": 2, "g": 3}[unit]


def make_setting(config: AnyConfig, shape: Config, rows: Rows, place: Place, changes: Mapping[str, Any]) -> Setting:
    """A configuration, its defaults decided for `place` and with `changes` made, and its counted memory.

    Raises: UsageError if the LoRA targets name no whole kinds of layers, whose memory is not counted; UserError if the
        model has no positions for the block size.
    """
    method = method_of(config)
    config = method.resolve(resolve_data(with_options(config, changes), shape.longest))
    t = config.train
    if place.card:
        precision = place.card.precision if t.precision == "auto" else t.precision
    else:
        precision = resolve_precision(t.precision, resolve_device(place.name), shape.width)
    config = with_options(config, {"train.precision": precision} | ({} if place.card else {"train.device": place.name}))
    rows = rows_of(config, rows)
    work = work_of(config, shape, rows)
    return Setting(config, shape, rows, work, predict_memory(shape, work), place, changes)


def rows_of(config: AnyConfig, rows: Rows) -> Rows:
    """What the rows will be like: random windows and padded rows hold one text each."""
    d = config.data
    everything = d.loss_on == "all" or (d.loss_on == "auto" and d.batching == "windows")
    alone = d.batching != "packed"
    texts = block_size_of(d) if alone else min(rows.text_tokens, block_size_of(d))
    return Rows(texts, 1.0 if everything else rows.supervised)


def work_of(config: AnyConfig, shape: Config, rows: Rows) -> Work:
    """What decides the step's memory and time. Raises: UsageError, as `make_setting`."""
    t, d, lora = config.train, config.data, config.lora
    targets = adapted_layers(shape, lora.targets) if lora.rank else ()
    if targets is None:
        raise UsageError(
            f"--lora.targets {lora.targets}: a plan counts adapters per kind of layer; name the kinds "
            f"({', '.join((*shape.family.linear_layers(shape), HEAD, 'all-linear'))})"
        )
    tokens = t.batch_size * block_size_of(d)
    method, half = method_of(config), t.precision != "fp32"
    supervised = round(rows.supervised * tokens)
    if method.scored:  # of a pair the last tokens of two answers go on to the score, and the others end before
        supervised = 2 * max(1, round(tokens / rows.text_tokens))
    mode = t.activation_checkpointing
    return Work(
        tokens,
        config.optimizer.name,
        supervised=max(1, supervised),
        packed=d.batching == "packed" or method.scored,
        micro_batches=t.accumulate,
        rank=lora.rank,
        targets=targets,
        half=half,
        chunk=head_chunk(t.precision) if t.precision != "auto" else 256,
        checkpointing=False if mode == "auto" else mode,
        in_backward=t.optimizer_in_backward,
        bf16_weights=t.weights == "bf16",
        copies=method.step_work(config).copies,
        head=not method.scored,
        shared_keys=shared_keys(tokens, rows.supervised) if method.pairs else 0,
    )


def estimate_passes(config: AnyConfig, steps: int, *, done: int = 0) -> float:
    """Forward passes over a micro-batch that the loss estimates from step `done` to `steps` take; on small data they are fewer."""
    e = config.eval
    every = e.every or max(1, steps // ESTIMATES)
    iters = e.iters or default_iters(config, steps, every, (MOST_ITERS, MOST_ITERS))
    return (e.at_start + (steps - done) / every) * 2 * iters


# ---- the same training in less memory --------------------------------------------------------------------------------

MOST_PARTS = 4096  # into which a micro-batch is split
INEXACT = ("train.weights", "optimizer.name", "train.grad_clip")


def is_exact(changes: Mapping[str, Any]) -> bool:
    """Whether the result stays the same, to rounding."""
    return not any(name in changes for name in INEXACT)


def alternatives(config: AnyConfig, *, inexact: bool) -> Iterator[dict[str, Any]]:
    """Changes of options that leave the training what it is; with `inexact` also those that change its result a little.

    Rows of a step, rank and block size stay. A micro-batch is split only into equal parts.
    """
    t, name = config.train, config.optimizer.name
    modes = ["selective", True] if t.activation_checkpointing in ("auto", False) else []
    splits = [n for n in range(1, min(t.batch_size, MOST_PARTS) + 1) if t.batch_size % n == 0]
    weights = ["bf16"] if inexact and t.weights == "fp32" else []
    optimizers = ["adamw8bit"] if inexact and name == "adamw" else []
    allocators = ["lean"] if t.allocator == "fast" else []
    for parts in splits:
        accumulate = t.accumulate * parts
        may_be_early = not t.optimizer_in_backward and accumulate == 1 and (inexact or t.grad_clip == 0)
        if t.optimizer_in_backward and accumulate > 1:
            continue
        fewer = {"train.batch_size": t.batch_size // parts, "train.accumulate": accumulate} if parts > 1 else {}
        early = {"train.optimizer_in_backward": True} | ({"train.grad_clip": 0.0} if t.grad_clip else {})
        free: dict[str, list[Any]] = {
            **{option: [value] for option, (value, _) in method_of(config).cheaper(config).items()},
            "train.activation_checkpointing": modes,
            "train.weights": weights,
            "optimizer.name": optimizers,
            "train.allocator": allocators,
        }
        choices: list[list[dict[str, Any]]] = [[{}, *({key: v} for v in values)] for key, values in free.items()]
        for some in itertools.product(*choices, [{}, early] if may_be_early else [{}]):
            yield functools.reduce(operator.or_, some, fewer)


def candidates(asked: Setting, *, inexact: bool) -> list[Setting]:
    """The settings of `alternatives`, without those that fp16's loss scaling forbids and an allocator that is not there."""
    may_be_lean = asked.place.cpu and has_lean_allocator()
    settings = (
        make_setting(asked.config, asked.shape, asked.rows, asked.place, changes)
        for changes in alternatives(asked.config, inexact=inexact)
        if may_be_lean or "train.allocator" not in changes
    )
    scaled = {"train.optimizer_in_backward", "train.weights"}
    return [s for s in settings if s.config.train.precision != "fp16" or not scaled & s.changes.keys()]


def as_options(changes: Mapping[str, Any]) -> str:
    """Changes as they are written behind a command."""
    return " ".join(f"--{name} {option_value(value)}" for name, value in changes.items())


def option_value(value: Any) -> str:
    """An option's value as it is written."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def fastest_that_fits(settings: list[Setting], room: float) -> Setting | None:
    """The fastest that fits in `room` bytes, an exact one where there is one; of equals the one that changes least."""
    fitting = [s for s in settings if s.total <= room]
    exact = [s for s in fitting if is_exact(s.changes)]
    return min(exact or fitting, key=lambda s: (s.estimate, len(s.changes)), default=None)


def effect(before: Setting, name: str, value: Any) -> tuple[float, float]:
    """Bytes saved at the peak, and the share of the step's time that it costs, when this one option is changed."""
    changes = {name: value}
    if name == "train.batch_size":
        changes["train.accumulate"] = before.config.train.accumulate * (before.config.train.batch_size // value)
    after = make_setting(before.config, before.shape, before.rows, before.place, changes)
    return before.peak - after.peak, after.estimate / before.estimate - 1
