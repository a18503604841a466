"""A run's directory: config, environment, metrics, status, TensorBoard events; its writer and its reader. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UserError, path_meant
from tunesmith.jsontext import parse_json

STEP_NAME = re.compile(r"step-(\d{8})")
DRAWS = 2
"""How a run draws its rows: `draws` in its inputs.json. Without the entry (1), the training loss was estimated on the rows that
are trained on first, and a step could take rows of two epochs."""


def step_name(step: int) -> str:
    """`step-00001000`: the name of a step's checkpoint and answers."""
    return f"step-{step:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one go: a reader sees the old text or the new, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Run:
    """A run directory, for reading: what a training function returns and what the report is made from.

    >>> run = Run("runs/demo")  # doctest: +SKIP
    >>> run.status["state"], run.best_checkpoint()  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration. Raises: UserError if config.yaml is missing or damaged."""
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no configuration of a run: there is no {path.name}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); repeat the run") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} is damaged: it holds no options; repeat the run")
        return config

    @property
    def status(self) -> dict[str, Any]:
        """`{"state": "running|finished|stopped|diverged|failed", "step": ..., "reason": ..., "best_step": ...}`."""
        path = self.path / "status.json"
        try:
            status = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(status, dict) or not {"state", "step"} <= status.keys():
                raise ValueError("it lacks a state or a step")
            return status
        except FileNotFoundError:
            near = "" if self.path.exists() else path_meant(self.path, is_run)
            raise UserError(f"{self.path} is not a run directory: it has no status.json{near}") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); name a checkpoint of the run by its directory") from None

    @property
    def inputs(self) -> dict[str, Any] | None:
        """Fingerprints of the run's inputs (`train.resuming.inputs_of`); None if none were recorded.

        Raises: UserError if inputs.json is damaged.
        """
        path = self.path / "inputs.json"
        try:
            inputs = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}); put it back, or start a new run with another --out"
            ) from None
        if not isinstance(inputs, dict):
            raise UserError(
                f"{path} is damaged: it names no inputs; put it back, or start a new run with another --out"
            )
        return inputs

    @property
    def draws(self) -> int:
        """How its rows are drawn (DRAWS); of a run that two versions made, the earlier way."""
        try:
            return int((self.inputs or {}).get("draws", 1))
        except (UserError, OSError, TypeError, ValueError):
            return 1

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, or those of one event: train, eval, ...

        A last line cut off while being written is left out. Raises: UserError for an earlier damaged line.
        """
        path, found = self.path / "metrics.jsonl", []
        with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    record = _log_line(line, f"{path} line {number}")
                    if event is None or record["event"] == event:
                        found.append(record)
        return found

    def losses(self, step: int) -> list[tuple[float, int]]:
        """The validation loss at a step batch by batch, (summed loss, count); empty if it was not kept or is damaged."""
        try:
            stored = parse_json((self.path / "losses" / f"{step_name(step)}.json").read_text(encoding="utf-8"))
            return [(float(nats), int(count)) for nats, count in stored]
        except (OSError, ValueError, TypeError):
            return []

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of the complete checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((int(m[1]), p) for p in found if (m := STEP_NAME.fullmatch(p.name)))

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step. Raises: UserError listing the available steps."""
        for found, path in self.checkpoints():
            if found == step:
                return path
        steps = ", ".join(str(found) for found, _ in self.checkpoints()) or "none"
        raise UserError(f"{self.path} has no checkpoint of step {step}; it has: {steps}")

    @property
    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        command = (self.inputs or {}).get("command", "COMMAND")
        return f"tunesmith {command} --out {shlex.quote(str(self.path))} --resume"

    def best_checkpoint(self) -> Path:
        """The checkpoint with the lowest validation loss; the last checkpoint if none was estimated."""
        best = self.status.get("best_step")
        found = dict(self.checkpoints())
        if not found:
            raise UserError(f"{self.path} has no checkpoint yet (its state is {self.status['state']!r})")
        return found[best if best in found else max(found)]


def is_run(path: Path) -> bool:
    return (path / "status.json").exists()


def _log_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); delete that line, or repeat the run") from None
    if not isinstance(record, dict) or "event" not in record:
        raise UserError(f"{where} is not an event of a run; delete that line, or repeat the run")
    return record


AFTER_SAVING = ("changed", "diverged")
"""Events that are logged when the checkpoint of their step has been written: where a run goes on from it they are logged again."""


NEEDED = {"train": {"loss"}, "eval": {"validation_loss"}}  # without these a line of the event is damaged


