"""Every option of `tunesmith pretrain` that the other training commands lack or have with a different default. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from tunesmith.options.marks import AS_BEGUN, CONTENT, FIXED
from tunesmith.options.training import (
    BlockSize,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LoRAOptions,
    OptimizerOptions,
    TrainOptions,
)


@dataclass(frozen=True)
class NewModelOptions:
    """The shape of the new model"""

    name: str = "gpt2"
    """A named size (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a MODEL whose shape is used; the options below change it."""
    n_layer: int | None = field(default=None, metadata=FIXED)
    """Blocks; default: as in model.name, like the three below."""
    n_head: int | None = field(default=None, metadata=FIXED)
    """Attention heads; their number must divide n_embd."""
    n_embd: int | None = field(default=None, metadata=FIXED)
    """Width."""
    block_size: int | None = field(default=None, metadata=FIXED)
    """Longest text the model can read, in tokens."""
    dropout: float = 0.0
    """Dropout probability in training, in [0, 1)."""


SHAPE = {"n_layer": "depth", "n_head": "heads", "n_embd": "width", "block_size": "longest"}
"""Option of `--model` -> the name of that size in a model's configuration (`models.family.Config`)."""


@dataclass(frozen=True)
class TokenizerOptions:
    """The tokenizer of the new model"""

    name: str = field(default="new", metadata=FIXED)
    """new: byte-level BPE trained on the texts; gpt2: GPT-2's own vocabulary; or a MODEL whose tokenizer is used."""
    vocab_size: int | None = field(default=None, metadata=FIXED)
    """Vocabulary of a new tokenizer, including the 256 bytes and the end of text; default: 8192."""


@dataclass(frozen=True)
class PretrainDataOptions(DataOptions):
    """The texts to train on"""

    name: str = field(default="", metadata=CONTENT)
    """Text file, JSONL, directory or hub data set, or a data set name that sft takes; dialogues become text without roles."""
    block_size: BlockSize = "auto"
    """Tokens in one row of a batch; auto (or 0): as many as the model can read (model.block_size)."""
    batching: Literal["packed", "windows", "padded"] = "packed"
    """packed: several texts per row, no attention between them; windows: random windows of one stream; padded: one text per row."""
    loss_on: Literal["auto", "assistant", "all"] = "all"
    """Every token carries loss; there is no other choice."""
    truncation: Literal["auto", "keep_end", "keep_start", "split", "drop"] = "auto"
    """What to do with texts longer than block_size; auto: split them."""


@dataclass(frozen=True)
class PretrainOptimizerOptions(OptimizerOptions):
    """The optimizer and its schedule"""

    lr: float | None = None
    """Peak learning rate; default: 6e-4. Small models need more."""
    weight_decay: float | None = 0.1
    """Weight decay of matrices (never of biases and norms)."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up; linear and cosine would reach 0 one step after the last."""
    warmup_steps: int | None = field(default=None, metadata=AS_BEGUN)
    """Steps over which the rate rises linearly from 0; default 100, and a tenth of a run of 100 steps or fewer."""


@dataclass(frozen=True)
class PretrainConfig:
    """A new model and, if asked for, its tokenizer, from plain text."""

    model: NewModelOptions = field(default_factory=NewModelOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    data: PretrainDataOptions = field(default_factory=PretrainDataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: PretrainOptimizerOptions = field(default_factory=PretrainOptimizerOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    out: str | None = None
    """Run directory; default: runs/pretrain-MODEL-DATA."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    resume_changes: Literal["refuse", "accept"] = "refuse"
    """accept: a resumed run may change options that alter its result; config.yaml and the log record each change and its step."""

    @property
    def lora(self) -> LoRAOptions:
        """None: there is nothing yet that adapters could adapt."""
        return LoRAOptions()
