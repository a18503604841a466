"""What pretraining settles before there is a model: its shape, its options, its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.cutting import block_size_of
from tunesmith.data.datasets import holdout_rows, open_dataset
from tunesmith.data.dialogue import prose
from tunesmith.data.readers import Report
from tunesmith.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from tunesmith.errors import UsageError, UserError
from tunesmith.files.names import load_tokenizer, new_model, shape_of
from tunesmith.files.run import Run
from tunesmith.models.family import Config
from tunesmith.options.pretraining import SHAPE, PretrainConfig, PretrainDataOptions
from tunesmith.train.trainee import Trainee

NEW = "new"  # --tokenizer.name of one that is trained on the texts
VOCAB_SIZE = 8192


def resolve_shape(config: PretrainConfig) -> tuple[PretrainConfig, Config]:
    """The shape that is asked for, its numbers also in the configuration. Raises: UsageError if it is none."""
    m, data, tokenizer = config.model, config.data, config.tokenizer
    asked: dict[str, Any] = {size: value for option, size in SHAPE.items() if (value := getattr(m, option)) is not None}
    try:
        shape = shape_of(m.name).resized(**asked, dropout=m.dropout)
    except UserError as error:
        raise UsageError(f"--model: {error}") from None
    numbers = {option: getattr(shape, size) for option, size in SHAPE.items()}
    if tokenizer.name == NEW:
        tokenizer = dataclasses.replace(tokenizer, vocab_size=tokenizer.vocab_size or VOCAB_SIZE)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(m, **numbers),
        tokenizer=tokenizer,
        data=dataclasses.replace(data, block_size=shape.longest if data.block_size in ("auto", 0) else data.block_size),
    )
    return config, shape


def problems_of(config: PretrainConfig) -> list[str]:
    """What is wrong with the options that only this command has."""
    data, tokenizer, problems = config.data, config.tokenizer, []
    if not data.name:
        problems.append("--data.name is missing: name a text file, a JSONL file, a directory or a data set")
    if data.loss_on == "assistant":
        problems.append(
            "--data.loss_on assistant: a base model learns every token; leave the option out, or use tunesmith sft"
        )
    if (block_size := block_size_of(data)) > (config.model.block_size or 0):
        problems.append(
            f"--data.block_size {block_size:,} is more than the model can read; raise --model.block_size "
            f"({config.model.block_size:,}) or leave --data.block_size out"
        )
    if tokenizer.name != NEW and tokenizer.vocab_size is not None:
        problems.append(
            f"--tokenizer.vocab_size is for a new tokenizer; the vocabulary of {tokenizer.name} has a fixed size"
        )
    elif tokenizer.vocab_size is not None and tokenizer.vocab_size < SMALLEST_VOCABULARY:
        problems.append(
            f"--tokenizer.vocab_size is {tokenizer.vocab_size}, expected at least {SMALLEST_VOCABULARY}: "
            "the 256 bytes and the end of text"
        )
    return problems


def make_tokenizer(config: PretrainConfig, path: Path) -> Tokenizer:
    """The run's own when it goes on; else a named one, or one trained on the training texts."""
    if config.resume and (saved := Run(path).checkpoints()):
        return Tokenizer.load(saved[-1][1])
    if config.tokenizer.name != NEW:
        return load_tokenizer(config.tokenizer.name)
    assert config.tokenizer.vocab_size is not None
    return Tokenizer.train(training_texts(config.data), config.tokenizer.vocab_size)


def new_trainee(config: PretrainConfig, shape: Config, path: Path) -> Trainee:
    """A model of that shape with new weights, and its tokenizer, whose vocabulary it takes. path: the run's directory."""
    tokenizer = make_tokenizer(config, path)
    model = new_model(dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), config.train.seed)
    return Trainee(model, model, tokenizer, base="", fingerprint="", lora=False)


def training_texts(data: PretrainDataOptions) -> Iterator[str]:
    """The texts that will be trained on, without those that are held out. Raises: UserError if there are none."""
    source = open_dataset(data)
    held: set[int] = set()
    if "test" not in source.files:
        count = sum(1 for _ in source.rows("train", Report()))
        held = set(holdout_rows(count, data.holdout, data.rows_seed)[1].tolist())
    return (prose(row.value) for i, row in enumerate(source.rows("train", Report())) if i not in held)
