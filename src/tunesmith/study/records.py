"""A study's directory to records: plan.json, progress.json and the run directories. Damage becomes a note, never a gap.

Every number keeps the run and the line of metrics.jsonl that it comes from. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.files.run import Run, noted
from tunesmith.jsontext import Json, is_number, json_object

KEPT = 2000  # training lines of a run that a figure needs; of longer runs every n-th is kept
OVER = ("finished", "diverged", "failed", "stopped")


@dataclass(frozen=True)
class Point:
    """A logged number: optimizer step, value, and the run and 1-based line of its metrics.jsonl."""

    step: int
    value: float
    run: str
    line: int


Series = list[Point]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. `lines`: records by event, each with its `line`; `damage`: what could not be read."""

    name: str
    directory: Path
    state: str
    reason: str
    plan: Json
    config: Json
    status: Json
    environment: Json
    lines: Mapping[str, Sequence[Json]]
    peak: Point | None
    minutes: Point | None
    answers: Mapping[int, Sequence[Json]]
    damage: tuple[str, ...]

    def series(self, event: str, key: str) -> Series:
        """The finite values of one figure, in order of the log."""
        return [
            Point(r["step"], float(r[key]), self.name, r["line"])
            for r in self.lines.get(event, ())
            if is_number(r.get(key))
        ]

    @property
    def pairs(self) -> Json:
        """What it logged of its pairs; empty for a run without any."""
        return next(iter(self.lines.get("pairs", ())), {})

    @property
    def trained_weights(self) -> int | None:
        """How many weights the run trained, as its last checkpoint has them; None without one."""
        return Run(self.directory).trained_weights(adapter=bool((self.config.get("lora") or {}).get("rank")))

    def parts(self, step: int) -> list[tuple[float, int]]:
        """The validation loss at a step batch by batch, (summed loss, count); empty where it was not kept."""
        return Run(self.directory).losses(step)

    @property
    def trouble(self) -> str:
        """Why this run is not, or not wholly, in a figure; empty for a finished one."""
        if self.state == "finished":
            return ""
        words = {"waiting": "not run yet", "missing": "its directory is missing", "running": "still running"}
        at = f" at step {self.status['step']:,}" if is_number(self.status.get("step")) and self.state in OVER else ""
        return f"{words.get(self.state, self.state)}{at}{': ' + self.reason if self.reason else ''}"


@dataclass(frozen=True)
class Member:
    """A run as a part of an experiment."""

    label: str
    seed: int
    run: RunRecord


@dataclass(frozen=True)
class Line:
    """A line of a figure: the same quantity of the runs with one label, by seed.

    partial: seeds whose run did not finish. missing: what is to be said of those, and of seeds without any value.
    signed: whether its values may be below 0.
    """

    label: str
    seeds: Mapping[int, Series]
    partial: frozenset[int] = frozenset()
    missing: tuple[str, ...] = ()
    signed: bool = True


@dataclass(frozen=True)
class Experiment:
    """The runs of one experiment; `labels` in the order of the plan."""

    id: str
    title: str
    members: tuple[Member, ...]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(m.label for m in self.members))

    def runs(self, label: str) -> dict[int, RunRecord]:
        """Seed -> run."""
        return {m.seed: m.run for m in self.members if m.label == label}

    def line(self, label: str, event: str, key: str) -> Line:
        """The line of one label."""
        seeds, partial, missing = {}, set(), []
        for seed, run in self.runs(label).items():
            if points := run.series(event, key):
                seeds[seed] = points
            if run.trouble:
                partial.add(seed)
            if run.trouble or not points:
                words = run.trouble or f"no {event} line with {key}"
                missing.append(f"{label}, seed {seed} ({run.name}): {words}")
        signed = is_signed(key, [run.config for run in self.runs(label).values()])
        return Line(label, seeds, frozenset(partial), tuple(missing), signed)


@dataclass(frozen=True)
class Study:
    """A study: experiments in the order of the plan, and every run by name."""

    path: Path
    name: str
    title: str
    scale: str
    experiments: Mapping[str, Experiment]
    runs: Mapping[str, RunRecord]
    figures: tuple[str, ...]
    tables: tuple[str, ...]

    def experiment(self, name: str) -> Experiment:
        """The experiment, without members where the study has none of that name."""
        return self.experiments.get(name, Experiment(name, name, ()))


def is_signed(key: str, configs: Iterable[Json] = ()) -> bool:
    """Whether a logged figure may be below 0; a loss may not, except DPO's robust one, which subtracts that of flipped pairs."""
    robust = any((config.get("dpo") or {}).get("loss") == "robust" for config in configs)
    return not key.endswith("loss") or (robust and not key.endswith("sft_loss"))


def last_step(run: RunRecord) -> int:
    """The last step that a run has logged."""
    return max((r["step"] for records in run.lines.values() for r in records), default=0)


def shift_of(first: RunRecord, second: RunRecord) -> int:
    """What to add to the steps of a continuation of `first`: 0 where it counts on, or repeats the lines of `first`.

    One that counts from 0 again shows by a step-0 loss that differs, or by a count that never passes the end of `first`.
    """
    losses = [run.series("eval", "validation_loss") for run in (first, second)]
    one, other = (next((p.value for p in series if p.step == 0), None) for series in losses)
    anew = (other is not None and one != other) or last_step(second) <= last_step(first)
    return last_step(first) if anew else 0


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_study(path: str | Path) -> bool:
    return (Path(path) / "plan.json").exists()


