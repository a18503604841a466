"""Llama in one file: pre-norm transformer, rotary positions, grouped-query attention, SwiGLU; Mistral without a window too.

Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Llama Team 2024, arXiv 2407.21783. SmolLM2 and TinyLlama are of this
shape. Modules carry the names of the published checkpoints (embed_tokens layers input_layernorm self_attn.q_proj ... norm).

Shapes: B rows, T tokens a row, C width, H heads of queries, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache, attend
from tunesmith.models.family import Family, Kept, Keys, LinearLayer
from tunesmith.models.gated_mlp import GatedMLP
from tunesmith.models.linear import Linear, cast_once
from tunesmith.models.model import Model
from tunesmith.models.published import Setting, read_settings, refuse_unless, refuse_windows
from tunesmith.models.recompute import Chain, plain
from tunesmith.models.rms_norm import RMSNorm
from tunesmith.models.rotary import Llama3Scaling, Rotary, Scaling, read_rotary, rotary_to_hf, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama. The defaults are those that transformers takes for what a config.json leaves out.

    num_key_value_heads, head_dim: None becomes as many heads as of queries, and their share of the width.
    """

    title: ClassVar[str] = "Llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Scaling = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        uneven = self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        problems = [
            f"{name} = {value}"
            for name, value in vars(self).items()
            if isinstance(value, int) and not isinstance(value, bool) and value < 1
        ]
        if not problems and self.heads % self.key_heads:
            problems.append(
                f"num_attention_heads = {self.heads} is not a multiple of num_key_value_heads = {self.key_heads}"
            )
        if not problems and uneven:
            problems.append(f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = {self.heads}")
        elif not problems and self.head_width % 2:
            problems.append(f"head_dim = {self.head_width} is odd, and its numbers turn in pairs")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout = {self.dropout} is outside [0, 1)")
        if problems:
            raise UserError(f"not a {self.title} shape: {'; '.join(problems)}")

    @property
    def family(self) -> Family:
        """Llama's."""
        return LLAMA

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state."""
        return self.hidden_size

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.num_hidden_layers

    @property
    def heads(self) -> int:
        """Attention heads of queries."""
        return self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Attention heads of keys and values, each shared by the same number of queries' heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Numbers in a head's query, key or value."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def inner(self) -> int:
        """Numbers between the layers of the MLP: gate and up."""
        return 2 * self.intermediate_size

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model learned from."""
        return self.max_position_embeddings

    @property
    def rotary(self) -> Rotary:
        """How queries and keys turn."""
        return Rotary(self.head_width, self.rope_theta, self.rope_scaling)

    @property
    def key_bias(self) -> bool:
        """Whether the layers that make queries, keys and values have biases."""
        return self.attention_bias

    def resized(
        self,
        *,
        depth: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        longest: int | None = None,
        dropout: float | None = None,
    ) -> Self:
        """The same with these values. Raises: UserError naming all that is wrong.

        A new width keeps the MLP's share of it, in multiples of 8; new heads share keys as far as their number allows.
        """
        return replace(self, **self._sizes(depth, heads, width, longest, dropout))

    def _sizes(
        self, depth: int | None, heads: int | None, width: int | None, longest: int | None, dropout: float | None
    ) -> dict[str, Any]:
        """What `resized` changes."""
        values: dict[str, Any] = {"num_hidden_layers": depth, "max_position_embeddings": longest, "dropout": dropout}
        if width is not None:
            inner = 8 * math.ceil(self.intermediate_size * width / self.width / 8)
            values |= {"hidden_size": width, "intermediate_size": inner}
        if heads is not None:
            shared = heads if self.key_heads == self.heads else math.gcd(heads, self.key_heads)
            values |= {"num_attention_heads": heads, "num_key_value_heads": shared}
        given = {name: value for name, value in values.items() if value is not None}
        if self.head_width * self.heads == self.width:
            given["head_dim"] = None
        return given


class Attention(nn.Module):
    """Causal self-attention; heads of queries share heads of keys and values."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.head_width = layer, config.dropout, config.head_width
        c, queries, keys = config.width, config.heads * config.head_width, config.key_heads * config.head_width
        self.q_proj = Linear(c, queries, bias=config.key_bias)
        self.k_proj = Linear(c, keys, bias=config.key_bias)
        self.v_proj = Linear(c, keys, bias=config.key_bias)
        self.o_proj = Linear(queries, c, bias=config.attention_bias)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, K, D) of x (B, T, C)."""
        x = cast_once(x)
        q, k, v = (
            torch.unflatten(layer(x), 2, (-1, self.head_width)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def mix(
        self, heads: tuple[Tensor, ...], turn: tuple[Tensor, Tensor], documents: Documents | None, cache: Cache | None
    ) -> Tensor:
        """Heads' outputs side by side, before the output projection: (B, T, H D). heads: as `split` gives them."""
        q, k, v = heads
        q, k = rotate(q, *turn).to(v.dtype), rotate(k, *turn).to(v.dtype)
        return attend(self.layer, q, k, v, documents, cache, self.dropout if self.training else 0.0).flatten(2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = GatedMLP(config.width, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None,
        rows: Tensor | None = None,
        cache: Cache | None = None,
        chain: Chain = plain,
        *turn: Tensor,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with `rows`, only those tokens leave attention and the result is (n, C)."""
        cos, sin = turn
        heads = chain(self.input_layernorm, x, self.self_attn.split)
        y = self.self_attn.mix(heads, (cos, sin), documents, cache)
        if rows is not None:
            x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        x = x + self.self_attn.o_proj(y)
        return x + self.mlp(x, self.post_attention_layernorm, chain)  # type: ignore[no-any-return]


class Llama(Model):
    """Token ids to hidden states; `lm_head` turns hidden states into logits.

    >>> model = Llama(LlamaConfig(11, 8, 16, 2, num_attention_heads=2, num_key_value_heads=1))
    >>> model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])).shape
    torch.Size([1, 4, 8])
    """

    LIMIT = "the model learned from texts of at most {:,}"
    attention: ClassVar[type[Attention]] = Attention
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, self.attention(config, i)) for i in range(config.depth))
        self.norm = RMSNorm(config.width, config.rms_norm_eps)
        self.add_head()

    @property
    def embedding(self) -> nn.Embedding:
        """Of the tokens: its weight is (V, C)."""
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.layers

    @property
    def last_norm(self) -> nn.Module:
        """Before the head."""
        return self.norm

    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        """(B, T, C), without anything of the positions."""
        return embedded.to(self.exact_dtype)

    def for_blocks(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines of the angles by which queries and keys turn."""
        return self.config.rotary.angles(positions)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """New weights: normal `initializer_range`, norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)


# ---- on disk and in memory -------------------------------------------------------------------------------------------

SETTINGS = {
    "vocab_size": Setting("vocab_size"),
    "hidden_size": Setting("hidden_size"),
    "intermediate_size": Setting("intermediate_size"),
    "num_hidden_layers": Setting("num_hidden_layers"),
    "num_attention_heads": Setting("num_attention_heads"),
    "num_key_value_heads": Setting("num_key_value_heads", optional=True),
    "head_dim": Setting("head_dim", optional=True),
    "max_position_embeddings": Setting("max_position_embeddings"),
    "rms_norm_eps": Setting("rms_norm_eps", kind=float),
    "initializer_range": Setting("initializer_range", kind=float, optional=True),
    "dropout": Setting("attention_dropout", kind=float, optional=True),
    "tied_head": Setting("tie_word_embeddings", kind=bool),
}
BIASES = {name: Setting(name, kind=bool) for name in ("attention_bias", "mlp_bias")}


def read_shape(
    hf: Mapping[str, Any], config: type[LlamaConfig], settings: Mapping[str, Setting], activation: str = "silu"
) -> dict[str, Any]:
    """Field -> value of what Llama and its like have in common in config.json. Raises: UserError naming what is wrong."""
    refuse_unless(hf, {"hidden_act": (activation,)}, config.title)
    sizes = read_settings(hf, settings)
    longest = sizes.get("max_position_embeddings", config.max_position_embeddings)
    base, scaling = read_rotary(hf, longest, config.title)
    return sizes | {"rope_theta": base, "rope_scaling": scaling}


def shape_to_hf(config: LlamaConfig, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The reverse of `read_shape`."""
    stated = {setting.names[0]: getattr(config, field) for field, setting in settings.items()}
    return {"hidden_act": "silu", **stated, **rotary_to_hf(config.rope_theta, config.rope_scaling)}


def linear_layers(config: LlamaConfig) -> dict[str, LinearLayer]:
    """A block's, in forward order."""
    c, inner = config.width, config.intermediate_size
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    return {
        "self_attn.q_proj": LinearLayer(c, queries, config.key_bias),
        "self_attn.k_proj": LinearLayer(c, keys, config.key_bias),
        "self_attn.v_proj": LinearLayer(c, keys, config.key_bias),
        "self_attn.o_proj": LinearLayer(queries, c, config.attention_bias),
        "mlp.gate_proj": LinearLayer(c, inner, config.mlp_bias),
        "mlp.up_proj": LinearLayer(c, inner, config.mlp_bias),
        "mlp.down_proj": LinearLayer(inner, c, config.mlp_bias),
    }


def kept(config: LlamaConfig) -> tuple[Kept, ...]:
    """What autograd keeps of a token in a block."""
    c, inner = config.width, config.intermediate_size
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    norm = 4 * c + 4  # its input, and 1 / rms
    return (
        Kept(exact=norm),
        Kept(c, read_by=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), remade=True),
        Kept(queries + 2 * keys),  # turned ones, and values
        Kept(queries, exact=4 * config.heads),  # what attention gives, and its log-sum-exp
        Kept(queries, read_by=("self_attn.o_proj",), late=True, joined=True),
        Kept(exact=norm, late=True),
        Kept(c, read_by=("mlp.gate_proj", "mlp.up_proj"), late=True, remade=True),
        Kept(2 * inner, late=True),  # what gate and up give
        Kept(inner, read_by=("mlp.down_proj",), late=True, remade=True),
    )


def _from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    refuse_windows(hf, LlamaConfig.title)
    return LlamaConfig(**read_shape(hf, LlamaConfig, SETTINGS | BIASES))


def _recognises(hf: Mapping[str, Any]) -> bool:
    stated = hf.get("architectures")
    return isinstance(stated, list) and any(str(name).startswith("Llama") for name in stated)


_SMOL = LlamaConfig(
    49152, 576, 1536, 30, 9, 3, None, 8192, 1e-5, rope_theta=1e5, tied_head=True, initializer_range=1 / 24
)
_LONG = Llama3Scaling(32.0, 1.0, 4.0, 8192)
_LLAMA3 = LlamaConfig(128256, 2048, 8192, 16, 32, 8, None, 131072, 1e-5, 5e5, _LONG, tied_head=True)

LLAMA = Family(
    name="llama",
    title="Llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    build=Llama,
    from_hf=_from_hf,
    to_hf=lambda config: shape_to_hf(config, SETTINGS | BIASES),
    recognises=_recognises,
    keys=Keys(
        prefix="model.",
        embedding="embed_tokens",
        blocks="layers",
        unused=("rotary_emb.inv_freq",),  # angles that old checkpoints carry
    ),
    linear_layers=linear_layers,
    vectors=lambda config: (config.width,) * 2,
    outside=lambda config: ((config.width,),),
    kept=kept,
    sizes={
        "HuggingFaceTB/SmolLM2-135M": _SMOL,
        "HuggingFaceTB/SmolLM2-360M": replace(
            _SMOL,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            initializer_range=0.02,
        ),
        "HuggingFaceTB/SmolLM2-1.7B": LlamaConfig(
            49152, 2048, 8192, 24, 32, None, None, 8192, 1e-5, rope_theta=1.3e5, tied_head=True
        ),
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": LlamaConfig(32000, 2048, 5632, 22, 32, 4, rms_norm_eps=1e-5),
        "meta-llama/Llama-3.2-1B": _LLAMA3,
        "meta-llama/Llama-3.2-3B": replace(
            _LLAMA3, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
        ),
    },
)
