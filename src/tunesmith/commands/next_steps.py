"""What a training says at its end: the two commands that usually come next. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tunesmith.files.run import Run

DATA_OPTIONS = ("columns", "config", "root", "rm_static", "allow_missing")  # by which a data set is found and read


def next_steps(run: Run, command: str) -> list[str]:
    """The lines, each command as it can be pasted into a shell. Nothing for any state but finished."""
    config, status, path = run.config, run.status, shlex.quote(str(run.path))
    if status["state"] != "finished" or not run.checkpoints():
        return []
    first, second = _commands(command, path, config)
    return [f"next: tunesmith {first}", f"      tunesmith {second}"]


def _commands(command: str, path: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """What usually comes after a training, without the program's name."""
    base, data = shlex.quote(config["model"]["name"]), _data_words(config["data"])
    evaluate, chat = f"evaluate {path} {data}", f"chat {path}"
    if command == "pretrain":
        return f"sft --model {path} --data sample", chat
    if config["model"]["init"] == "random":  # what it began as is no model that could answer
        return (evaluate, f"report {path}") if command == "reward" else (chat, evaluate)
    if command == "reward":
        return f"score {base} --reward {path}", f"dpo --model {base} --data {data} --eval.reward {path}"
    compare = f"compare {base} {path}"
    return (compare, chat) if command == "dpo" else (chat, compare)


def _data_words(data: Mapping[str, Any]) -> str:
    """A data set as a command line names it, with the options by which it is found."""
    words = [shlex.quote(data["name"])]
    for name in DATA_OPTIONS:
        if value := data.get(name):
            words.append(f"--data.{name} {shlex.quote(str(value).lower() if value is True else str(value))}")
    return " ".join(words)
