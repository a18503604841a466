"""What the runs of a study will take: each as `tunesmith plan` has it, and the times of runs that have finished."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.cutting import block_size_of
from tunesmith.device import resolve_device
from tunesmith.errors import UsageError, UserError
from tunesmith.files.names import known_shape
from tunesmith.models.family import Config
from tunesmith.options.configs import AnyConfig
from tunesmith.plan.cards import Card
from tunesmith.plan.memory import Memory
from tunesmith.plan.planning import Place, Setting, estimate_passes, make_setting
from tunesmith.plan.probe import probe_step
from tunesmith.plan.workload import Rows
from tunesmith.study.ledger import DONE, Ledger
from tunesmith.study.matrix import Plan, PlannedRun, reference
from tunesmith.train.resolve import ESTIMATES_SHARE

START = 3.0  # seconds in which a run's process gets ready, on the machine of docs/performance.md
ALIKE = ("model.name", "data.name", "data.max_rows", "data.batching", "optimizer.name", "train.precision")
"""Options that decide with a few others how fast a run computes."""
BUDGET = 1.0  # seconds of a probe after its warm-up
ELSEWHERE = Card("another machine", 0.0, 1e10, {"fp32": 1e11})  # which a study was written for; nothing is known of it


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


def shapes_of(plan: Plan) -> dict[str, Config | None]:
    """The shape of every run's model; None for one that would have to be downloaded to be known."""
    shapes: dict[str, Config | None] = {}
    for name, run in plan.runs.items():
        model = run.settings["model.name"]
        target = reference(model)
        shapes[name] = shapes[target[0]] if target else known_shape(str(model))
    return shapes


@dataclass(frozen=True)
class Forecast:
    """A run as a plan has it. memory: None for adapters on single blocks, which is not counted; `setting` has them on all."""

    setting: Setting
    memory: Memory | None


def forecasts_of(plan: Plan, configs: Mapping[str, AnyConfig]) -> dict[str, Forecast | None]:
    """Every run before it runs; None where the model's shape is not known, or does not suit the run's options."""
    return {name: forecast_of(configs[name], shape) if shape else None for name, shape in shapes_of(plan).items()}


def forecast_of(config: AnyConfig, shape: Config) -> Forecast | None:
    """A run of a model of this shape; None where the two do not go together."""
    try:
        device = resolve_device(config.train.device)
        place = Place(str(device), None, device.type == "cpu", math.inf, 0.0)
    except UserError:  # planned for another machine
        place = Place(config.train.device, ELSEWHERE, False, math.inf, 0.0)
    try:
        setting = make_setting(config, shape, Rows(), place, {})
        return Forecast(setting, setting.memory)
    except UsageError:
        return Forecast(make_setting(config, shape, Rows(), place, {"lora.targets": "all-linear"}), None)
    except UserError:
        return None


def work_of(plan: Plan, run: PlannedRun, forecast: Forecast | None) -> RunWork | None:
    """How much a run computes; None where that is not known, as its steps are not that depend on the data (`train.epochs`)."""
    if forecast is None or (steps := forecast.setting.config.train.steps) is None:
        return None
    setting, s = forecast.setting, run.settings
    done = plan.runs[run.continues].settings["train.steps"] or 0 if run.continues else 0
    training = (steps - done) * setting.operations
    looking = estimate_passes(setting.config, steps, done=done) * setting.forward_operations
    operations = training + (looking if setting.config.eval.iters else min(looking, training * ESTIMATES_SHARE))
    alike = (run.command, *(s[option] for option in ALIKE), s.get("eval.reward"), bool(s["lora.rank"]))
    return RunWork(operations, (*alike, block_size_of(setting.config.data)))


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
    expected: dict[str, Seconds | None] = {}
    for name, work in works.items():
        alike = {n: (w, s) for n, (w, s) in measured.items() if work and w.kind == work.kind}
        if name in measured or (ledger.state(name) in DONE and ledger.runs[name]["seconds"]):
            expected[name] = Seconds(ledger.runs[name]["seconds"], "measured")
        elif work and (used := alike or measured):
            rate = sum(w.operations for w, _ in used.values()) / sum(s for _, s in used.values())
            source = "from finished runs of the same kind" if alike else "scaled from finished runs of other kinds"
            expected[name] = Seconds(START + work.operations / rate, source)
        elif work and rates and name in rates:
            expected[name] = Seconds(START + work.operations / rates[name], "from a probe of this machine")
        else:
            expected[name] = None
    return expected


def probe(forecasts: Mapping[str, Forecast | None]) -> dict[str, float]:
    """Run -> operations a second that a step reaches here, of the smallest step with its width, rows and precision.

    The model has one block, so that a probe takes about a second also where the study's models are large.
    """
    alike: dict[tuple[Any, ...], dict[str, Setting]] = {}
    for name, forecast in forecasts.items():
        if forecast and not (s := forecast.setting).place.card:
            key = (s.shape, block_size_of(s.config.data), s.place.name, s.config.train.precision)
            alike.setdefault(key, {})[name] = s
    rates: dict[str, float] = {}
    for group in alike.values():
        for s in sorted(group.values(), key=lambda s: s.work.tokens):
            with contextlib.suppress(UserError):  # a reference's device or an optimizer's package may be missing here
                one = make_setting(s.config, s.shape.resized(depth=1), Rows(), s.place, {})
                seconds = probe_step(one.config, one.shape, one.rows, budget=BUDGET).step(one.work.micro_batches)
                rates |= dict.fromkeys(group, one.operations / seconds)
                break
    return rates
