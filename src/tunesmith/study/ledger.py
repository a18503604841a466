"""How far a study has come: progress.json, and what the run directories themselves say. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.files.run import Run, write_atomically
from tunesmith.jsontext import json_object
from tunesmith.study.matrix import Plan, PlannedRun, directory_of

STAMP = "study.json"  # in a run's directory: which run of which study it is, and its hash
DONE = ("finished", "diverged")  # a diverged run is a result


class Ledger:
    """The state of every run, kept in progress.json. A run counts as done when its own directory says so, under its hash."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        self.file = out / "progress.json"
        before = self._read()
        self.runs: dict[str, dict[str, Any]] = {}
        for name, run in plan.runs.items():
            old = before.get(name, {}) if stamped(out, name) == run.hash else {}
            state, directory = state_of(out, run), out / directory_of(name)
            if stamped(out, name) != run.hash and state in DONE:
                directory = moved_aside(out, name, run.hash)
            seconds = float(old.get("seconds", 0.0))
            if old.get("state") == "running":  # cut off: what it did until its last sign of life counts
                seconds += max(0.0, _last_sign(directory) - old["started"])
            reason = str(Run(directory).status.get("reason", "")) if state == "diverged" else ""
            self.runs[name] = {"state": state, "reason": reason, "started": old.get("started", 0.0), "seconds": seconds}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            runs = json_object(self.file)["runs"]
        except (FileNotFoundError, ValueError, KeyError):  # the times are lost, nothing else
            return {}
        return runs if isinstance(runs, dict) else {}

    def save(self) -> None:
        """Write progress.json."""
        record = {"runs": self.runs, "choices": choices(self.plan, self.out, self)}
        write_atomically(self.file, json.dumps(record, indent=1) + "\n")

    def state(self, name: str) -> str:
        """The state of a run."""
        return str(self.runs[name]["state"])

    def started(self, name: str) -> None:
        """The run's process has begun."""
        self.runs[name] |= {"state": "running", "reason": "", "started": round(time.time(), 3)}
        self.save()

    def ended(self, name: str, state: str, reason: str = "") -> None:
        """The run's process has ended."""
        entry = self.runs[name]
        spent = entry["seconds"] + time.time() - entry["started"]
        entry |= {"state": state, "reason": reason, "seconds": round(spent, 3)}
        self.save()

    def blocked(self) -> None:
        """Tell the runs that wait for one that will not finish why they do not begin."""
        for name, run in self.plan.runs.items():
            lost = [
                n
                for n in run.needs
                if self.state(n) in ("failed", "diverged") or self.runs[n]["reason"].startswith("needs ")
            ]
            if self.state(name) == "waiting" and lost:
                what = {n: "did not run" if self.state(n) == "waiting" else self.state(n) for n in lost}
                self.runs[name]["reason"] = "; ".join(f"needs {n}, which {w}" for n, w in what.items())

    def ready(self, wanted: Sequence[str]) -> list[str]:
        """Waiting runs whose needs have finished, in the plan's order."""
        return [
            name
            for name in wanted
            if self.state(name) == "waiting" and all(self.state(n) == "finished" for n in self.plan.runs[name].needs)
        ]

    def count(self, names: Sequence[str], *states: str) -> int:
        """How many of some runs are in one of these states."""
        return sum(self.state(name) in states for name in names)


def stamped(out: Path, name: str) -> str | None:
    """The hash of the run that lies in the directory of a name; None where there is none."""
    try:
        return str(json_object(out / directory_of(name) / STAMP)["hash"])
    except (OSError, ValueError, KeyError):
        return None


def moved_aside(out: Path, name: str, mark: str) -> Path:
    """Where the result of a run lies while the study's file asks for another configuration of it."""
    return out / "superseded" / f"{name}-{mark}"


def state_of(out: Path, run: PlannedRun) -> str:
    """`finished` or `diverged` if the run's directory says so and holds just this run, else `waiting`."""
    here, aside = out / directory_of(run.name), moved_aside(out, run.name, run.hash)
    if stamped(out, run.name) != run.hash and not aside.exists():
        return "waiting"
    with contextlib.suppress(UserError):
        state = Run(aside if aside.exists() else here).status["state"]
        if state in DONE:
            return str(state)
    return "waiting"


def _last_sign(directory: Path) -> float:
    times = [p.stat().st_mtime for p in (directory / "metrics.jsonl", directory / "status.json") if p.exists()]
    return max(times, default=0.0)


def choices(plan: Plan, out: Path, ledger: Ledger) -> dict[str, dict[str, str]]:
    """Experiment -> label -> the run of a learning-rate search with the lowest validation loss, once all of them are done.

    With several seeds the mean over the seeds decides and the first seed's run stands for it.
    """
    chosen: dict[str, dict[str, str]] = {}
    for id, by_label in plan.searches.items():
        for label, names in by_label.items():
            if all(ledger.state(name) in DONE for name in names):
                rates: dict[Any, list[str]] = {}
                for name in names:
                    rates.setdefault(plan.runs[name].settings["optimizer.lr"], []).append(name)
                best = min(rates.values(), key=lambda group: math.fsum(best_loss(out, n) for n in group) / len(group))
                chosen.setdefault(id, {})[label] = best[0]
    return chosen


def best_loss(out: Path, name: str) -> float:
    """The lowest validation loss of a run; infinite where it diverged."""
    status = Run(out / directory_of(name)).status
    loss = status.get("best_validation_loss")
    return math.inf if status["state"] == "diverged" or loss is None else float(loss)
