"""Small training runs for the tests: their configuration, and what two equal runs have in common."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith.files.run import Run
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.methods import dpo, reward, sft
from tunesmith.train.task import LossSum

COMMANDS = {PretrainConfig: "pretrain", SFTConfig: "sft", DPOConfig: "dpo", RewardConfig: "reward"}

SMALL = {
    "data.name": "sample", "data.block_size": 128, "data.max_rows": 120,
    "train.precision": "fp32", "train.device": "cpu", "train.steps": 6, "train.batch_size": 2,
    "optimizer.lr": 1e-3, "eval.iters": 3, "eval.every": 3, "checkpoint.every": 3,
}  # fmt: skip


def tiny_config(model: Path | str, out: Path, kind: Any = SFTConfig, **options: Any) -> Any:
    """A run of seconds; options with `__` for the dot: `train__steps=3`."""
    config = kind(out=str(out), resume=options.pop("resume", False))
    named = {**SMALL, "model.name": str(model), **{k.replace("__", "."): v for k, v in options.items()}}
    for name, value in named.items():
        group, key = name.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})
    return config


def change_step_loss(monkeypatch: Any, kind: str, changed: Callable[[LossSum, Any], Tensor]) -> None:
    """In runs of this kind, `changed(loss_sum, batch)` is the summed loss of a step; estimates stay as they are."""
    module, name = {"sft": (sft, "token_loss_sum"), "dpo": (dpo, "loss_sum"), "reward": (reward, "loss_sum")}[kind]
    plain = getattr(module, name)

    def made(*args: Any) -> LossSum:
        loss_sum = plain(*args)
        return lambda batch: changed(loss_sum, batch)

    monkeypatch.setattr(module, name, made)


def as_argv(config: Any) -> list[str]:
    """The same on the command line."""
    argv = [COMMANDS[type(config)], "--out", str(config.out)]
    for group in dataclasses.fields(config):
        options = getattr(config, group.name)
        if dataclasses.is_dataclass(options):
            for field in dataclasses.fields(options):
                if (value := getattr(options, field.name)) is not None:
                    argv += [
                        f"--{group.name}.{field.name}",
                        str(value).lower() if value in (True, False) else str(value),
                    ]
    return argv


def digest(directory: Path) -> str:
    """SHA-256 of a checkpoint's weights: the model's, or the adapter's."""
    (file,) = directory.glob("*model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def last_digest(run: Run) -> str:
    return digest(run.checkpoints()[-1][1])


def comparable(run: Run) -> list[dict[str, Any]]:
    """The metrics lines without what a clock or a meter says."""
    unlike = ("time", "tokens_per_s", "peak_memory_gb")
    return [{k: v for k, v in line.items() if k not in unlike} for line in run.metrics()]


def train_losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics("train")]


def write_dialogues(path: Path, pairs: list[tuple[str, str]]) -> None:
    """A JSONL file of questions and answers."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns), encoding="utf-8")
