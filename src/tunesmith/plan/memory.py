"""What a training step holds in memory, counted from the model's shape: no torch, nothing measured.

Parameters, gradients and optimizer state are exact. Activations are what autograd keeps for backward, counted tensor by tensor;
with dropout 0 and float32 they are exact too. They are not all there at one time: the peak is the largest of four moments of a
step (`Memory.moments`). What the process itself needs (Python and torch, `PROCESS`; the CUDA context on a GPU) comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.models.family import HEAD, Config, Kept
from tunesmith.options.training import SLOTS

EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # torchao: smaller weights keep their state in float32
BF16_UPDATE = 22
"""Bytes a number: the gradient, float32 copies of it and of the weight, and what rounding makes on the way."""
BF16_SLICE = 2**22  # numbers that are updated at a time (optim.SLICE); with 8-bit state a whole matrix


PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")
"""Of `Memory`, each at its largest."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    The components are what each takes at its largest: gradients where `optimizer_in_backward` frees them are the largest
    one, logits the block that exists at a time. moments: name -> bytes that are there together; the peak is the largest.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    moments: Mapping[str, int]
    heap: int
    """Activations of one block, with what oneDNN copies in its backward: what a heap on a CPU may need once more."""
    largest: int
    """The largest single block that comes and goes in every step."""

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """When the peak is."""
        return max(self.moments, key=self.moments.__getitem__)


def block_matrices(shape: Config) -> int:
    """Numbers in the matrices of a block's linear layers: multiplications a token."""
    return sum(layer.matrix for layer in shape.family.linear_layers(shape).values())


def count_adapters(shape: Config, rank: int, targets: Sequence[str]) -> int:
    """Numbers in LoRA adapters. targets: names of linear layers within a block, and the head's."""
    return sum(adapter_sizes(shape, rank, targets))


def adapted_layers(shape: Config, targets: str) -> tuple[str, ...] | None:
    """The layers that `--lora.targets` means, where it names them by kind; None for patterns of single blocks."""
    linear, named = shape.family.linear_layers(shape), list[str]()
    for part in (p.strip() for p in targets.split(",")):
        if part == "all-linear":
            named += linear
        elif part == HEAD:
            named.append(part)
        else:
            fitting = [name for name in linear if f".{name}".endswith(f".{part}")]
            if not fitting:
                return None
            named += fitting
    return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Work:
    """What decides a step's memory and time, besides the model's shape.

    tokens: through the model in one micro-batch. supervised: how many of them carry loss; None: all, each through all of the
        last block. packed: documents share rows. micro_batches: in one step.
    rank, targets: of LoRA adapters, and the names of the layers that have one (`adapted_layers`); rank 0 trains all weights.
    half: fp16 or bf16 arithmetic. chunk: tokens whose logits exist at a time.
    checkpointing, in_backward, bf16_weights: as the options train.activation_checkpointing, .optimizer_in_backward, .weights.
    copies: of the weights: 2 with a second model as DPO's reference. head: False for a reward model, which gives no logits.
    shared_keys: keys and values, of all tokens, that are put together anew for answers that share a prompt.
    """

    tokens: int
    optimizer: str = "adamw"
    supervised: int | None = None
    packed: bool = True
    micro_batches: int = 1
    rank: int = 0
    targets: tuple[str, ...] = ()
    half: bool = False
    chunk: int = 256
    checkpointing: bool | Literal["selective"] = False
    in_backward: bool = False
    bf16_weights: bool = False
    copies: int = 1
    head: bool = True
    shared_keys: int = 0

    @property
    def losses(self) -> int:
        """Tokens that carry loss."""
        return self.tokens if self.supervised is None else self.supervised

    def learns(self, name: str) -> bool:
        """Whether a linear layer of the blocks, or its adapter, is trained."""
        return not self.rank or name in self.targets


