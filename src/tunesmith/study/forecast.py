"""What a run will take before it runs: memory counted from its shape, time from finished runs or a short probe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.data.cutting import USUAL_BLOCK
from tunesmith.device import autocast, resolve_device, resolve_precision
from tunesmith.errors import UserError
from tunesmith.files.names import known_shape
from tunesmith.models.gpt2 import Block, GPTConfig
from tunesmith.plan.memory import Memory, Work, adapted_layers, linear_sizes, predict_memory
from tunesmith.plan.workload import forward_operations, shared_keys, step_operations
from tunesmith.study.ledger import DONE, Ledger
from tunesmith.study.matrix import Plan, PlannedRun, reference
from tunesmith.train.resolve import ESTIMATES_SHARE, MOST_ITERS

START = 3.0  # seconds in which a run's process gets ready, on the machine of docs/performance.md
ESTIMATES = 40  # the most that `eval.every` gives when it is left out


@dataclass(frozen=True)
class RunWork:
    """Floating-point operations of a run (an upper bound: estimates on small data are shorter), and what is like it."""

    operations: float
    kind: tuple[Any, ...]


@dataclass(frozen=True)
class Seconds:
    """A time, and where it is from."""

    value: float
    source: str


def shapes_of(plan: Plan) -> dict[str, GPTConfig | None]:
    """The shape of every run's model; None for one that would have to be downloaded to be known."""
    found: dict[str, GPTConfig | None] = {}
    for name, run in plan.runs.items():
        model = run.settings["model.name"]
        target = reference(model)
        found[name] = found[target[0]] if target else known_shape(str(model))
    return found


def memory_of(run: PlannedRun, shape: GPTConfig | None) -> Memory | None:
    """Bytes of the run's step by component; None where the shape is not known."""
    if shape is None:
        return None
    work = _step_of(run, _block_size(run, shape), half=_precision(run, shape) != "fp32")
    return predict_memory(shape, work) if work else None


def _block_size(run: PlannedRun, shape: GPTConfig) -> int:
    """Tokens in a row of the run's batches."""
    asked = run.settings["data.block_size"]
    if asked in ("auto", 0):
        return shape.block_size if run.command == "pretrain" else min(shape.block_size, USUAL_BLOCK)
    return int(asked)


def _step_of(run: PlannedRun, block_size: int, *, half: bool = False) -> Work | None:
    """The run's step, every token carrying loss; None where adapters are on single blocks, which is not counted."""
    s = run.settings
    targets = adapted_layers(s["lora.targets"]) if s["lora.rank"] else ()
    if targets is None:
        return None
    mode, tokens = s["train.activation_checkpointing"], s["train.batch_size"] * block_size
    return Work(
        tokens, s["optimizer.name"], supervised=tokens, packed=s["data.batching"] != "windows",
        micro_batches=s["train.accumulate"], rank=s["lora.rank"], targets=targets, half=half, chunk=1024 if half else 256,
        checkpointing=False if mode == "auto" else mode, in_backward=s["train.optimizer_in_backward"],
        bf16_weights=s["train.weights"] == "bf16", copies=2 if s.get("dpo.reference") == "model" else 1, head=run.command != "reward",
        shared_keys=shared_keys(tokens, 1.0) if run.command in ("dpo", "reward") else 0,
    )  # fmt: skip


def _precision(run: PlannedRun, shape: GPTConfig) -> str:
    try:
        device = resolve_device(run.settings["train.device"])
    except UserError:  # planned for another machine
        return "fp32"
    return resolve_precision(run.settings["train.precision"], device, shape.n_embd)


def work_of(plan: Plan, run: PlannedRun, shape: GPTConfig | None) -> RunWork | None:
    """How much a run computes; None where shape or steps are not known (`train.epochs` depends on the data)."""
    s = run.settings
    if shape is None or s["train.steps"] is None:
        return None
    block, rank, steps = _block_size(run, shape), s["lora.rank"], s["train.steps"]
    done = plan.runs[run.continues].settings["train.steps"] or 0 if run.continues else 0
    step_work = _step_of(run, block) or Work(block, rank=rank)
    forward = forward_operations(shape, attended=block)
    step = step_operations(shape, step_work, attended=block, reference=run.command == "dpo")
    rows = s["train.batch_size"] * block
    estimates = s["eval.at_start"] + (steps - done) / (s["eval.every"] or max(1, steps // ESTIMATES))
    training = (steps - done) * s["train.accumulate"] * step
    looking = estimates * 2 * (s["eval.iters"] or MOST_ITERS) * forward
    operations = rows * (training + (looking if s["eval.iters"] else min(looking, training * ESTIMATES_SHARE)))
    kind = (
        run.command, s["model.name"], s["data.name"], s["data.max_rows"], s["data.batching"], block, bool(rank),
        s["optimizer.name"], s["train.precision"], s.get("eval.reward"),
    )  # fmt: skip
    return RunWork(operations, kind)


def times(
    works: Mapping[str, RunWork | None], ledger: Ledger, rates: Mapping[str, float] | None = None
) -> dict[str, Seconds | None]:
    """Expected seconds of every run: measured, from finished runs alike, scaled from others, or from a probe.

    rates: run -> operations a second, as probed.
    """
    measured = {
        name: (work, max(0.5, ledger.runs[name]["seconds"] - START))
        for name, work in works.items()
        if work and ledger.state(name) in DONE and ledger.runs[name]["seconds"]
    }
    found: dict[str, Seconds | None] = {}
    for name, work in works.items():
        alike = {n: (w, s) for n, (w, s) in measured.items() if work and w.kind == work.kind}
        if name in measured or (ledger.state(name) in DONE and ledger.runs[name]["seconds"]):
            found[name] = Seconds(ledger.runs[name]["seconds"], "measured")
        elif work and (used := alike or measured):
            rate = sum(w.operations for w, _ in used.values()) / sum(s for _, s in used.values())
            source = "from finished runs of the same kind" if alike else "scaled from finished runs of other kinds"
            found[name] = Seconds(START + work.operations / rate, source)
        elif work and rates and name in rates:
            found[name] = Seconds(START + work.operations / rates[name], "from a probe of this machine")
        else:
            found[name] = None
    return found


def probe(plan: Plan, shapes: Mapping[str, GPTConfig | None]) -> dict[str, float]:
    """Run -> operations a second that one block of its shape reaches here, forward and backward; under a second a shape."""
    found: dict[tuple[Any, ...], float] = {}
    rates = {}
    for name, run in plan.runs.items():
        if (shape := shapes[name]) is None:
            continue
        try:
            device = resolve_device(run.settings["train.device"])
        except UserError:
            continue
        key = (shape, _block_size(run, shape), device, _precision(run, shape))
        if key not in found:
            found[key] = _block_rate(shape, key[1], device, key[3])
        rates[name] = found[key]
    return rates


def _block_rate(shape: GPTConfig, tokens: int, device: torch.device, precision: Any) -> float:
    block = Block(shape, 0).to(device).train()
    x = torch.randn(1, tokens, shape.n_embd, device=device, requires_grad=True)
    operations = 6.0 * tokens * (sum(i * o for i, o in linear_sizes(shape).values()) + tokens * shape.n_embd)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        with autocast(device, precision):
            y = block(x, None)
        y.float().sum().backward()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return operations / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
