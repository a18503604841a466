"""GPT-2 in one file: pre-norm transformer, learned positions, tanh-GELU, tied head.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Modules carry the names of the published
checkpoints (wte wpe h ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj ln_f), so that loading is a loop over
equal keys; only the four linear weights of a block are stored transposed there.

Shapes: B rows, T tokens a row, C width, H heads, D = C / H, N tokens in all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache, attend
from tunesmith.models.family import Family, Kept, Keys, LinearLayer
from tunesmith.models.linear import Linear
from tunesmith.models.model import Model
from tunesmith.models.published import Setting, read_settings, refuse_unless
from tunesmith.models.recompute import Chain, plain


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2. The defaults are the 124 M model's; GPT2.sizes has all four."""

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

    @property
    def family(self) -> Family:
        """GPT-2's."""
        return GPT2

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state."""
        return self.n_embd

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.n_head

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.n_layer

    @property
    def key_heads(self) -> int:
        """Every head of queries has keys and values of its own."""
        return self.n_head

    @property
    def head_width(self) -> int:
        """Numbers in a head's query, key or value."""
        return self.n_embd // self.n_head

    @property
    def longest(self) -> int:
        """Tokens of the longest text: the learned positions."""
        return self.block_size

    @property
    def inner(self) -> int:
        """Numbers between the two layers of the MLP."""
        return self.n_inner or 4 * self.n_embd

    def resized(
        self,
        *,
        depth: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        longest: int | None = None,
        dropout: float | None = None,
    ) -> GPTConfig:
        """The same with these values; a new width has an MLP of 4 times as much. Raises: UserError naming all that is wrong."""
        values: dict[str, Any] = {"n_layer": depth, "n_head": heads, "n_embd": width, "block_size": longest}
        values["dropout"] = dropout
        inner = self.n_inner if width is None else None
        return replace(self, n_inner=inner, **{name: value for name, value in values.items() if value is not None})


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
        return attend(self.layer, q, k, v, documents, cache, dropout).flatten(2)


class MLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them (GPT-2's own; not the exact one)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)

    def forward(self, x: Tensor, norm: nn.Module, chain: Chain) -> Tensor:
        """(..., C) -> (..., C), of what `norm` makes of x."""
        y: Tensor = chain(_gelu, chain(norm, x, self.c_fc), self.c_proj)
        return y


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


class GPT(Model):
    """GPT-2: token ids to hidden states; `lm_head` turns hidden states into logits.

    >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=6))
    >>> model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])).shape
    torch.Size([1, 4, 8])
    """

    LIMIT = "the model has {:,} positions (a fixed part of its weights)"
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.add_head()

    @property
    def embedding(self) -> nn.Embedding:
        """Of the tokens: its weight is (V, C)."""
        return self.wte

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.h

    @property
    def last_norm(self) -> nn.Module:
        """Before the head."""
        return self.ln_f

    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """(B, T, C), with the learned vectors of the positions."""
        x = embedded.to(self.exact_dtype) + self.wpe(positions).to(self.exact_dtype)
        return F.dropout(x, self.config.dropout, self.training)

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


# ---- on disk and in memory -------------------------------------------------------------------------------------------

COMPUTED = {  # settings of which only these values are computed here; without one transformers takes the first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
SETTINGS = {  # ours -> GPT-2's name in config.json, and the general one that transformers takes as well
    "n_layer": Setting("n_layer", "num_hidden_layers"),
    "n_head": Setting("n_head", "num_attention_heads"),
    "n_embd": Setting("n_embd", "hidden_size"),
    "vocab_size": Setting("vocab_size"),
    "block_size": Setting("n_positions", "max_position_embeddings", "n_ctx"),
    "dropout": Setting("resid_pdrop", kind=float),
    "layer_norm_epsilon": Setting("layer_norm_epsilon", kind=float),
    "n_inner": Setting("n_inner", optional=True),
    "tied_head": Setting("tie_word_embeddings", kind=bool),
}


def _from_hf(hf: Mapping[str, Any]) -> GPTConfig:
    refuse_unless(hf, COMPUTED, "GPT-2")
    return GPTConfig(**read_settings(hf, SETTINGS))


def _to_hf(config: GPTConfig) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": 0.02,
    }


def _recognises(hf: Mapping[str, Any]) -> bool:
    """By its architecture, or by GPT-2's own names for sizes."""
    stated = hf.get("architectures")
    stated = stated if isinstance(stated, list) else []
    return any(str(name).startswith("GPT2") for name in stated) or (not stated and {"n_embd", "n_layer"} <= hf.keys())


def _linear_layers(config: GPTConfig) -> dict[str, LinearLayer]:
    c, inner = config.n_embd, config.inner
    return {
        "attn.c_attn": LinearLayer(c, 3 * c),
        "attn.c_proj": LinearLayer(c, c),
        "mlp.c_fc": LinearLayer(c, inner),
        "mlp.c_proj": LinearLayer(inner, c),
    }


def _kept(config: GPTConfig) -> tuple[Kept, ...]:
    c, inner = config.n_embd, config.inner
    norm = 4 * c + 8  # its input, mean and deviation
    return (
        Kept(exact=norm),
        Kept(c, read_by=("attn.c_attn",), remade=True),
        Kept(3 * c),  # queries, keys, values
        Kept(c, exact=4 * config.n_head),  # what attention gives, and its log-sum-exp
        Kept(c, read_by=("attn.c_proj",), late=True, joined=True),
        Kept(exact=norm, late=True),
        Kept(c, read_by=("mlp.c_fc",), late=True, remade=True),
        Kept(inner, late=True),  # GELU's input
        Kept(inner, read_by=("mlp.c_proj",), late=True, remade=True),
    )


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    build=GPT,
    from_hf=_from_hf,
    to_hf=_to_hf,
    recognises=_recognises,
    keys=Keys(
        prefix="transformer.",
        embedding="wte",
        blocks="h",
        transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),  # Conv1D
        unused=(".attn.bias", ".attn.masked_bias"),  # causal masks that old checkpoints carry
    ),
    linear_layers=_linear_layers,
    vectors=lambda config: (config.n_embd,) * 4,
    outside=lambda config: ((config.block_size, config.n_embd), (config.n_embd,), (config.n_embd,)),
    kept=_kept,
    sizes={
        "gpt2": GPTConfig(),
        "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
        "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
        "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    },
    tokenizer="gpt2",
)