def block_bytes(shape: Config, work: Work, *, last: bool = False, selective: bool = False) -> int:
    """Bytes that autograd keeps of one block between forward and backward: what its `Family.kept` lists.

    Half: matrix products keep halves, norms and the residual stream floats. An adapter keeps what its A gave.

    last: only tokens that carry loss leave its attention. selective: what norms and activations give is computed again.
    """
    width = 2 if work.half else 4
    fewer = last and work.supervised is not None
    kept_bytes = 0
    for kept in shape.family.kept(shape):
        a_token = 4 * work.rank * sum(name in work.targets for name in kept.read_by)
        needed = not kept.read_by or any(map(work.learns, kept.read_by))
        made = work.packed or fewer if kept.joined else not (kept.remade and selective)
        made = fewer if kept.picked else made
        if needed and made:
            a_token += kept.exact + width * kept.numbers
        kept_bytes += a_token * (work.losses if kept.late and fewer else work.tokens)
    keys = 2 * width * shape.key_heads * shape.head_width * work.shared_keys
    # autocast's copies of the matrices in the type of the arithmetic live as long as the graph
    return kept_bytes + keys + (2 * block_matrices(shape) if work.half and not work.bf16_weights else 0)


def activation_bytes(shape: Config, work: Work) -> int:
    """Bytes that autograd keeps between forward and backward."""
    c = shape.width
    norm = shape.family.kept(shape)[0].exact  # the last one keeps what a block's first does
    ends = work.losses * (norm + 4 * c)  # with the gradient that the head's loss keeps
    if work.checkpointing is True:
        return shape.depth * work.tokens * 4 * c + ends
    selective = work.checkpointing == "selective"
    last, other = (block_bytes(shape, work, last=last, selective=selective) for last in (True, False))
    return (shape.depth - 1) * other + last + ends - _unused(shape, work, 2 if work.half else 4)


def backward_bytes(shape: Config, work: Work, *, last: bool) -> int:
    """Bytes that come and go in the backward pass of one block: gradients on their way, and what is computed again."""
    c, inner, width = shape.width, shape.inner, 2 if work.half else 4
    tokens = work.losses if last else work.tokens
    passing = tokens * width * ((1 if work.rank else 2) * inner + c)
    if work.checkpointing is True:
        return passing + block_bytes(shape, work, last=last)
    return passing + (tokens * width * inner if work.checkpointing == "selective" else 0)


def _unused(shape: Config, work: Work, width: int) -> int:
    """Bytes that the first block does not keep: with LoRA nothing in a branch of it learns before the first adapter there."""
    if not work.rank:
        return 0
    listed = shape.family.kept(shape)
    return sum(_before_adapters([k for k in listed if k.beside is beside], work, width) for beside in (False, True))


def _before_adapters(branch: Sequence[Kept], work: Work, width: int) -> int:
    a_token = 0
    for kept in branch:
        learns = any(map(work.learns, kept.read_by))
        if learns and kept.joined and not work.packed:  # the layer's input is what attention gave, which is kept for it
            a_token -= width * kept.numbers
        if learns:
            break
        a_token += 0 if kept.read_by or kept.picked else kept.exact + width * kept.numbers
    return a_token * work.tokens


