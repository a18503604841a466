"""How much a training step computes and moves, counted from the model's shape: no torch, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.models.family import Config
from tunesmith.options.plans import PlanOptions
from tunesmith.plan.memory import Memory, Work, block_matrices, count_adapters


@dataclass(frozen=True)
class Rows:
    """What a micro-batch is like. text_tokens: mean length of a text (or pair); supervised: share of tokens that carry loss.

    The defaults are those of `tunesmith plan`, for data that nobody has read.
    """

    text_tokens: int = PlanOptions.text_tokens
    supervised: float = PlanOptions.supervised


def shared_keys(tokens: int, supervised: float) -> int:
    """Keys that are put together anew in `tokens` tokens of preference pairs: each of two answers reads the prompt and itself.

    supervised: the two answers' share of the tokens.
    """
    return round(tokens * (2 - supervised))


def forward_operations(shape: Config, *, attended: float, supervised: float = 1.0) -> float:
    """Floating-point operations of a forward pass, a token.

    attended: mean length of the texts (causal attention computes half of both its products). supervised: share of the
        tokens that carry loss; only they go through the head and the last block's projection and MLP.
    """
    linear, late = shape.family.linear_layers(shape), shape.family.late_layers(shape)
    block = 2.0 * block_matrices(shape) + 2.0 * attended * shape.heads * shape.head_width
    left_out = 2.0 * sum(layer.matrix for name, layer in linear.items() if name in late)
    head = 2.0 * shape.vocab_size * shape.width
    return shape.depth * block - (1 - supervised) * left_out + supervised * head


def step_operations(shape: Config, work: Work, *, attended: float, frozen_passes: int = 0) -> float:
    """Floating-point operations of a micro-batch, forward and backward, a token.

    Backward is two more products where all weights learn; a frozen weight has one, and an adapter's three are its own.
    A block that is computed again costs its forward a second time. frozen_passes: of a model that does not learn, such as DPO's
    live reference.
    """
    share = work.losses / work.tokens
    forward = forward_operations(shape, attended=attended, supervised=share)
    operations = 2 * forward + 6.0 * count_adapters(shape, work.rank, work.targets) if work.rank else 3 * forward
    if work.checkpointing is True:
        operations += forward - share * 2.0 * shape.vocab_size * shape.width
    return operations + forward * frozen_passes


def step_traffic(memory: Memory, work: Work) -> float:
    """Bytes that a step moves besides its matrix products' own, roughly.

    Weights are read in forward and backward of every micro-batch, gradients written; activations written and read, and
    read once more where they are made again; the update reads all and writes weights and state.
    """
    passes = work.micro_batches * (2 * memory.parameters + memory.gradients)
    again = {False: 2.0, "selective": 2.5, True: 4.0}[work.checkpointing]
    kept = work.micro_batches * again * (memory.activations + 2 * memory.logits * max(1, work.losses // work.chunk))
    trained = memory.gradients if not work.in_backward else memory.parameters
    return passes + kept + 3 * trained + 2 * memory.optimizer
