"""What pretraining makes before its first step: the tokenizer, and a model with new weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.datasets import holdout_rows, open_dataset
from tunesmith.data.dialogue import prose
from tunesmith.data.readers import Report
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import load_tokenizer, new_model
from tunesmith.files.run import Run
from tunesmith.models.family import Config
from tunesmith.options.pretraining import PretrainConfig, PretrainDataOptions
from tunesmith.train.methods.pretrain import NEW
from tunesmith.train.trainee import Trainee


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