def state_bytes(shape: Config, work: Work) -> int:
    """Bytes of optimizer state. In 8 bits: one byte a number, a float32 scale a block of 256; what is small stays float32."""
    slots = SLOTS[work.optimizer]
    sizes = [count_adapters(shape, work.rank, work.targets)] if work.rank else shape.family.tensor_sizes(shape)
    if work.optimizer != "adamw8bit":
        return 4 * slots * sum(sizes)
    if work.rank:
        sizes = adapter_sizes(shape, work.rank, work.targets)
    return slots * sum(n + 4 * (n // EIGHT_BIT_BLOCK) if _in_8_bits(n) else 4 * n for n in sizes)


def _in_8_bits(n: int) -> bool:
    return n >= EIGHT_BIT_FROM and n % EIGHT_BIT_BLOCK == 0


def _vectors(shape: Config) -> int:
    """Numbers in norms and biases: what stays float32 with --train.weights bf16."""
    family = shape.family
    biases = sum(layer.outputs * layer.bias for layer in family.linear_layers(shape).values())
    outside = sum(sizes[0] for sizes in family.outside(shape) if len(sizes) == 1)
    return shape.depth * (biases + sum(family.vectors(shape))) + outside


def adapter_sizes(shape: Config, rank: int, targets: Sequence[str]) -> list[int]:
    """Numbers in each matrix of the adapters."""
    linear = shape.family.linear_layers(shape)
    block = [rank * n for name in targets if name in linear for n in (linear[name].inputs, linear[name].outputs)]
    head = [rank * shape.width, rank * shape.vocab_size] if HEAD in targets else []
    return block * shape.depth + head


def predict_memory(shape: Config, work: Work) -> Memory:
    """Bytes of a training step.

    The moments: the head's loss at the end of forward, with the first logits; backward in the model's last block, in the one
    before it, and in its first, when the gradients of all others are there; the end of backward, when all are, and a tied
    embedding's in bfloat16 comes beside the head's; the update.
    """
    sizes, whole = shape.family.tensor_sizes(shape), not work.rank
    base, adapters = sum(sizes), count_adapters(shape, work.rank, work.targets)
    stored, exact = _stored(work), 2 if work.half else 4
    model = base * 4 - (base - _vectors(shape)) * (4 - stored)
    parameters, gradients = work.copies * model + 4 * adapters, model if whole else 4 * adapters
    state, kept = state_bytes(shape, work), activation_bytes(shape, work)
    vocabulary = shape.vocab_size * shape.width
    logits = (min(work.chunk, work.losses) if work.head else 0) * shape.vocab_size * (6 if work.half else 4)
    head = 4 * vocabulary * (whole and work.head)  # its gradient, which is summed over chunks in float32
    tied = stored * vocabulary if head and shape.tied_head else 0
    left = gradients
    if work.in_backward:  # each is freed when it has been used
        left = max(stored * max(sizes), tied) if whole else 4 * max(adapter_sizes(shape, work.rank, work.targets))
    at_once = max(sizes) if work.optimizer == "adamw8bit" else min(max(sizes), BF16_SLICE)
    fixed, earlier = parameters + state, gradients if work.micro_batches > 1 else 0
    converted = exact * vocabulary if work.head and exact != stored else 0  # the head's weight in the arithmetic's type
    product = 2 * vocabulary if work.half and head else 0  # a chunk's part of the head's gradient, before it is added
    waiting = fixed + earlier + (stored * vocabulary if head else 0)  # the head's gradient, in the type of its weight
    ends = (
        8 * shape.width * work.losses
    )  # the last norm's input and the gradient from the head: gone before the blocks'
    moments = {
        "the head's loss": fixed + earlier + kept + head + converted + logits + product,
        "the beginning of backward": waiting + kept - ends + backward_bytes(shape, work, last=True),
        "the end of backward": fixed + left + tied * ((work.micro_batches > 1) + work.bf16_weights),
        "the update": fixed + left + (BF16_UPDATE * at_once if work.bf16_weights and whole else 0),
        **_between_blocks(shape, work, waiting, kept - ends),
    }
    scratch = work.tokens * exact * shape.inner if whole else 0
    heap = scratch + block_bytes(shape, work, selective=work.checkpointing == "selective")
    return Memory(parameters, left, state, kept, logits, moments, heap, largest=max(logits, head))


def _between_blocks(shape: Config, work: Work, waiting: int, kept: int) -> dict[str, int]:
    """Name -> bytes of the moments in backward after the last block's. waiting: there all the time; kept: by all blocks."""
    if shape.depth == 1:
        return {}
    block = backward_bytes(shape, work, last=False)
    made = 0 if work.rank or work.in_backward else _stored(work) * block_matrices(shape)
    selective = work.checkpointing == "selective"
    last, other = (block_bytes(shape, work, last=last, selective=selective) for last in (True, False))
    if work.checkpointing is True:  # of each block there was only its input
        last = other = shape.width * 4 * work.tokens
    return {
        name: waiting + max(0, kept - last - (done - 1) * other) + done * made + block
        for name, done in {"the second block of backward": 1, "the last block of backward": shape.depth - 1}.items()
    }


def _stored(work: Work) -> int:
    """Bytes of a number in the model's matrices."""
    return 2 if work.bf16_weights else 4
