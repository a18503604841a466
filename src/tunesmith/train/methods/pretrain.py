"""Pretraining: a new model, and where asked for its tokenizer, from plain text.

Short texts share a row without seeing each other, long ones are cut into rows; every token but a text's first is
learned, and the text's end. The validation loss is also reported in bits per byte, in which models with different
tokenizers can be compared. Left out: a schedule of lengths, a mixture of data sets, weights shared with other models.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.options.pretraining import PretrainConfig
from tunesmith.train.methods.method import Method
from tunesmith.train.methods.sft import token_loss_sum


def check(config: PretrainConfig) -> Sequence[str]:
    """What is wrong with the options that only this command has."""
    from tunesmith.train.scratch import problems_of

    return problems_of(config)


PRETRAIN = Method(
    command="pretrain",
    config=PretrainConfig,
    title="Pretraining",
    loss_sum=token_loss_sum,
    new_model=True,
    check=check,
)
