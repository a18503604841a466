"""`tunesmith study`: plan a study, show what it will take, run what is missing of it.

tunesmith study paper --scale smoke --dry_run
tunesmith study my-study.yaml --jobs 2
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tunesmith.errors import UsageError, UserError
from tunesmith.files.lock import one_writer
from tunesmith.files.run import write_atomically
from tunesmith.options.commands import StudyCommand
from tunesmith.options.configs import AnyConfig
from tunesmith.options.parse import from_settings, nearest
from tunesmith.progress import STOP, span
from tunesmith.study.definition import COMMANDS, read_study_file, study_path
from tunesmith.study.executors import Executor, Local, visible_gpus
from tunesmith.study.forecast import Forecast, RunWork, Seconds, forecasts_of, probe, times, work_of
from tunesmith.study.ledger import DONE, Ledger, choices
from tunesmith.study.matrix import Plan, make_plan, plan_record
from tunesmith.study.report import write_report
from tunesmith.study.runner import conduct
from tunesmith.study.view import View
from tunesmith.train.methods.table import METHODS
from tunesmith.train.resolve import check_options


def study(name: str, options: StudyCommand) -> Path:
    """Run a study, or with `dry_run` only show it; returns its directory.

    Raises: UsageError if the file or a setting is wrong; UserError at the end if a run failed, naming which and why;
        Interrupted if it was interrupted, when all runs have stopped.
    """
    places = {f"data.{k}": v for k, v in vars(options.data).items() if v is not None}
    plan = make_plan(read_study_file(study_path(name), options.scale, batching=options.batching), places)
    configs = check_runs(plan)
    wanted = select(plan, options.only)
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}, expected at least 1")
    out = Path(options.out or default_directory(plan))
    forecasts = forecasts_of(plan, configs)
    works = {name: work_of(plan, run, forecasts[name]) for name, run in plan.runs.items()}
    if options.dry_run:
        show(plan, out, wanted, forecasts, works)
        return out
    out.mkdir(parents=True, exist_ok=True)
    with one_writer(out, "study"), STOP.catching():
        write_plan(plan, out, forecasts)
        ledger = Ledger(plan, out)
        ledger.save()
        executor = make_executor(options)
        expected: dict[str, Seconds | None] = {}

        def look_ahead() -> None:
            expected.update(times(works, ledger))

        look_ahead()
        view = View(ledger, wanted, lambda: seconds_left(ledger, wanted, expected, executor.slots))
        scale = f" ({plan.study.scale})" if plan.study.scale else ""
        print(f"study {plan.study.name}{scale} in {out}: {view.summary()}", flush=True)
        with view:
            interrupted = conduct(plan, ledger, executor, view, wanted, look_ahead)
        tell(plan, ledger, wanted, interrupted)
        STOP.check()
    return out


def default_directory(plan: Plan) -> str:
    """`studies/NAME-SCALE`; without scales `studies/NAME`."""
    return f"studies/{plan.study.name}{f'-{plan.study.scale}' if plan.study.scale else ''}"


def check_runs(plan: Plan) -> dict[str, AnyConfig]:
    """The options of every run. Raises: UsageError with what the training commands would refuse before their first step."""
    problems: dict[str, str] = {}
    configs: dict[str, AnyConfig] = {}
    for name, run in plan.runs.items():
        config = from_settings(COMMANDS[run.command], run.settings, run.where)
        try:
            configs[name] = check_options(config, METHODS[run.command].check(config))
        except UsageError as error:
            problems.setdefault(f"{run.where}: {error}", name)
    if problems:
        raise UsageError("; ".join(f"{text} (run {name})" for text, name in problems.items()))
    return configs


def select(plan: Plan, only: str | None) -> list[str]:
    """The runs of some experiments, or some runs, and all that they need, in the plan's order. Raises: UsageError."""
    if only is None:
        return list(plan.runs)
    chosen: set[str] = set()
    for part in (p.strip() for p in only.split(",")):
        if part in plan.experiments:
            chosen |= {shown.run for shown in plan.experiments[part][1]}
        elif part in plan.runs:
            chosen.add(part)
        else:
            near = nearest(part, [*plan.experiments, *plan.runs]) or "."
            there = ", ".join(plan.experiments)
            raise UsageError(f"--only {part}: the study has no such experiment or run{near} Experiments: {there}")
    for name in reversed(list(plan.runs)):  # needs come before
        if name in chosen:
            chosen |= set(plan.runs[name].needs)
    return [name for name in plan.runs if name in chosen]


def write_plan(plan: Plan, out: Path, forecasts: Mapping[str, Forecast | None]) -> None:
    """study.yaml and plan.json, with the memory that is predicted for each run."""
    record = plan_record(plan)
    for name, forecast in forecasts.items():
        memory = forecast and forecast.memory
        record["runs"][name]["memory"] = dataclasses.asdict(memory) if memory else None
    write_atomically(out / "study.yaml", yaml.safe_dump(dict(plan.study.content), sort_keys=False))
    write_atomically(out / "plan.json", json.dumps(record, indent=1) + "\n")


