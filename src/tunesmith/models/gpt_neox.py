"""GPT-NeoX in one file (Pythia's architecture): attention and MLP side by side, partial rotary positions, a head of its own.

Black et al. 2022, "GPT-NeoX-20B", arXiv 2204.06745; Biderman et al. 2023, "Pythia", arXiv 2304.01373. Modules carry the names
of the published checkpoints. Queries, keys and values come from one matrix, head by head: (q, k, v) of the first head, then
of the second.

Shapes: B rows, T tokens a row, C width, H heads, D = C / H, N tokens in all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from tunesmith.models.published import Setting, read_settings, refuse_unless, refuse_windows
from tunesmith.models.recompute import Chain
from tunesmith.models.rotary import Rotary, Scaling, first_longest, read_rotary, rotary_to_hf, rotate

GELU = {"gelu": "none", "gelu_new": "tanh"}
"""hidden_act -> torch's name of the approximation."""


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Shape of a GPT-NeoX. The defaults are the 20 B model's; GPT_NEOX.sizes has Pythia's."""

    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    hidden_size: int = 6144
    intermediate_size: int = 24576
    vocab_size: int = 50432
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10_000.0
    rope_scaling: Scaling = None
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True
    attention_bias: bool = True
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    tied_head: bool = False

    def __post_init__(self) -> None:
        problems = [f"{k} = {v}" for k, v in vars(self).items() if type(v) is int and v < 1]
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = {self.num_attention_heads}"
            )
        elif not problems and (self.rotary_width < 2 or self.rotary_width % 2 or self.rotary_pct > 1):
            problems.append(
                f"rotary_pct = {self.rotary_pct:g} turns {self.rotary_width} of a head's {self.head_width} numbers; "
                f"expected an even number of them"
            )
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout = {self.dropout} is outside [0, 1)")
        if problems:
            raise UserError(f"not a GPT-NeoX shape: {'; '.join(problems)}")

    @property
    def family(self) -> Family:
        """GPT-NeoX's."""
        return GPT_NEOX

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state."""
        return self.hidden_size

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.num_attention_heads

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.num_hidden_layers

    @property
    def key_heads(self) -> int:
        """Every head of queries has keys and values of its own."""
        return self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Numbers in a head's query, key or value."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that positions turn: its first."""
        return int(self.head_width * self.rotary_pct)

    @property
    def longest(self) -> int:
        """Tokens of the longest text: those that the model was trained on."""
        return self.max_position_embeddings

    @property
    def inner(self) -> int:
        """Numbers between the two layers of the MLP."""
        return self.intermediate_size

    def resized(
        self,
        *,
        depth: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        longest: int | None = None,
        dropout: float | None = None,
    ) -> GPTNeoXConfig:
        """The same with these values; a new width has an MLP of 4 times as much. Raises: UserError naming all that is wrong."""
        values: dict[str, Any] = {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": width}
        values |= {"max_position_embeddings": longest, "dropout": dropout}
        values["intermediate_size"] = None if width is None else 4 * width
        return replace(self, **{name: value for name, value in values.items() if value is not None})


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions."""

    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.layer = config.heads, config.dropout, layer
        self.query_key_value = Linear(config.width, 3 * config.width, bias=config.attention_bias)
        self.dense = Linear(config.width, config.width, bias=config.attention_bias)

    def mix(self, qkv: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None, cache: Cache | None) -> Tensor:
        """Heads' outputs side by side, before the output projection. qkv: (B, T, 3 C); the result: (B, T, C)."""
        q, k, v = torch.unflatten(qkv, 2, (self.heads, -1)).chunk(3, 3)  # (B, T, H, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = v.contiguous()  # a part of qkv would keep all of it for backward, beside the turned q and k
        dropout = self.dropout if self.training else 0.0
        return attend(self.layer, q, k, v, documents, cache, dropout).flatten(2)


class MLP(nn.Module):
    """Two linear layers with GELU between them: the exact one, or what `hidden_act` says."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.gelu = partial(F.gelu, approximate=GELU[config.hidden_act])
        self.dense_h_to_4h = Linear(config.width, config.inner)
        self.dense_4h_to_h = Linear(config.inner, config.width)

    def forward(self, x: Tensor, norm: nn.Module, chain: Chain) -> Tensor:
        """(..., C) -> (..., C), of what `norm` makes of x."""
        return chain(self.gelu, chain(norm, x, self.dense_h_to_4h), self.dense_4h_to_h)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own; or one after the other, as in GPT-2."""

    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.dropout, self.parallel = config.dropout, config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None,
        rows: Tensor | None,
        cache: Cache | None,
        chain: Chain,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with `rows`, only those tokens leave attention and the result is (n, C)."""
        qkv = chain(self.input_layernorm, x, self.attention.query_key_value)
        y = self.attention.mix(qkv, cos, sin, documents, cache)
        if rows is not None:
            x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        added = F.dropout(self.attention.dense(y), self.dropout, self.training)
        read = x if self.parallel else x + added
        y = F.dropout(self.mlp(read, self.post_attention_layernorm, chain), self.dropout, self.training)
        return y + added + x if self.parallel else y + read


class GPTNeoX(Model):
    """GPT-NeoX: token ids to hidden states; `lm_head` turns hidden states into logits.

    >>> model = GPTNeoX(GPTNeoXConfig(2, 2, 16, 32, vocab_size=11))
    >>> model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])).shape
    torch.Size([1, 4, 16])
    """

    LIMIT = "the model was trained on texts of at most {:,} tokens"
    config: GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rotary_width, config.rotary_emb_base, config.rope_scaling)
        self.embed_in = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_layer_norm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.add_head()

    @property
    def embedding(self) -> nn.Embedding:
        """Of the tokens: its weight is (V, C)."""
        return self.embed_in

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.layers

    @property
    def last_norm(self) -> nn.Module:
        """Before the head."""
        return self.final_layer_norm

    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        """(B, T, C): the positions come in with attention."""
        return F.dropout(embedded.to(self.exact_dtype), self.config.dropout, self.training)

    def for_blocks(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines of the positions' angles."""
        return self.rotary.angles(positions)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """New weights as GPT-NeoX-20B's: normal sqrt(2 / (5 C)), projections into the residual stream 2 / (depth sqrt(C)).

        Wang & Komatsuzaki 2021 (GPT-J) and Nguyen & Salazar 2019, arXiv 1910.05895, as section 2.1 of the paper has it.
        """
        c = self.config.width
        into_stream = 2 / (self.config.depth * math.sqrt(c))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                projects = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                std = into_stream if projects else math.sqrt(2 / (5 * c))
                nn.init.normal_(parameter, std=std, generator=generator)


