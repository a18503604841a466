"""Memory and time of a training before it runs.

    tunesmith plan sft --model.name gpt2-medium --lora.rank 8
    tunesmith plan dpo --config my.yaml --fit 16GB
    tunesmith plan --config paper/e1 --device p100

Memory is counted from the shape, component by component; time comes from a probe of about ten seconds on this machine, or is
estimated from a card's data sheet. `--fit` looks among the memory modes that leave the result what it is, and says what each
saves and costs. Left out: the evaluation's answers and a reward model beside the training, and dropout's masks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.cutting import block_size_of
from tunesmith.device import has_lean_allocator, keep_freed_memory, return_memory_at_once
from tunesmith.errors import UsageError, UserError
from tunesmith.files.bases import base_at
from tunesmith.files.names import known_shape, nearest_model, shape_of
from tunesmith.models.family import Config
from tunesmith.models.known import SIZES
from tunesmith.options.configs import AnyConfig
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.plan.memory import PARTS
from tunesmith.plan.planning import (
    Setting,
    as_options,
    candidates,
    effect,
    estimate_passes,
    fastest_that_fits,
    find_place,
    is_exact,
    make_setting,
    option_value,
    size_in_bytes,
)
from tunesmith.plan.probe import StepTime, probe_step
from tunesmith.plan.workload import Rows
from tunesmith.progress import span
from tunesmith.train.methods.table import method_of
from tunesmith.train.resolve import check_options

GAINS = {
    "train.activation_checkpointing": "activations are recomputed in backward",
    "train.batch_size": "fewer rows at a time; the gradient is the same sum",
    "train.optimizer_in_backward": "each gradient is freed as soon as it is used",
    "train.allocator": "freed memory is returned at once, and the heap has no holes",
    "train.weights": "matrices take two bytes per number, updated with stochastic rounding",
    "optimizer.name": "optimizer state takes one byte per number",
    "train.grad_clip": "needed by the update inside backward; clipping is lost",
}


def plan(options: Any) -> dict[str, Any]:
    """Print the plan of a training; returns what `--out` holds. options: of the class that `plan_options` makes.

    Raises: UserError if the options are wrong, the model's shape is not known without a download, or nothing fits.
    """
    keep_freed_memory()
    config, shape = _resolved(options)
    place = find_place(options.device)
    if not 0 < options.supervised <= 1 or options.text_tokens < 4:
        raise UsageError("--supervised is a share of tokens, more than 0 and at most 1, and --text_tokens at least 4")
    if config.train.allocator == "lean" and not place.cpu:
        raise UsageError(f"--train.allocator lean is for a CPU's memory, not for {place.name}: leave it out")
    if config.train.allocator == "lean" and not has_lean_allocator():
        raise UsageError(
            "--train.allocator lean needs glibc's allocator, which cannot be configured here: leave the option out"
        )
    asked = make_setting(config, shape, Rows(options.text_tokens, options.supervised), place, {})
    chosen, reasons = asked, []
    if options.fit is not None:
        room = place.memory if options.fit == "device" else size_in_bytes(options.fit)
        every = candidates(asked, inexact=options.fit_inexact)
        fitting = fastest_that_fits(every, room)
        if fitting is None:
            raise UserError(_nothing_fits(asked, every, room))
        chosen, reasons = fitting, _reasons(asked, fitting, every, room)
    if chosen.config.train.allocator == "lean":
        return_memory_at_once()
    time = None if place.card else probe_step(chosen.config, shape, chosen.rows)
    record = _record(asked, chosen, time)
    for line in [_header(chosen), *_memory_lines(chosen), *_time_lines(chosen, record), *reasons]:
        print(line)
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _resolved(options: Any) -> tuple[AnyConfig, Config]:
    """The training's configuration, checked, and the shape of its model."""
    method = method_of(options)
    if method.new_shape:
        _shape(options.model.name)
        config, shape = method.new_shape(options)
        check_options(config, [p for p in method.check(config) if not p.startswith("--data.name")])  # no data is read
        return config, dataclasses.replace(shape, vocab_size=_vocabulary(config, shape))
    check_options(options, method.check(options))
    with base_at(options.model.base):
        return options, _shape(options.model.name)