def _up_to(lines: Sequence[str], step: int | None) -> tuple[list[int], list[int]]:
    """Which lines of a log belong to a run as it was at the checkpoint of a step, and the numbers of the damaged ones among them."""
    kept, damaged = [], []
    for number, line in enumerate(lines):
        try:
            record = _log_line(line, "")
            at = record["step"]
            if type(at) is not int or not NEEDED.get(record["event"], set()) <= record.keys():
                raise KeyError
            if line.endswith("\n") and (at, record["event"] in AFTER_SAVING) <= (-1 if step is None else step, False):
                kept.append(number)
        except (UserError, KeyError, TypeError):
            damaged.append(number + 1)
    return kept, [n for n in damaged if kept and n <= kept[-1]]  # those behind it are dropped anyway


def _some(numbers: Sequence[int]) -> str:
    """`3, 4, 7`, of many only the first few."""
    return ", ".join(f"{n:,}" for n in numbers[:5]) + (f" and {len(numbers) - 5:,} more" if numbers[5:] else "")


class RunLog:
    """The writer of a run directory. `metrics.jsonl` is flushed line by line."""

    def __init__(self, path: Path) -> None:
        from tensorboardX.record_writer import RecordWriter

        self.run = Run(path)
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "tensorboard").mkdir(exist_ok=True)
        self._goes_on = any((path / "tensorboard").iterdir())
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        # Not SummaryWriter: on a full disk its thread dies with a traceback, and its full queue then blocks for ever.
        self._board = RecordWriter(str(path / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"))
        self._board_event(file_version="brain.Event:2")

    def write_config(self, config: dict[str, Any]) -> None:
        """Store the resolved configuration, from which the run can be repeated."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_inputs(self, inputs: dict[str, Any]) -> None:
        """Store what the run is made from, by content, so that a resumed run can tell whether it is still that."""
        write_atomically(self.path / "inputs.json", json.dumps(inputs, indent=2) + "\n")

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Store the versions and the hardware that the run is made with; of a resumed run, the last ones."""
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def record(self, event: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and its numbers to TensorBoard. A number that is not finite becomes null."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        line = {"event": event, "step": step, "time": round(time.time(), 3), **clean}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        from tensorboardX.summary import scalar

        for key, value in clean.items():
            if isinstance(value, int | float) and event != "changed":  # an option is no curve
                self._board_event(step=step, summary=scalar(f"{event}/{key}", value))
        if event != "train":
            self._board.flush()

    def _board_event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def keep_losses(self, step: int, parts: Sequence[tuple[float, int]]) -> None:
        """Store an estimate's validation loss batch by batch, so that two steps can be compared on the same batches."""
        if parts:
            (self.path / "losses").mkdir(exist_ok=True)
            write_atomically(self.path / "losses" / f"{step_name(step)}.json", json.dumps(parts) + "\n")

    def rewind(self, step: int | None) -> list[str]:
        """Drop what was logged after the checkpoint of a step (None: everything); those steps are logged again.

        It goes by the steps of the lines, not by their place in the file, which another line may have lost its own.
        Returns: a sentence for each thing that is missing from what stays.
        """
        path = self.path / "metrics.jsonl"
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            lines = list(file)
        kept, damaged = _up_to(lines, step)
        if len(kept) < len(lines):
            self._metrics.close()
            write_atomically(path, "".join(lines[i] for i in kept))
            self._metrics = path.open("a", encoding="utf-8")
        if self._goes_on:  # TensorBoard then forgets what it has of these steps
            from tensorboardX.proto.event_pb2 import SessionLog

            self._board_event(step=0 if step is None else step + 1, session_log=SessionLog(status=SessionLog.START))
        taken = {record["step"] for i in kept if (record := parse_json(lines[i]))["event"] == "train"}
        missing = [n for n in range(1, (step or 0) + 1) if n not in taken]
        return [f"{path}: damaged, taken out: line {_some(damaged)}"] * bool(damaged) + [
            f"{path}: there is no line of training step {_some(missing)}"
        ] * bool(missing)

    def status(self, state: str, step: int, reason: str = "", **more: Any) -> None:
        """Replace status.json."""
        record = {"state": state, "step": step, "reason": reason, **more}
        write_atomically(self.path / "status.json", json.dumps(record, indent=2) + "\n")

    def ended_at_once(self, by: str) -> str:
        """Leave in status.json that the process was ended in the middle of a step; returns how the run goes on."""
        status = self.run.status  # its step is that of the last checkpoint
        way_on = f"go on from its last checkpoint with: {self.run.resume_command}"
        write_atomically(
            self.path / "status.json",
            json.dumps({**status, "state": "stopped", "reason": f"ended at once by {by}; {way_on}"}, indent=2) + "\n",
        )
        return f"; {way_on}"

    def close(self) -> None:
        """Flush and close the files. Raises: OSError (disk full)."""
        try:
            self._metrics.close()
        finally:
            self._board.close()


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[RunLog]:
    """A RunLog that is closed at the end."""
    log = RunLog(path)
    try:
        yield log
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            log.close()
        raise
    log.close()
