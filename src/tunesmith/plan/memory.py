"""What a training step holds in memory, counted from the model's shape: no torch, nothing measured.

Parameters, gradients and optimizer state are exact. Activations are what autograd keeps for backward, counted tensor by tensor;
with dropout 0 and float32 they are exact too. They are not all there at one time: the peak is the largest of four moments of a
step (`Memory.moments`). What the process itself needs (Python and torch, `PROCESS`; the CUDA context on a GPU) comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

SLOTS: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd-momentum": 1, "sgd-nesterov": 1, "adamw8bit": 2}
"""Numbers that an optimizer keeps per trained weight."""
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # torchao: smaller weights keep their state in float32
BF16_UPDATE = (
    22  # bytes a number: the gradient, float32 copies of it and of the weight, and what rounding makes on the way
)
BF16_SLICE = 2**22  # numbers that are updated at a time (optim.SLICE); with 8-bit state a whole matrix
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


def block_bytes(shape: Shape, work: Work, *, last: bool = False, selective: bool = False) -> int:
    """Bytes that autograd keeps of one block between forward and backward.

    The input of each norm with its mean and deviation, the input of each linear layer that learns, queries, keys and values,
    what attention gave with its log-sum-exp, and the input of GELU. Where documents share a row, what attention gave is
    there a second time, put together again for the projection. Half: matrix products keep halves, norms and the residual
    stream floats. selective: what norms and GELU give is computed again.

    last: only tokens that carry loss leave its attention.
    """
    c, sizes, width = shape.n_embd, linear_sizes(shape), 2 if work.half else 4
    inner = sizes["mlp.c_fc"][1]
    fewer = last and work.supervised is not None
    n, out = work.tokens, work.losses if fewer else work.tokens
    low = 4 * work.rank
    per_token = (4 * c + 8) + width * 4 * c + 4 * shape.n_head
    per_token += (0 if selective else width * c) * work.learns("attn.c_attn") + low * ("attn.c_attn" in work.targets)
    per_left = (4 * c + 8) + width * inner
    if work.packed or fewer:
        per_left += width * c * work.learns("attn.c_proj")
    if not selective:
        per_left += width * (c * work.learns("mlp.c_fc") + inner * work.learns("mlp.c_proj"))
    per_left += low * sum(name in work.targets for name in LINEARS[1:])
    weights = 2 * sum(i * o for i, o in sizes.values()) if work.half and not work.bf16_weights else 0
    return n * per_token + out * per_left + 2 * width * c * work.shared_keys + weights


def activation_bytes(shape: Shape, work: Work) -> int:
    """Bytes that autograd keeps between forward and backward."""
    c = shape.n_embd
    ends = work.losses * ((4 * c + 8) + 4 * c)  # last norm, and the gradient that the head's loss keeps
    if work.checkpointing is True:
        return shape.n_layer * work.tokens * 4 * c + ends
    selective = work.checkpointing == "selective"
    blocks = [block_bytes(shape, work, last=i == shape.n_layer - 1, selective=selective) for i in range(shape.n_layer)]
    return sum(blocks) + ends - _unused(shape, work, 2 if work.half else 4)


def backward_bytes(shape: Shape, work: Work, *, last: bool) -> int:
    """Bytes that come and go in the backward pass of one block: gradients on their way, and what is computed again."""
    c, inner, width = shape.n_embd, linear_sizes(shape)["mlp.c_fc"][1], 2 if work.half else 4
    tokens = work.losses if last else work.tokens
    passing = tokens * width * ((1 if work.rank else 2) * inner + c)
    if work.checkpointing is True:
        return passing + block_bytes(shape, work, last=last)
    return passing + (tokens * width * inner if work.checkpointing == "selective" else 0)


def _unused(shape: Shape, work: Work, width: int) -> int:
    """Bytes that the first block does not keep: with LoRA nothing in it learns before its first adapter."""
    if not work.rank:
        return 0
    c, tokens = shape.n_embd, work.tokens
    norm = tokens * (4 * c + 8)
    if work.learns("attn.c_attn"):
        return norm
    own_result = width * c if work.learns("attn.c_proj") and not work.packed else 0
    spared = norm + tokens * (width * 4 * c + 4 * shape.n_head - own_result)
    if not work.learns("attn.c_proj"):
        inner = linear_sizes(shape)["mlp.c_fc"][1]
        spared += norm + (tokens * width * inner if not work.learns("mlp.c_fc") else 0)
    return spared


def state_bytes(shape: Shape, work: Work) -> int:
    """Bytes of optimizer state. In 8 bits: one byte a number, a float32 scale a block of 256; what is small stays float32."""
    slots = SLOTS[work.optimizer]
    sizes = [count_adapters(shape, work.rank, work.targets)] if work.rank else tensor_sizes(shape)
    if work.optimizer != "adamw8bit":
        return 4 * slots * sum(sizes)
    if work.rank:
        sizes = adapter_sizes(shape, work.rank, work.targets)
    return slots * sum(n + 4 * (n // EIGHT_BIT_BLOCK) if _in_8_bits(n) else 4 * n for n in sizes)


def _in_8_bits(n: int) -> bool:
    return n >= EIGHT_BIT_FROM and n % EIGHT_BIT_BLOCK == 0


def tensor_sizes(shape: Shape) -> list[int]:
    """Numbers in each of the model's weights; a tied head counts once."""
    c = shape.n_embd
    block = [n for i, o in linear_sizes(shape).values() for n in (i * o, o)] + [c] * 4
    ends = [shape.vocab_size * c, shape.block_size * c, c, c] + ([] if shape.tied_head else [shape.vocab_size * c])
    return block * shape.n_layer + ends