def make_executor(options: StudyCommand) -> Executor:
    """Where the runs go. Raises: UserError if Ray is not there."""
    if options.executor == "local":
        return Local(options.jobs, visible_gpus())
    from tunesmith.study.on_ray import OnRay

    return OnRay(options.jobs, options.ray_address)


def seconds_left(
    ledger: Ledger, wanted: Sequence[str], expected: dict[str, Seconds | None], slots: int
) -> float | None:
    """What the runs that are not done will take together, shared by the slots; None while nothing tells."""
    left = 0.0
    for name in wanted:
        state, seconds = ledger.state(name), expected.get(name)
        if state in ("waiting", "running") and not ledger.runs[name]["reason"].startswith("needs "):
            if seconds is None:
                return None
            run = ledger.runs[name]
            spent = run["seconds"] + (time.time() - run["started"] if state == "running" else 0)
            left += max(0.0, seconds.value - spent)
    return left / slots


def tell(plan: Plan, ledger: Ledger, wanted: Sequence[str], interrupted: bool) -> None:
    """What came of the study. Raises: UserError if a run failed, or was stopped by somebody else than the study."""
    for id, by_label in choices(plan, ledger.out, ledger).items():
        for label, name in by_label.items():
            rate = plan.runs[name].settings["optimizer.lr"]
            print(f"{id}: of the learning rates of {label}, {rate:g} has the lowest validation loss")
    reasons = {name: ledger.runs[name]["reason"] for name in wanted}
    for name, reason in reasons.items():
        if reason and ledger.state(name) == "waiting":
            print(f"{name}: not started, {reason}")
    failed = [name for name in wanted if ledger.state(name) == "failed"]
    if failed:
        why = "; ".join(f"{name}: {reasons[name]}" for name in failed)
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed. {why}. The same command retries them")
    stopped = [name for name in wanted if ledger.state(name) == "stopped"]
    if stopped and not interrupted:
        raise UserError(f"{', '.join(stopped)}: stopped from outside; the same command continues")
    if ledger.count(wanted, *DONE) == len(wanted):
        spent = sum(ledger.runs[name]["seconds"] for name in wanted)
        print(f"all {len(wanted)} runs are done, {span(spent)} of computing")
        print(f"Report: {write_report([str(ledger.out)]).resolve()}")


# ---- dry run ---------------------------------------------------------------------------------------------------------


def show(
    plan: Plan,
    out: Path,
    wanted: Sequence[str],
    forecasts: Mapping[str, Forecast | None],
    works: Mapping[str, RunWork | None],
) -> None:
    """Print the matrix of runs with predicted memory and time."""
    ledger = Ledger(plan, out)
    missing = {n: w for n, w in works.items() if n in wanted}
    expected = times(works, ledger)
    if any(expected[n] is None and w is not None for n, w in missing.items()):
        expected = times(works, ledger, probe({n: forecasts[n] for n in missing}))
    shown_as: dict[str, list[str]] = {}
    for id, (_, shown) in plan.experiments.items():
        for one in shown:
            shown_as.setdefault(one.run, []).append(f"{id} {one.label}")
    rows = [("run", "command", "shown as", "needs", "state", "memory", "time")]
    largest, total, unknown, sources = 0, 0.0, 0, dict[str, None]()
    for name in wanted:
        run, forecast, seconds, state = plan.runs[name], forecasts[name], expected[name], ledger.state(name)
        memory = forecast and forecast.memory
        takes = f"{memory.peak / 1e9:.2f} GB" if memory else "?", span(seconds.value) if seconds else "?"
        rows.append((name, run.command, "; ".join(shown_as.get(name, [])), ", ".join(run.needs), state, *takes))
        largest = max(largest, memory.peak if memory else 0)
        if seconds is None:
            unknown += 1
        elif state == "waiting":
            total += seconds.value
            sources[seconds.source] = None
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.rjust(w) if i > 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())
    waiting = ledger.count(wanted, "waiting")
    print(f"{len(wanted)} runs, {len(wanted) - waiting} of them done; output goes to {out}")
    print(
        f"memory: parameters, gradients, optimizer state, activations and logits, calculated; at most {largest / 1e9:.2f} GB. "
        "The program itself comes on top, and with eval.reward also the reward model and the answers"
    )
    not_known = f"; {unknown} not known (they depend on the data)" if unknown else ""
    where = f", {', '.join(sources)}; answers and small data not counted" if sources else ""
    print(f"time: {span(total)} for the missing runs, one after the other{where}{not_known}")
