"""The training commands: what every method goes through, from options to a finished run.

    tunesmith sft --model.name gpt2-medium --data.name hh --lora.rank 8
    tunesmith dpo --model.name runs/sft --data.name hh-pairs --lora.rank 8
    tunesmith reward --model.name runs/sft --data.name hh:harmless-base
    tunesmith pretrain --data.name book.txt --tokenizer.vocab_size 4096

What differs between them stands in the method's own file in `train/methods`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.chosen_template import AUTO, chat_template
from tunesmith.data.mixture import parse_sets
from tunesmith.device import return_freed_memory, seed_everything, set_allocator
from tunesmith.errors import UsageError
from tunesmith.files.bases import base_at
from tunesmith.files.lock import default_directory, run_directory
from tunesmith.files.run import Run
from tunesmith.judge.answering import rewards_at_steps
from tunesmith.models.family import Config
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.plan.room import memory_lines
from tunesmith.progress import STOP
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.table import METHODS
from tunesmith.train.moved import as_they_lie
from tunesmith.train.resolve import check_options, check_types, resolve_data, resolve_length, resolve_machine
from tunesmith.train.resuming import as_begun, inputs_of, settle_origin
from tunesmith.train.scratch import new_trainee
from tunesmith.train.session import run_training
from tunesmith.train.splits import load_data, prompts_of, rows_of
from tunesmith.train.task import Prepared
from tunesmith.train.trainee import load_trainee, prepare_model


def sft(config: SFTConfig) -> Run:
    """Fine-tune on dialogues and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    return train(METHODS["sft"], config)


def dpo(config: DPOConfig) -> Run:
    """Train on preferences and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    return train(METHODS["dpo"], config)


def train_reward_model(config: RewardConfig) -> Run:
    """Train a reward model and return the finished run; `ts.load_reward` loads its best checkpoint.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    return train(METHODS["reward"], config)


def pretrain(config: PretrainConfig) -> Run:
    """Train from scratch and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    return train(METHODS["pretrain"], config)


def train(method: Method, config: Any) -> Run:
    """Train by any method and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    config, shape = check_types(config), None
    if method.new_shape:
        config, shape = method.new_shape(config)
    config = check_options(config, method.check(config))
    with _begin(config, method) as (config, path):
        return _train(method, config, shape, path)


@contextlib.contextmanager
def _begin(config: Any, method: Method) -> Iterator[tuple[Any, Path]]:
    """The configuration (of a resumed run, with what was decided when it began) and the run's directory, now locked for us.

    Sets up the process: allocator and seeds. What a resumed run's options name is looked for where it lies now.
    Raises: UserError if `out` is taken or being written, there is nothing to resume, or the allocator is not available.
    """
    if not set_allocator(config.train.allocator) and config.train.allocator == "lean":
        raise UsageError(
            "--train.allocator lean needs glibc's allocator, which is missing here or left unchanged by "
            "TUNESMITH_ALLOCATOR=system: leave the option out, or unset the variable"
        )
    default = default_directory(method.command, config.model.name, [name for name, _ in parse_sets(config.data.name)])
    with STOP.catching(), run_directory(config.out, default, config.resume) as path:
        seed_everything(config.train.seed)
        if config.resume:
            config = as_they_lie(as_begun(config, Run(path).config), Run(path))
        base, template = (None, AUTO) if method.new_model else (config.model.base, config.chat.template)
        with base_at(base), chat_template(template):
            yield config, path


def _train(method: Method, config: Any, shape: Config | None, path: Path) -> Run:
    """As `train`, in the run's own directory. shape: of a new model."""
    config = method.resolve(config)
    if shape:
        trainee = new_trainee(config, shape, path)
    else:
        trainee = load_trainee(config, path, scored=method.scored, fingerprint=method.held_to_start)
    config = resolve_data(config, trainee.trunk.longest)
    config = resolve_machine(config, trainee.trunk.width, method.learning_rate)
    data = method.data(config, trainee) if method.data else load_data(config, trainee.tokenizer, pairs=method.pairs)
    return_freed_memory()  # texts and tokens of a first start would lie in the heap during the run
    config = resolve_length(config, data.train, data.validation, warmup=method.warmup)
    watched = {"sft_data": rows_of(data.watched.rows.store)} if data.watched else {}
    made_from = inputs_of(method.command, trainee, data.splits, prompts_of(config.eval.prompts) | watched)
    origin = settle_origin(config, path, made_from)
    device = prepare_model(trainee.model, trainee.trunk, config)
    task = method.task(Prepared(config, path, trainee, device, data, method.counted, method.observed))
    task = dataclasses.replace(
        task,
        memory=memory_lines(config, trainee.trunk.config, data.train),
        reward_at=rewards_at_steps(config.eval, trainee, path, device),
    )
    return run_training(config, path, trainee, device, origin, task)
