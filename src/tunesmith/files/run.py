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
from tunesmith.jsontext import CUT_OFF, Bad, Json, is_number, json_lines, json_object, parse_json

STEP_NAME = re.compile(r"step-(\d{8})")
LAST_LINE = 4096  # bytes; no line of metrics.jsonl is longer
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

    def stored(self, file: str) -> Json | None:
        """What config.yaml, status.json, inputs.json or environment.json holds; None where there is no such file.

        Raises: ValueError saying what is wrong with it.
        """
        path = self.path / file
        try:
            if path.suffix == ".json":
                return json_object(path)
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            return None
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None
        if not isinstance(content, dict):
            raise ValueError("it holds no options")
        return content

    @property
    def config(self) -> Json:
        """The resolved configuration. Raises: UserError if config.yaml is missing or damaged."""
        try:
            config = self.stored("config.yaml")
        except ValueError as error:
            raise UserError(f"{self.path / 'config.yaml'} is damaged ({error}); repeat the run") from None
        if config is None:
            raise UserError(f"{self.path} holds no configuration of a run: there is no config.yaml")
        return config

    @property
    def status(self) -> Json:
        """`{"state": "running|finished|stopped|diverged|failed", "step": ..., "reason": ..., "best_step": ...}`."""
        try:
            status = self.stored("status.json")
            if status is not None and not {"state", "step"} <= status.keys():
                raise ValueError("it lacks a state or a step")
        except ValueError as error:
            way = "name a checkpoint of the run by its directory"
            raise UserError(f"{self.path / 'status.json'} is damaged ({error}); {way}") from None
        if status is None:
            near = "" if self.path.exists() else path_meant(self.path, is_run)
            raise UserError(f"{self.path} is not a run directory: it has no status.json{near}")
        return status

    @property
    def inputs(self) -> Json | None:
        """Fingerprints of the run's inputs (`train.resuming.inputs_of`); None if none were recorded.

        Raises: UserError if inputs.json is damaged.
        """
        try:
            return self.stored("inputs.json")
        except ValueError as error:
            way = "put it back, or start a new run with another --out"
            raise UserError(f"{self.path / 'inputs.json'} is damaged ({error}); {way}") from None

    @property
    def draws(self) -> int:
        """How its rows are drawn (DRAWS); of a run that two versions made, the earlier way."""
        try:
            return int((self.inputs or {}).get("draws", 1))
        except (UserError, OSError, TypeError, ValueError):
            return 1

    def events(self, bad: Bad) -> Iterator[tuple[int, Json]]:
        """(line number, event) of every readable line of metrics.jsonl. bad: hears of the others, as in `json_lines`."""
        with contextlib.suppress(FileNotFoundError):
            for number, record in json_lines(self.path / "metrics.jsonl", bad):
                if isinstance(record.get("event"), str) and is_number(record.get("step")):
                    yield number, record
                else:
                    bad(number, "it has no event or no step")

    def metrics(self, event: str | None = None) -> list[Json]:
        """The lines of metrics.jsonl in order, or those of one event: train, eval, ...

        A last line cut off while being written is left out. Raises: UserError for an earlier damaged line.
        """

        def refuse(number: int, why: str) -> None:
            if why != CUT_OFF:
                where = f"{self.path / 'metrics.jsonl'} line {number}"
                raise UserError(f"{where} is damaged ({why}); delete that line, or repeat the run") from None

        return [record for _, record in self.events(refuse) if event in (None, record["event"])]

    def position(self) -> tuple[int, int, float | None]:
        """(step, steps, loss) of a run that may be running now, from the end of its log; zeros before it has begun."""
        steps = 0
        with contextlib.suppress(UserError, OSError):
            steps = int(self.status.get("steps") or 0)
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINE))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0, steps, None
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if record["event"] == "train":
                    return int(record["step"]), steps, record["loss"]
        return 0, steps, None

    def losses(self, step: int) -> list[tuple[float, int]]:
        """The validation loss at a step batch by batch, (summed loss, count); empty if it was not kept or is damaged."""
        try:
            stored = parse_json((self.path / "losses" / f"{step_name(step)}.json").read_text(encoding="utf-8"))
            return [(float(nats), int(count)) for nats, count in stored]
        except (OSError, ValueError, TypeError):
            return []

    def answers(self, damage: list[str]) -> dict[int, list[Json]]:
        """Step -> records of `answers/step-XXXXXXXX.jsonl`, in order of the steps. damage: gets a note for each unreadable line."""
        by_step = {}
        for path in sorted((self.path / "answers").glob("step-*.jsonl")):
            if match := STEP_NAME.fullmatch(path.stem):
                records = [record for _, record in json_lines(path, noted(path.name, damage))]
                by_step[int(match[1])] = [r for r in records if {"prompt", "answer", "finish_reason"} <= r.keys()]
        return by_step

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of the complete checkpoints, oldest first."""
        directories = (self.path / "checkpoints").glob("step-*")
        return sorted((int(m[1]), p) for p in directories if (m := STEP_NAME.fullmatch(p.name)))

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step. Raises: UserError listing the available steps."""
        for saved, path in self.checkpoints():
            if saved == step:
                return path
        steps = ", ".join(str(saved) for saved, _ in self.checkpoints()) or "none"
        raise UserError(f"{self.path} has no checkpoint of step {step}; it has: {steps}")

    def trained_weights(self, adapter: bool) -> int | None:
        """How many numbers its last checkpoint holds: of the model, or of the adapter; None where none can be read."""
        name = "adapter_model.safetensors" if adapter else "model.safetensors"
        files = [path / name for _, path in self.checkpoints() if (path / name).exists()]
        try:
            with files[-1].open("rb") as file:  # its header says it; safetensors itself would load torch
                header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
            return int(sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__"))
        except (IndexError, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
            return None

    @property
    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        command = (self.inputs or {}).get("command", "COMMAND")
        return f"tunesmith {command} --out {shlex.quote(str(self.path))} --resume"

    def best_checkpoint(self) -> Path:
        """The checkpoint with the lowest validation loss; the last checkpoint if none was estimated.

        Raises: UserError if there is none, or if the run has diverged and left none from before that is known to be good.
        """
        status, checkpoints = self.status, dict(self.checkpoints())
        best = status.get("best_step")
        if not checkpoints:
            raise UserError(f"{self.path} has no checkpoint yet (its state is {status['state']!r})")
        if best not in checkpoints and status["state"] == "diverged":
            steps = ", ".join(f"{self.path}@{step}" for step in checkpoints)
            raise UserError(
                f"{self.path} has diverged and left no good checkpoint: use the model that it began with, or name one of "
                f"its checkpoints by the step ({steps})"
            )
        return checkpoints[best if best in checkpoints else max(checkpoints)]


def is_run(path: Path) -> bool:
    """Whether a run lies there."""
    return (path / "status.json").exists()


def check_command(path: Path, command: str) -> None:
    """Raises: UserError if another command made the run."""
    made = (Run(path).inputs or {"command": command}).get("command")  # an earlier version did not record it
    if made != command:
        raise UserError(f"--resume: {path} was made by tunesmith {made}, and tunesmith {command} cannot continue it")


def noted(file: str, damage: list[str]) -> Bad:
    """For `json_lines`: a damaged line is left out with a note."""
    return lambda number, why: damage.append(f"{file} line {number} is damaged and was left out: {why}")


# ---- writing ---------------------------------------------------------------------------------------------------------


AFTER_SAVING = ("changed", "diverged")
"""Events that are logged when the checkpoint of their step has been written: where a run goes on from it they are logged again."""


NEEDED = {"train": {"loss"}, "eval": {"validation_loss"}}  # without these a line of the event is damaged


def _up_to(lines: Sequence[str], step: int | None) -> tuple[list[int], list[int]]:
    """Which lines of a log belong to a run as it was at the checkpoint of a step, and the numbers of the damaged ones among them."""
    kept, damaged = [], []
    for number, line in enumerate(lines):
        try:
            record = parse_json(line)
            at, event = record["step"], record["event"]
            if type(at) is not int or not NEEDED.get(event, set()) <= record.keys():
                raise KeyError
            if line.endswith("\n") and (at, event in AFTER_SAVING) <= (-1 if step is None else step, False):
                kept.append(number)
        except (ValueError, KeyError, TypeError):
            damaged.append(number + 1)
    return kept, [n for n in damaged if kept and n <= kept[-1]]  # those behind it are dropped anyway


def _some(numbers: Sequence[int]) -> str:
    """`3, 4, 7`, of many only the first few."""
    return ", ".join(f"{n:,}" for n in numbers[:5]) + (f" and {len(numbers) - 5:,} more" if numbers[5:] else "")


def write_status(directory: Path, status: Json) -> None:
    """Replace a run's status.json."""
    write_atomically(directory / "status.json", json.dumps(status, indent=2) + "\n")


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

    def write_config(self, config: Json) -> None:
        """Store the resolved configuration, from which the run can be repeated."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_inputs(self, inputs: Json) -> None:
        """Store what the run is made from, by content, so that a resumed run can tell whether it is still that."""
        write_atomically(self.path / "inputs.json", json.dumps(inputs, indent=2) + "\n")

    def write_environment(self, environment: Json) -> None:
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
            if isinstance(value, int | float) and event != "changed":  # an option is not a curve
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
        write_status(self.path, {"state": state, "step": step, "reason": reason, **more})

    def ended_at_once(self, by: str) -> str:
        """Leave in status.json that the process was ended in the middle of a step; returns how the run goes on."""
        status = self.run.status  # its step is that of the last checkpoint
        way_on = f"go on from its last checkpoint with: {self.run.resume_command}"
        write_status(self.path, {**status, "state": "stopped", "reason": f"ended at once by {by}; {way_on}"})
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
