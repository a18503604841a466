"""What the models of all architectures share; each has a file of its own in this wing, with its blocks and its `Family`.

Shapes: B rows, T tokens a row, C width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.errors import UserError
from tunesmith.models.attention import Documents, prepare_for_compiling
from tunesmith.models.cache import ALIGNED_COLUMNS, Cache, KVCache
from tunesmith.models.family import Config, Family
from tunesmith.models.linear import Linear
from tunesmith.models.recompute import Chain, plain, recomputed

MOST_COMPILED = 64  # versions of a block's code


class _Tied(torch.autograd.Function):
    """(tokens (...), weight (V, C)) -> the tokens' rows (..., C), and the weight for the head that is tied to them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_weight: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        index, rows = tokens.flatten(), d_rows.flatten(0, -2)
        # Of the two that add rows, each is repeatable on one device only: index_put_ sorts on a GPU, and on a CPU several
        # threads add in no fixed order; index_add_ takes one row after the other on a CPU, and is 3 times as fast.
        if d_weight.is_cpu:
            return None, d_weight.index_add_(0, index, rows)
        return None, d_weight.index_put_((index,), rows, accumulate=True)


class Model(nn.Module, ABC):
    """Token ids to hidden states; `lm_head` turns hidden states into logits.

    An architecture's own class makes the modules, under the names of its published checkpoints, and says which of them are
    the `embedding`, the `blocks` and the `last_norm`, and what an embedded token gets before the first block (`embed`).
    A block is called as `block(x, documents, rows, cache, chain, *for_blocks(positions))`: (B, T, C) -> (B, T, C), or
    (n, C) with `rows`.
    """

    LIMIT: ClassVar[str]
    """What bounds the length of a text, for the message that refuses a longer one: a number of tokens goes in its braces."""

    config: Config
    lm_head: Linear

    def __init__(self) -> None:
        super().__init__()
        self.window: int | None = None  # tokens that some layers see; what is longer comes to the blocks as documents
        self.activation_checkpointing: bool | Literal["selective"] = False
        self.compiled = False

    def add_head(self) -> None:
        """Make `lm_head`, of the configuration; called when the embedding is there."""
        c = self.config
        with torch.device("meta" if c.tied_head else torch.get_default_device()):  # no second matrix of that size
            self.lm_head = Linear(c.width, c.vocab_size, bias=False)
        if c.tied_head:
            self.lm_head.weight = self.embedding.weight

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """Of the tokens: its weight is (V, C)."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """In the order in which they run."""

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """Before the head."""

    @abstractmethod
    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """What the first block gets: (B, T, C), in the exact type. embedded: (B, T, C); positions: (1 or B, T) int64."""

    def for_blocks(self, positions: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What all blocks need to know of the positions, made once: angles of a rotary embedding, say. By default nothing."""
        return ()

    @abstractmethod
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights as the architecture's publication does."""

    @property
    def family(self) -> Family:
        """The architecture that it is of."""
        return self.config.family

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state."""
        return self.config.width

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model reads."""
        return self.config.longest

    @property
    def device(self) -> torch.device:
        """Where the weights are, and tokens have to be."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.embedding.weight.dtype

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of the norms and of the residual stream: matrices may be kept in less."""
        return next(self.last_norm.parameters()).dtype

    def forward(
        self,
        tokens: Tensor,
        documents: Documents | Tensor | None = None,
        *,
        rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (B, T) int64, T at most `longest` (unless packed documents are each that short).
            documents: which tokens belong together: a Documents, or (B, T) int64 document numbers; tokens see only
                their own document and positions restart in each. None: every row is one document.
            rows: (n,) int64 indices into the B * T tokens. Only their states are computed in full: the last block's
                projection, MLP and norm are left out for all others.
            cache: filled with the keys and values of `tokens`, for generation.
        Returns: (B, T, C), or (n, C) with `rows`. Logits are `model.lm_head(hidden)`.
        Raises: UserError if a document is longer than `longest`.
        """
        return self._states(self.embedding(tokens), documents, rows, cache)

    def states_and_head(
        self, tokens: Tensor, documents: Documents | None = None, *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As calling the model, and the weight (V, C) that a loss of these states shall take for a tied head that learns.

        Of both together the gradient is made in one matrix: the embedding's is added to the rows of the head's that were
        looked up, and none is filled with zeros for it. None: take the head's own.
        """
        tied = self.embedding.weight
        learns = self.config.tied_head and tied.requires_grad and torch.is_grad_enabled()
        if not learns or tied.dtype is torch.bfloat16:  # whose rows would be summed up in bfloat16
            return self._states(self.embedding(tokens), documents, rows, None), None
        embedded, head = _Tied.apply(tokens, tied)  # type: ignore[no-untyped-call]
        return self._states(embedded, documents, rows, None), head

    def _states(
        self, embedded: Tensor, documents: Documents | Tensor | None, rows: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if isinstance(documents, Tensor):
            documents = Documents.from_ids(documents)
        if cache is not None and documents is None:
            positions, longest = cache.positions(), cache.reach
        elif documents is not None:
            positions, longest = documents.positions, documents.reach
        else:
            count, longest = embedded.shape[:2]
            positions = torch.arange(longest, device=embedded.device)[None]
            if self.window is not None and longest > self.window:
                documents = Documents.from_rows([[longest]] * count, embedded.device)
        if longest > self.longest:
            raise UserError(
                f"a text has {longest:,} tokens; {self.LIMIT.format(self.longest)}. Shorten the text, or cut it with "
                f"--data.truncation keep_end."
            )
        x, extras = self.embed(embedded, positions), self.for_blocks(positions)
        chain: Chain = recomputed if self.activation_checkpointing == "selective" else plain
        if self.compiled:
            _mark_what_varies(rows, documents)
        for i, block in enumerate(self.blocks):
            wanted = rows if i == len(self.blocks) - 1 else None
            if self.activation_checkpointing is True and self.training:
                x = checkpoint(block, x, documents, wanted, None, plain, *extras, use_reentrant=False)
            else:
                x = block(x, documents, wanted, cache, chain, *extras)
        if cache is not None:
            cache.advance(documents)
        return self.last_norm(x)  # type: ignore[no-any-return]

    def compile_blocks(self, **options: Any) -> None:
        """Have the blocks compiled when they are first used; `options` as of `torch.compile`.

        Compiled code is for training and estimates of a few batch shapes; what else varies is dynamic from the first
        batch on. torch leaves a function that was compiled 8 times uncompiled from then on, without a word: training,
        estimates, a last short batch and a reference pass together need more.
        """
        self.compiled = True
        prepare_for_compiling()
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_COMPILED)
        for block in self.blocks:
            block.compile(**options)

    def new_cache(self, lengths: Sequence[int], room: int, copies: Sequence[int] | None = None) -> KVCache:
        """An empty cache, on the model's device and in its exact type, for prompts of these lengths and `room` tokens after each.

        copies: for every prompt how many sequences go on from it; it is read once. None: one each.
        """
        c, device = self.config, self.device
        copies, end = copies or [1] * len(lengths), max(lengths)
        starts = [end - n for n, times in zip(lengths, copies, strict=True) for _ in range(times)]
        columns = math.ceil((end + room) / ALIGNED_COLUMNS) * ALIGNED_COLUMNS
        empty = torch.empty(0, device=device, dtype=self.exact_dtype)
        shape = (len(starts), c.key_heads, columns, c.head_width)
        keys = [empty.new_empty(shape) for _ in range(c.depth)]
        values = [empty.new_empty(shape) for _ in range(c.depth)]
        for held in (*keys, *values):
            held[:, :, : max(starts)] = 0  # masked, but 0 times NaN, which might lie there, is NaN
        first_columns, mask = torch.tensor(starts, device=device), None
        if any(starts):
            before = torch.arange(columns, device=device) < first_columns[:, None]
            mask = empty.new_zeros(before.shape).masked_fill(before, -math.inf)[:, None, None]
        return KVCache(keys, values, copies, starts, first_columns, end, mask)

    def parameter_count(self) -> int:
        """Numbers in the model; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())


def build_model(config: Config) -> Model:
    """A new model of that shape, its weights as torch draws them."""
    model: Model = config.family.build(config)
    return model


def _mark_what_varies(rows: Tensor | None, documents: Documents | None) -> None:
    """Tell torch.compile which lengths change from batch to batch: compiled for one, code would be made again for the next."""
    varying = [rows]
    if documents is not None:
        varying += [documents.cu_seqlens, documents.cu_keys, documents.key_index]
    for tensor in varying:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