def _vocabulary(config: PretrainConfig, shape: Config) -> int:
    """Tokens of a new tokenizer, or of the one that is named, where its model's shape tells them."""
    if config.tokenizer.vocab_size:
        return config.tokenizer.vocab_size
    named = known_shape(config.tokenizer.name)
    return named.vocab_size if named else shape.vocab_size


def _shape(name: str) -> Config:
    """The shape of a MODEL, without a download. Raises: UserError saying what is wrong with it."""
    if (shape := known_shape(name)) is not None:
        return shape
    if Path(name.rpartition("@")[0] or name).expanduser().exists():
        return shape_of(name)  # which says why it is not known
    raise UserError(
        f"the shape of {name} is not known without a download; name a directory that holds it, or its size: "
        f"{', '.join(SIZES)}{nearest_model(name)}"
    )


# ---- time ------------------------------------------------------------------------------------------------------------


def _record(asked: Setting, s: Setting, time: StepTime | None) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, and where each is from."""
    t, m = s.config.train, s.memory
    seconds = time.step(t.accumulate) if time else s.estimate
    tokens, steps = s.work.tokens * t.accumulate, t.steps or 1000
    forward = (time.micro_batch if time else seconds / t.accumulate) / 3
    return {
        "command": s.method.command,
        "model": s.config.model.name,
        "device": s.place.name,
        "precision": t.precision,
        "changes": dict(s.changes),
        "exact": is_exact(s.changes),
        "memory": {
            **{part: getattr(m, part) for part in PARTS},
            "counted_peak": m.peak,
            "moment": m.moment,
            "moments": dict(m.moments),
            "peak": round(s.peak),
            "base": round(s.place.base),
            "total": round(s.total),
        },
        "asked_total": round(asked.total),
        "memory_source": "counted",
        "tokens_per_step": tokens,
        "seconds_per_step": seconds,
        "tokens_per_s": tokens / seconds,
        "steps": t.steps,
        "training_seconds": steps * seconds,
        "estimates_seconds": estimate_passes(s.config, steps) * forward,
        "time_source": "probed here" if time else "estimated from the data sheet, not measured",
        "text_tokens": s.rows.text_tokens,
        "supervised": s.rows.supervised,
    }


def _time_lines(s: Setting, record: dict[str, Any]) -> list[str]:
    steps, source = record["steps"], record["time_source"]
    count = f"{steps:,} steps" if steps else "1,000 steps (the length of an epoch depends on the data)"
    whole = record["training_seconds"] + record["estimates_seconds"]
    lines = [
        f"time                    {source}",
        f"  tokens per step       {record['tokens_per_step']:,}, of them {s.rows.supervised:.0%} with loss, "
        f"in texts of {s.rows.text_tokens:,} (--supervised, --text_tokens)",
        f"  seconds per step      {record['seconds_per_step']:.3f}",
        f"  tokens/s              {record['tokens_per_s']:,.0f}",
        f"  {count}: {span(record['training_seconds'])}, with the loss estimates {span(whole)}",
    ]
    if ahead := s.method.step_work(s.config).ahead:
        lines.append(f"  plus {ahead}")
    if s.place.card:
        lines.append(
            f"  assumed: matrix products reach 45 % of the {s.place.card.title}'s dense peak, the rest 70 % of its bandwidth"
        )
    return lines


# ---- memory ----------------------------------------------------------------------------------------------------------


def _header(s: Setting) -> str:
    rank = f"LoRA rank {s.work.rank}" if s.work.rank else "all weights"
    where = s.place.card.title if s.place.card else s.place.name
    return (
        f"{s.method.command} of {s.config.model.name} ({s.shape.depth} blocks, width {s.shape.width}), {rank}, "
        f"{s.config.optimizer.name}, {s.config.train.precision}, on {where}"
    )


def _memory_lines(s: Setting) -> list[str]:
    m = s.memory
    names = {"optimizer": "optimizer state"}
    lines = ["memory                  calculated; not all of it is in use at once"]
    lines += [f"  {names.get(part, part):<20}  {_gb(getattr(m, part))}" for part in PARTS]
    lines.append(f"  {'peak':<20}  {_gb(m.peak)}, at {m.moment}")
    if s.place.cpu:
        lines.append(
            f"  {'process at the peak':<20}  {_gb(s.total)}: {_gb(s.place.base)} for Python and torch, {_gb(s.peak - m.peak)} for "
            f"libraries{'' if s.config.train.allocator == 'lean' else ' and holes in the heap'}"
        )
    else:
        lines.append(f"  {'process at the peak':<20}  {_gb(s.total)}: {_gb(s.place.base)} assumed for the CUDA context")
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.2f} MB"


# ---- what fits -------------------------------------------------------------------------------------------------------


def _reasons(asked: Setting, chosen: Setting, every: Sequence[Setting], room: float) -> list[str]:
    """What was changed and why, and what did not fit."""
    lines = [f"fits in {_gb(room)} with {_gb(room - chosen.total)} to spare"]
    if not chosen.changes:
        return [*lines, "  as it is: nothing needs to change"]
    over = (
        f"{_gb(asked.total - room)} too much" if asked.total > room else "which fits too but is estimated to be slower"
    )
    lines[0] += f"; as configured it would need {_gb(asked.total)}, {over}"
    lines.append(f"  add: {as_options(chosen.changes)}")
    gains = GAINS | {option: gain for option, (_, gain) in asked.method.cheaper(asked.config).items()}
    for name, value in chosen.changes.items():
        if name in ("train.accumulate", "train.grad_clip") and name != list(chosen.changes)[-1]:
            continue
        saved, cost = effect(asked, name, value)
        inexact = "" if is_exact({name: value}) else "; not exact"
        lines.append(
            f"  {name} {option_value(value)}: {gains[name]}; by itself saves {_gb(saved)}, about {cost:+.0%} time{inexact}"
        )
    faster = sorted((s for s in every if s.total > room and s.estimate < chosen.estimate), key=lambda s: s.estimate)
    for s in faster[:4]:
        lines.append(f"  faster but {_gb(s.total - room)} too large: {as_options(s.changes) or 'as configured'}")
    return lines


def _nothing_fits(asked: Setting, every: Sequence[Setting], room: float) -> str:
    """Why nothing fits, and what would: changes of the training itself, that only the user can decide."""
    least, ways = min(every, key=lambda s: s.total), dict[str, Setting]()

    def leaner(option: str, value: int) -> None:
        changes = {**least.changes, option: value}
        ways[f"--{option} {value}"] = make_setting(asked.config, asked.shape, asked.rows, asked.place, changes)

    if not asked.work.rank and not asked.method.new_model:
        leaner("lora.rank", 8)
    if (half := block_size_of(asked.config.data) // 2) >= 64:
        leaner("data.block_size", half)
    if all(is_exact(s.changes) for s in every):
        s = min(candidates(asked, inexact=True), key=lambda s: s.total)
        ways[f"--fit_inexact true ({as_options(s.changes)})"] = s
    ideas = (f"{way} needs {_gb(s.total)}{'' if s.total <= room else ', also too much'}" for way, s in ways.items())
    return (
        f"--fit: nothing fits in {_gb(room)}; the leanest ({as_options(least.changes) or 'as configured'}) needs {_gb(least.total)}, "
        f"{_gb(least.total - room)} too much. {'; '.join(ideas)}"
    )
