"""Pretraining: a new model, and where asked for its tokenizer, from plain text.

Short texts share a row without seeing each other, long ones are cut into rows; every token but a text's first is
learned, and the text's end. The validation loss is also reported in bits per byte, in which models with different
tokenizers can be compared. Left out: a schedule of lengths, a mixture of data sets, weights shared with other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.errors import UsageError, UserError
from tunesmith.options.configs import with_options
from tunesmith.options.pretraining import SHAPE, PretrainConfig
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.sft import token_loss_sum, token_task

if TYPE_CHECKING:
    from tunesmith.models.family import Config
    from tunesmith.train.splits import Data, Splits
    from tunesmith.train.task import Prepared, Task
    from tunesmith.train.trainee import Trainee

NEW = "new"  # --tokenizer.name of one that is trained on the texts
VOCAB_SIZE = 8192


def new_shape(config: PretrainConfig) -> tuple[PretrainConfig, Config]:
    """The shape that is asked for, its numbers also in the configuration. Raises: UsageError if it is none."""
    from tunesmith.files.names import shape_of

    m, tokenizer = config.model, config.tokenizer
    asked: dict[str, Any] = {size: value for option, size in SHAPE.items() if (value := getattr(m, option)) is not None}
    try:
        shape = shape_of(m.name).resized(**asked, dropout=m.dropout)
    except UserError as error:
        raise UsageError(f"--model: {error}") from None
    decided = {f"model.{option}": getattr(shape, size) for option, size in SHAPE.items()}
    if tokenizer.name == NEW:
        decided["tokenizer.vocab_size"] = tokenizer.vocab_size or VOCAB_SIZE
    if config.data.block_size in ("auto", 0):
        decided["data.block_size"] = shape.longest
    return with_options(config, decided), shape


def check(config: PretrainConfig) -> Sequence[str]:
    """What is wrong with the options that only this command has."""
    from tunesmith.data.cutting import block_size_of
    from tunesmith.data.tokenizer import SMALLEST_VOCABULARY

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


def data(config: PretrainConfig, trainee: Trainee) -> Data:
    """Every row as plain text. Raises: UserError as `load_data`, and if the texts do not fill one row of a batch."""
    from tunesmith.train.splits import in_batches, load_splits

    splits = load_splits(config.data, trainee.tokenizer, prose=True)
    block_size = config.data.block_size
    if (tokens := tokens_of(splits)) < int(block_size):
        raise UserError(
            f"--model.block_size {block_size:,} is more than all the training texts together, which have {tokens:,} "
            f"tokens; lower it or add text"
        )
    return in_batches(splits, config)


def tokens_of(splits: Splits) -> int:
    """Tokens in the training texts."""
    return int(splits.train.lengths[splits.train_rows].sum())


def task(run: Prepared) -> Task:
    """The run as the loop reads it."""
    from tunesmith.data.token_bytes import bits_per_byte

    held_out, splits = held_out_bytes(run), run.data.splits
    about = (
        f"vocabulary of {run.trainee.tokenizer.vocab_size:,}, {len(splits.train_rows):,} texts of {tokens_of(splits):,} "
        f"tokens, {run.data.train.rows_per_epoch:,} batch rows per epoch"
    )
    return token_task(
        run, about, lambda held: {"validation_bits_per_byte": bits_per_byte(held.loss * held.tokens, held_out)}
    )


def held_out_bytes(run: Prepared) -> int:
    """Bytes of text that an estimate predicts. Raises: UserError if the tokens' bytes are not known."""
    from tunesmith.data.token_bytes import text_bytes

    tokenizer, batches = run.trainee.tokenizer, run.data.validation.fixed(run.iters)
    try:
        return sum(text_bytes(tokenizer, batch.targets[: batch.count].numpy()) for batch in batches)
    except ValueError:
        name = run.config.tokenizer.name
        raise UserError(
            f"--tokenizer.name {name}: how many bytes its tokens stand for is not known (it changes texts before it cuts them, or "
            "has other than byte-level BPE or byte fallback); use gpt2 or new"
        ) from None


METHOD = Method(
    command="pretrain",
    config=PretrainConfig,
    title="Pretraining",
    learning_rate=6e-4,
    warmup=100,
    new_shape=new_shape,
    check=check,
    data=data,
    loss_sum=token_loss_sum,
    task=task,
)
