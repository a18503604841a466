"""GPT-2 in one file: pre-norm transformer, learned positions, tanh-GELU, tied head.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Modules carry the names of the published
checkpoints (wte wpe h ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj ln_f), so that loading is a loop over
equal keys; only the four linear weights of a block are stored transposed there (`weights.py`).

Shapes: B rows, T tokens a row, C width, H heads, D = C / H, N tokens in all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.errors import UserError
from tunesmith.models.attention import Documents, attend_documents, prepare_for_compiling
from tunesmith.models.cache import ALIGNED_COLUMNS, Cache, KVCache
from tunesmith.models.linear import Linear
from tunesmith.models.recompute import Chain, plain, recomputed


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2. The defaults are the 124 M model's; SIZES has all four."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    n_inner: int | None = None
    tied_head: bool = True

    def __post_init__(self) -> None:
        problems = [f"{k} = {v}" for k, v in vars(self).items() if isinstance(v, int) and v < 1 and k != "tied_head"]
        if self.n_head > 0 and self.n_embd % self.n_head:
            problems.append(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout = {self.dropout} is outside [0, 1)")
        if problems:
            raise UserError(f"not a GPT-2 shape: {'; '.join(problems)}")


SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}

MOST_COMPILED = 64  # versions of a block's code


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def mix(self, qkv: Tensor, documents: Documents | None, cache: Cache | None) -> Tensor:
        """Heads' outputs side by side, before the output projection. qkv: (B, T, 3 C); the result: (B, T, C)."""
        q, k, v = (torch.unflatten(z, 2, (self.n_head, -1)) for z in qkv.chunk(3, 2))  # (B, T, H, D)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, documents)
        elif documents is not None:
            y = attend_documents(q, k, v, documents, dropout)
        else:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2)
        return y.flatten(2)


class MLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them (GPT-2's own; not the exact one)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner)
        self.c_proj = Linear(inner, config.n_embd)

    def forward(self, x: Tensor, norm: nn.Module, chain: Chain) -> Tensor:
        """(..., C) -> (..., C), of what `norm` makes of x."""
        return chain(_gelu, chain(norm, x, self.c_fc), self.c_proj)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None,
        rows: Tensor | None = None,
        cache: Cache | None = None,
        chain: Chain = plain,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with `rows`, only those tokens leave attention and the result is (n, C)."""
        y = self.attn.mix(chain(self.ln_1, x, self.attn.c_attn), documents, cache)
        if rows is not None:
            x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        x = x + F.dropout(self.attn.c_proj(y), self.dropout, self.training)
        return x + F.dropout(self.mlp(x, self.ln_2, chain), self.dropout, self.training)


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
        return None, d_weight.index_put_((tokens.flatten(),), d_rows.flatten(0, -2), accumulate=True)


def _mark_what_varies(rows: Tensor | None, documents: Documents | None) -> None:
    """Tell torch.compile which lengths change from batch to batch: compiled for one, code would be made again for the next."""
    varying = [rows]
    if documents is not None:
        varying += [documents.cu_seqlens, documents.cu_keys, documents.key_index]
    for tensor in varying:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


class GPT(nn.Module):
    """GPT-2: token ids to hidden states; `lm_head` turns hidden states into logits.

    >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=6))
    >>> model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])).shape
    torch.Size([1, 4, 8])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: bool | Literal["selective"] = False
        self.compiled = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        with torch.device("meta" if config.tied_head else torch.get_default_device()):  # no second matrix of that size
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight

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
            tokens: (B, T) int64, T at most `block_size` (unless packed documents are each that short).
            documents: which tokens belong together: a Documents, or (B, T) int64 document numbers; tokens see only
                their own document and positions restart in each. None: every row is one document.
            rows: (n,) int64 indices into the B * T tokens. Only their states are computed in full: the last block's
                projection, MLP and norm are left out for all others.
            cache: filled with the keys and values of `tokens`, for generation.
        Returns: (B, T, C), or (n, C) with `rows`. Logits are `model.lm_head(hidden)`.
        Raises: UserError if a document is longer than `block_size`.
        """
        return self._states(self.wte(tokens), documents, rows, cache)

    def states_and_head(
        self, tokens: Tensor, documents: Documents | None = None, *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As calling the model, and the weight (V, C) that a loss of these states shall take for a tied head that learns.

        Of both together the gradient is made in one matrix: the embedding's is added to the rows of the head's that were
        looked up, and none is filled with zeros for it. None: take the head's own.
        """
        tied = self.wte.weight
        learns = self.config.tied_head and tied.requires_grad and torch.is_grad_enabled()
        if not learns or tied.dtype is torch.bfloat16:  # whose rows would be summed up in bfloat16
            return self._states(self.wte(tokens), documents, rows, None), None
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
            longest = embedded.shape[1]
            positions = torch.arange(longest, device=embedded.device)[None]
        if longest > self.config.block_size:
            raise UserError(
                f"a text has {longest:,} tokens; the model has {self.config.block_size:,} positions (a fixed part "
                f"of its weights). Shorten the text, or cut it with --data.truncation keep_end."
            )
        exact = self.ln_f.weight.dtype  # of the residual stream; matrices may be kept in less
        x = embedded.to(exact) + self.wpe(positions).to(exact)
        x = F.dropout(x, self.config.dropout, self.training)  # (B, T, C)
        chain = recomputed if self.activation_checkpointing == "selective" else plain
        if self.compiled:
            _mark_what_varies(rows, documents)
        for i, block in enumerate(self.h):
            wanted = rows if i == len(self.h) - 1 else None
            if self.activation_checkpointing is True and self.training:
                x = checkpoint(block, x, documents, wanted, use_reentrant=False)
            else:
                x = block(x, documents, wanted, cache, chain)
        if cache is not None:
            cache.advance(documents)
        return self.ln_f(x)  # type: ignore[no-any-return]

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
        for block in self.h:
            block.compile(**options)

    def new_cache(self, lengths: Sequence[int], room: int, copies: Sequence[int] | None = None) -> KVCache:
        """An empty cache, on the model's device and in its dtype, for prompts of these lengths and `room` tokens after each.

        copies: for every prompt how many sequences go on from it; it is read once. None: one each.
        """
        c, weight = self.config, self.ln_f.weight
        copies, end = copies or [1] * len(lengths), max(lengths)
        starts = [end - n for n, times in zip(lengths, copies, strict=True) for _ in range(times)]
        columns = math.ceil((end + room) / ALIGNED_COLUMNS) * ALIGNED_COLUMNS
        shape = (len(starts), c.n_head, columns, c.n_embd // c.n_head)
        keys = [weight.new_empty(shape) for _ in range(c.n_layer)]
        values = [weight.new_empty(shape) for _ in range(c.n_layer)]
        for held in (*keys, *values):
            held[:, :, : max(starts)] = 0  # masked, but 0 times whatever lay there might be no number
        first_columns, mask = torch.tensor(starts, device=weight.device), None
        if any(starts):
            before = torch.arange(columns, device=weight.device) < first_columns[:, None]
            mask = weight.new_zeros(before.shape).masked_fill(before, -math.inf)[:, None, None]
        return KVCache(keys, values, copies, starts, first_columns, end, mask)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """New weights as GPT-2's: normal 0.02, projections into the residual stream scaled by 1 / sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                depth = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth, generator=generator)

    def parameter_count(self) -> int:
        """Numbers in the model; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())