def read_study(path: str | Path) -> Study:
    """Read a study's directory. Raises: UserError if the plan is damaged or names a run that it does not describe."""
    root = Path(path)
    plan = _plan(root / "plan.json")
    progress = _json(root / "progress.json").get("runs", {}) if (root / "progress.json").exists() else {}
    runs = {name: _read_run(root, name, entry, progress.get(name, {})) for name, entry in plan["runs"].items()}
    experiments = {
        key: Experiment(key, entry.get("title", key), tuple(_members(entry["runs"], runs)))
        for key, entry in plan["experiments"].items()
    }
    name, scale = plan.get("name", root.name), plan.get("scale") or ""
    figures, tables = (tuple(plan.get(kind, ())) for kind in ("figures", "tables"))
    return Study(root, name, plan.get("title") or name, scale, experiments, runs, figures, tables)


def _members(entries: Sequence[Json], runs: Mapping[str, RunRecord]) -> Iterator[Member]:
    """The runs of an experiment; of two with one label and seed, the second gets its name into the label."""
    seen: set[tuple[str, int]] = set()
    for entry in entries:
        label, seed, name = entry["label"], entry["seed"], entry["run"]
        label = f"{label} ({name})" if (label, seed) in seen else label
        seen.add((label, seed))
        yield Member(label, seed, runs[name])


def _plan(path: Path) -> Json:
    plan = _json(path)
    again = "write it again with `tunesmith study`"
    try:
        for key, entry in plan["experiments"].items():
            for member in entry["runs"]:
                _ = member["label"], member["seed"]
                if member["run"] not in plan["runs"]:
                    raise UserError(
                        f"{path}: experiment {key} names run {member['run']!r}, which `runs` lacks; {again}"
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a study's plan ({type(error).__name__}: {error}); {again}") from None
    return plan


def _json(path: Path) -> Json:
    try:
        return json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the study again, finished runs are skipped") from None


def _read_run(root: Path, name: str, entry: Json, progress: Json) -> RunRecord:
    run, damage = Run(root / entry.get("directory", f"runs/{name}")), list[str]()

    def stored(file: str) -> Json:
        try:
            return run.stored(file) or {}
        except ValueError as error:
            damage.append(f"{file} is damaged ({error})")
            return {}

    status, config, environment = stored("status.json"), stored("config.yaml"), stored("environment.json")
    log = read_log(run, name)
    damage += log.damage
    if status and not any(log.lines.values()):
        damage.append("metrics.jsonl is empty")
    answers = run.answers(damage)
    state = _state(run.path, status, progress)
    faults = tuple(damage)
    return RunRecord(
        name, run.path, *state, entry, config, status, environment, log.lines, log.peak, log.minutes, answers, faults
    )


def _state(where: Path, status: Json, progress: Json) -> tuple[str, str]:
    """How the run stands: what the runner says of an unhappy end, else what the run says, else what the runner says."""
    of_runner, own = progress.get("state"), status.get("state")
    if of_runner in ("failed", "diverged", "stopped"):
        return of_runner, progress.get("reason") or status.get("reason", "")
    if own in OVER:
        return str(own), status.get("reason", "")
    if of_runner == "finished" and not where.is_dir():
        return "missing", ""
    return str(of_runner or own or ("waiting" if not where.is_dir() else "missing")), ""


@dataclass(frozen=True)
class Log:
    """A run's metrics.jsonl: records by event, the largest memory, the minutes spent in training steps, unreadable lines."""

    lines: Mapping[str, Sequence[Json]]
    peak: Point | None
    minutes: Point | None
    damage: tuple[str, ...]


def read_log(run: Run, name: str) -> Log:
    """The log of a run that is called `name`, as its points say. Of many training lines every n-th is kept, and those that matter."""
    lines: dict[str, list[Json]] = {}
    damage: list[str] = []
    peak, seconds = None, 0.0
    before: float | None = None
    for number, record in run.events(noted("metrics.jsonl", damage)):
        lines.setdefault(record["event"], []).append(record | {"line": number})
        if is_number(gb := record.get("peak_memory_gb")) and (peak is None or gb > peak.value):
            peak = Point(record["step"], gb, name, number)
        rate, tokens = record.get("tokens_per_s"), record.get("tokens")
        if is_number(rate) and is_number(tokens) and rate and tokens:
            since = 0 if record["step"] == 1 else before  # a continued run's first line counts the tokens of both
            seconds, before = seconds + (0.0 if since is None else (tokens - since) / rate), tokens
    train = lines.get("train", [])
    spent = Point(train[-1]["step"], seconds / 60, name, train[-1]["line"]) if train and seconds else None
    if len(train) > KEPT:
        every = -(-len(train) // KEPT)
        lines["train"] = [
            r for i, r in enumerate(train) if not i % every or r is train[-1] or (peak and r["line"] == peak.line)
        ]
    return Log(lines, peak, spent, tuple(damage))
