"""What a training step holds in memory, counted from the model's shape: no torch, nothing measured.

Parameters, gradients and optimizer state are exact. Activations are what autograd keeps for backward, counted tensor by tensor;
with dropout 0 and float32 they are exact too when every token carries loss. Logits are the block that exists at a time.
What the process itself needs (Python and torch, about 0.3 GB on a CPU; the CUDA context on a GPU) comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

SLOTS: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "sgd-nesterov": 1, "adamw8bit": 2}
"""Numbers that an optimizer keeps for every trained one."""
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Shape(Protocol):
    """What is needed of a GPT's configuration."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def n_inner(self) -> int | None: ...
    @property
    def tied_head(self) -> bool: ...


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of a block's four linear layers."""
    c = shape.n_embd
    inner = shape.n_inner or 4 * c
    return {"attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c), "mlp.c_fc": (c, inner), "mlp.c_proj": (inner, c)}


def count_parameters(shape: Shape) -> int:
    """Numbers in the model; a tied head counts once."""
    c = shape.n_embd
    block = sum(i * o + o for i, o in linear_sizes(shape).values()) + 4 * c
    head = 0 if shape.tied_head else shape.vocab_size * c
    return (shape.vocab_size + shape.block_size) * c + shape.n_layer * block + 2 * c + head


def count_adapters(shape: Shape, rank: int, targets: Sequence[str]) -> int:
    """Numbers in LoRA adapters. targets: names of LINEARS, and `lm_head`."""
    sizes = linear_sizes(shape)
    head = rank * (shape.n_embd + shape.vocab_size) if "lm_head" in targets else 0
    return shape.n_layer * sum(rank * sum(sizes[t]) for t in targets if t in sizes) + head


def adapted_layers(targets: str) -> tuple[str, ...] | None:
    """The layers that `--lora.targets` means, where it names them by kind; None for patterns of single blocks."""
    found: list[str] = []
    for part in (p.strip() for p in targets.split(",")):
        if part == "all-linear":
            found += LINEARS
        elif part == "lm_head":
            found.append(part)
        else:
            fitting = [name for name in LINEARS if f".{name}".endswith(f".{part}")]
            if not fitting:
                return None
            found += fitting
    return tuple(dict.fromkeys(found))


def activation_bytes(
    shape: Shape,
    tokens: int,
    *,
    packed: bool = True,
    half: bool = False,
    adapted: Sequence[str] | None = None,
    rank: int = 0,
    checkpointed: bool = False,
) -> int:
    """Bytes that autograd keeps between forward and backward, for `tokens` tokens in one micro-batch.

    A block keeps: the input of each norm with its mean and deviation, the input of each linear layer that learns, queries, keys
    and values, what attention gave with its log-sum-exp, and the input of GELU. half: autocast to 16 bits, in which matrix
    products keep halves (and a copy of their weights), norms and the residual stream keep floats.

    Args:
        packed: documents share rows, so what attention gave is kept a second time, put together again for the projection.
        adapted: names of the layers that learn, with LoRA; None: all of them.
        checkpointed: every block is computed again in backward, so only its input stays, and one block at a time.
    """
    c, sizes = shape.n_embd, linear_sizes(shape)
    inner, width = sizes["mlp.c_fc"][1], 2 if half else 4
    learns = LINEARS if adapted is None else adapted
    stream = 2 * (4 * c + 8)  # two norms: input, mean, deviation
    again = LINEARS if packed else [name for name in LINEARS if name != "attn.c_proj"]  # else attention's result itself
    inputs = sum(width * sizes[name][0] for name in again if name in learns)
    attention = width * 4 * c + 4 * shape.n_head
    low_rank = 0 if adapted is None else 4 * rank * sum(name in learns for name in LINEARS)
    block = tokens * (stream + inputs + attention + width * inner + low_rank)
    weights = 2 * sum(i * o for i, o in sizes.values()) if half else 0
    ends = tokens * ((4 * c + 8) + 4 * c)  # last norm, and the gradient that the head's loss keeps
    if checkpointed:
        return shape.n_layer * tokens * 4 * c + block + weights + ends
    norm = tokens * (4 * c + 8)
    spared = 0 if adapted is None else norm  # nothing in the first block learns before its first adapter
    if "attn.c_attn" not in learns:
        own_result = width * c if "attn.c_proj" in learns and not packed else 0
        spared += tokens * (attention - own_result)
        if "attn.c_proj" not in learns:
            spared += norm + (tokens * width * inner if "mlp.c_fc" not in learns else 0)
    return shape.n_layer * (block + weights) + ends - spared


def predict_memory(
    shape: Shape,
    *,
    tokens: int,
    optimizer: str,
    packed: bool = True,
    rank: int = 0,
    targets: str = "all-linear",
    half: bool = False,
    checkpointed: bool = False,
    chunk: int = 256,
) -> Memory | None:
    """Bytes of a training step; None where `targets` does not name whole kinds of layers.

    Args:
        tokens: in one micro-batch: rows times block size.
        rank, targets: of LoRA adapters; rank 0 trains all weights.
        half: fp16 or bf16 arithmetic (weights and optimizer stay in float32).
        chunk: tokens whose logits exist at a time.
    """
    adapted = adapted_layers(targets) if rank else None
    if rank and adapted is None:
        return None
    base = count_parameters(shape)
    adapters = count_adapters(shape, rank, adapted or ())
    trained = adapters if rank else base
    head = (
        4 * shape.vocab_size * shape.n_embd if not rank and shape.tied_head else 0
    )  # its gradient waits for the embedding's
    return Memory(
        parameters=4 * (base + adapters),
        gradients=4 * trained,
        optimizer=4 * trained * SLOTS[optimizer],
        activations=head
        + activation_bytes(
            shape, tokens, packed=packed, half=half, adapted=adapted, rank=rank, checkpointed=checkpointed
        ),
        logits=2 * 4 * chunk * shape.vocab_size,
    )