# ---- on disk and in memory -------------------------------------------------------------------------------------------

TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")  # one function
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu"} | dict.fromkeys(TANH, "gelu_new")
COMPUTED = {"hidden_act": tuple(ACTIVATIONS)}
SETTINGS = {
    "num_hidden_layers": Setting("num_hidden_layers"),
    "num_attention_heads": Setting("num_attention_heads"),
    "hidden_size": Setting("hidden_size"),
    "intermediate_size": Setting("intermediate_size"),
    "vocab_size": Setting("vocab_size"),
    "max_position_embeddings": Setting("max_position_embeddings"),
    "dropout": Setting("hidden_dropout", kind=float),
    "layer_norm_eps": Setting("layer_norm_eps", kind=float),
    "use_parallel_residual": Setting("use_parallel_residual", kind=bool),
    "attention_bias": Setting("attention_bias", kind=bool),
    "tied_head": Setting("tie_word_embeddings", kind=bool),
}


def _from_hf(hf: Mapping[str, Any]) -> GPTNeoXConfig:
    refuse_windows(hf, "GPT-NeoX")
    refuse_unless(hf, COMPUTED, "GPT-NeoX")
    sizes = read_settings(hf, SETTINGS)
    longest = sizes.get("max_position_embeddings", GPTNeoXConfig.max_position_embeddings)
    activation = ACTIVATIONS[hf.get("hidden_act", "gelu")]
    return GPTNeoXConfig(**sizes, **_rotary(hf, longest), hidden_act=activation)