def adapter_sizes(shape: Shape, rank: int, targets: Sequence[str]) -> list[int]:
    """Numbers in each matrix of the adapters."""
    sizes = linear_sizes(shape)
    block = [rank * n for name in targets if name in sizes for n in sizes[name]]
    head = [rank * shape.n_embd, rank * shape.vocab_size] if "lm_head" in targets else []
    return block * shape.n_layer + head


def predict_memory(shape: Shape, work: Work) -> Memory:
    """Bytes of a training step.

    The moments: the head's loss at the end of forward, with the first logits; backward in the model's last block, in the one
    before it, and in its first, when the gradients of all others are there; the end of backward, when all are, and a tied
    embedding's in bfloat16 comes beside the head's; the update.
    """
    vocabulary, c = shape.vocab_size * shape.n_embd, shape.n_embd
    sizes = tensor_sizes(shape)
    base, adapters = sum(sizes), count_adapters(shape, work.rank, work.targets)
    matrices = base - (shape.n_layer * (sum(o for _, o in linear_sizes(shape).values()) + 4 * c) + 2 * c)
    stored, exact = 2 if work.bf16_weights else 4, 2 if work.half else 4
    parameters = work.copies * (base * 4 - matrices * (4 - stored)) + 4 * adapters
    gradients = 4 * adapters if work.rank else base * 4 - matrices * (4 - stored)
    state = state_bytes(shape, work)
    kept, again = activation_bytes(shape, work), backward_bytes(shape, work, last=True)

    whole = not work.rank
    chunk = min(work.chunk, work.losses) if work.head else 0
    converted = exact * vocabulary if work.head and exact != stored else 0  # the head's weight in the arithmetic's type
    head = 4 * vocabulary * (whole and work.head)
    logits = chunk * shape.vocab_size * (6 if work.half else 4)
    product = 2 * vocabulary if work.half and head else 0
    tied = stored * vocabulary if head and shape.tied_head else 0
    earlier = gradients if work.micro_batches > 1 else 0
    left = gradients
    if work.in_backward:
        left = max(stored * max(sizes), tied) if whole else 4 * max(adapter_sizes(shape, work.rank, work.targets))
    at_once = max(sizes) if work.optimizer == "adamw8bit" else min(max(sizes), BF16_SLICE)
    update = BF16_UPDATE * at_once if work.bf16_weights and whole else 0
    fixed = parameters + state
    waiting = earlier + (stored * vocabulary if head else 0)
    ends = 8 * shape.n_embd * work.losses  # the last norm's input, and the gradient that the head's loss made
    moments = {
        "the head's loss": fixed + earlier + kept + head + converted + logits + product,
        "the beginning of backward": fixed + waiting + kept - ends + again,
        "the end of backward": fixed + left + tied * ((work.micro_batches > 1) + work.bf16_weights),
        "the update": fixed + left + update,
    }
    selective = work.checkpointing == "selective"
    if shape.n_layer > 1:
        block = backward_bytes(shape, work, last=False)
        made = 0 if work.rank or work.in_backward else stored * sum(i * o for i, o in linear_sizes(shape).values())
        freed = [
            shape.n_embd * 4 * work.tokens if work.checkpointing is True
            else block_bytes(shape, work, last=last, selective=selective) for last in (True, False)
        ]  # fmt: skip
        for name, done in {"the second block of backward": 1, "the last block of backward": shape.n_layer - 1}.items():
            left_over = kept - ends - freed[0] - (done - 1) * freed[1]
            moments[name] = fixed + waiting + max(0, left_over) + done * made + block
    scratch = 0 if work.rank else work.tokens * exact * linear_sizes(shape)["mlp.c_fc"][1]
    return Memory(
        parameters, left, state, kept, logits, moments,
        heap=scratch + block_bytes(shape, work, selective=selective), largest=max(logits, head),
    )  # fmt: skip