def _rotary(hf: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Of the rotary positions, whose base and share have names of their own before transformers 5."""
    stated = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    part = None
    if isinstance(stated, Mapping):
        part = stated.get("partial_rotary_factor")
        stated = {name: value for name, value in stated.items() if name != "partial_rotary_factor"}
    renamed = {"rope_scaling": stated, "rope_theta": hf.get("rotary_emb_base", 10_000.0), **first_longest(hf)}
    base, scaling = read_rotary(renamed, longest, "GPT-NeoX")
    part = hf.get("rotary_pct", 0.25) if part is None else part
    if isinstance(part, bool) or not isinstance(part, int | float):
        raise UserError(f"config.json holds rotary_pct = {part!r}; expected the share of each head that turns, up to 1")
    return {"rotary_emb_base": base, "rotary_pct": float(part), "rope_scaling": scaling}


def _to_hf(config: GPTNeoXConfig) -> dict[str, Any]:
    return {setting.names[0]: getattr(config, field) for field, setting in SETTINGS.items()} | {
        "attention_dropout": config.dropout,
        "hidden_act": config.hidden_act,
        "rope_scaling": rotary_to_hf(config.rotary_emb_base, config.rope_scaling)["rope_scaling"],
        "rotary_emb_base": config.rotary_emb_base,
        "rotary_pct": config.rotary_pct,
        "initializer_range": 0.02,
    }


def _recognises(hf: Mapping[str, Any]) -> bool:
    """By its architecture, or by its own names for rotary positions."""
    stated = hf.get("architectures")
    stated = stated if isinstance(stated, list) else []
    return any(str(name).startswith("GPTNeoX") for name in stated) or (not stated and "rotary_pct" in hf)


def _linear_layers(config: GPTNeoXConfig) -> dict[str, LinearLayer]:
    c, inner = config.width, config.inner
    return {
        "attention.query_key_value": LinearLayer(c, 3 * c, config.attention_bias),
        "attention.dense": LinearLayer(c, c, config.attention_bias),
        "mlp.dense_h_to_4h": LinearLayer(c, inner),
        "mlp.dense_4h_to_h": LinearLayer(inner, c),
    }


def _kept(config: GPTNeoXConfig) -> tuple[Kept, ...]:
    c, inner, beside = config.width, config.inner, config.use_parallel_residual
    norm = 4 * c + 8  # its input, mean and deviation
    return (
        Kept(exact=norm),
        Kept(c, read_by=("attention.query_key_value",), remade=True),
        Kept(3 * c),  # queries, keys, values
        Kept(c, exact=4 * config.heads),  # what attention gives, and its log-sum-exp
        Kept(c, read_by=("attention.dense",), late=True, joined=True),
        Kept(exact=norm - 8, late=True, beside=beside, picked=beside),
        Kept(exact=8, late=True, beside=beside),
        Kept(c, read_by=("mlp.dense_h_to_4h",), late=True, remade=True, beside=beside),
        Kept(inner, late=True, beside=beside),  # GELU's input
        Kept(inner, read_by=("mlp.dense_4h_to_h",), late=True, remade=True, beside=beside),
    )


def _pythia(depth: int, heads: int, width: int, vocab_size: int = 50304) -> GPTNeoXConfig:
    return GPTNeoXConfig(depth, heads, width, 4 * width, vocab_size)


GPT_NEOX = Family(
    name="gpt_neox",
    title="GPT-NeoX",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    build=GPTNeoX,
    from_hf=_from_hf,
    to_hf=_to_hf,
    recognises=_recognises,
    keys=Keys(
        prefix="gpt_neox.",
        embedding="embed_in",
        blocks="layers",
        head="embed_out",
        unused=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),  # buffers of old checkpoints
    ),
    linear_layers=_linear_layers,
    vectors=lambda config: (config.width,) * 4,
    outside=lambda config: ((config.width,), (config.width,)),
    kept=_kept,
    sizes={
        "EleutherAI/pythia-70m": _pythia(6, 8, 512),
        "EleutherAI/pythia-160m": _pythia(12, 12, 768),
        "EleutherAI/pythia-410m": _pythia(24, 16, 1024),
        "EleutherAI/pythia-1b": _pythia(16, 8, 2048),
        "EleutherAI/pythia-1.4b": _pythia(24, 16, 2048),
    },
)
