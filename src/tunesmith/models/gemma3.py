"""Gemma 3, text only, in one file: four norms a block, norms on queries and keys, windows in most layers, GELU with a gate.

Gemma Team 2025, "Gemma 3 Technical Report", arXiv 2503.19786. Modules carry the names of the published checkpoints. Five of six
layers attend to the last `sliding_window` tokens only and turn by a RoPE base of their own; what else is as in Llama is from
there.

Shapes: B rows, T tokens a row, C width, H heads of queries, K heads of keys and values, D width of a head (not C / H).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models import llama
from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache, attend
from tunesmith.models.family import Family, Kept, Keys
from tunesmith.models.gated_mlp import GatedMLP
from tunesmith.models.llama import Llama, LlamaConfig
from tunesmith.models.model import Model
from tunesmith.models.published import Setting, read_settings, refuse_unless
from tunesmith.models.recompute import Chain, plain
from tunesmith.models.rms_norm import RMSNorm, rms_norm
from tunesmith.models.rotary import Rotary, read_rotary, rotary_to_hf, rotate

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Gemma3Config(LlamaConfig):
    """Shape of a Gemma 3. The defaults are those that transformers takes for what a config.json leaves out.

    layer_types: what each layer attends to; () becomes the published order, every sixth layer to all and the others to a window.
    query_pre_attn_scalar: scores are divided by its square root.
    """

    title: ClassVar[str] = "Gemma 3"

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 131072
    rope_theta: float = 1_000_000.0
    tied_head: bool = True
    rope_local_base_freq: float = 10_000.0
    query_pre_attn_scalar: int = 256
    sliding_window: int = 4096
    layer_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _every(6, self.depth))
        if len(self.layer_types) != self.depth or not {SLIDING, FULL}.issuperset(self.layer_types):
            raise UserError(
                f"not a {self.title} shape: layer_types = {list(self.layer_types)} for {self.depth} layers; expected "
                f"{SLIDING} or {FULL} for each"
            )

    @property
    def family(self) -> Family:
        """Gemma 3's."""
        return GEMMA3

    @property
    def local_rotary(self) -> Rotary:
        """How queries and keys turn in layers with a window."""
        return Rotary(self.head_width, self.rope_local_base_freq)

    def _sizes(self, depth: int | None, *others: Any) -> dict[str, Any]:
        """A new depth has the published order of layers."""
        return super()._sizes(depth, *others) | ({} if depth is None else {"layer_types": ()})


def _every(pattern: int, depth: int) -> tuple[str, ...]:
    """Of `pattern` layers the last attends to all."""
    return tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(depth))


class Norm(RMSNorm):
    """Whose weight is what is added to 1; times `scale`, which is fixed."""

    def __init__(self, width: int, eps: float, scale: float = 1.0) -> None:
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the weight's type."""
        return rms_norm(x, self.weight, self.eps, 1.0, self.scale)


class Attention(llama.Attention):
    """Llama's with norms on queries and keys, and in most layers a window."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config, Gemma3Config)
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        # the scores' scale is on the queries, for attention itself divides by the root of a head's width
        scale = math.sqrt(config.head_width / config.query_pre_attn_scalar)
        self.q_norm = Norm(config.head_width, config.rms_norm_eps, scale)
        self.k_norm = Norm(config.head_width, config.rms_norm_eps)

    def mix(
        self, heads: tuple[Tensor, ...], turn: tuple[Tensor, Tensor], documents: Documents | None, cache: Cache | None
    ) -> Tensor:
        """As Llama's."""
        q, k, v = heads
        q, k = (rotate(norm(z), *turn).to(v.dtype) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        dropout = self.dropout if self.training else 0.0
        return attend(self.layer, q, k, v, documents, cache, dropout, self.window).flatten(2)


class Block(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.width, config.intermediate_size, activation="gelu_tanh")
        self.input_layernorm = Norm(config.width, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.width, config.rms_norm_eps)
        self.pre_feedforward_layernorm = Norm(config.width, config.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(config.width, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None,
        rows: Tensor | None = None,
        cache: Cache | None = None,
        chain: Chain = plain,
        *turns: Tensor,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with `rows`, only those tokens leave attention and the result is (n, C)."""
        cos, sin = turns[:2] if self.self_attn.window is None else turns[2:]
        heads = chain(self.input_layernorm, x, self.self_attn.split)
        y = self.self_attn.mix(heads, (cos, sin), documents, cache)
        if rows is not None:
            x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        x = x + self.post_attention_layernorm(self.self_attn.o_proj(y))
        return x + self.post_feedforward_layernorm(self.mlp(x, self.pre_feedforward_layernorm, chain))  # type: ignore[no-any-return]


@cache
def _root(width: int, dtype: torch.dtype) -> float:
    return torch.tensor(math.sqrt(width), dtype=torch.float32).to(dtype).item()


class Gemma3(Llama):
    """Token ids to hidden states; `lm_head` turns hidden states into logits.

    >>> model = Gemma3(Gemma3Config(11, 8, 16, 2, num_attention_heads=2, num_key_value_heads=1, head_dim=4))
    >>> model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1]])).shape
    torch.Size([1, 4, 8])
    """

    config: Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        Model.__init__(self)
        self.config = config
        self.window = config.sliding_window if SLIDING in config.layer_types else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = Norm(config.width, config.rms_norm_eps)
        self.add_head()

    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        """(B, T, C), times sqrt(C), which is rounded to the type of the embedding, as the published model was trained."""
        return (embedded * _root(self.width, embedded.dtype)).to(self.exact_dtype)

    def for_blocks(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines for layers that attend to all, then for those with a window."""
        return *self.config.rotary.angles(positions), *self.config.local_rotary.angles(positions)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As Llama's, and norms that multiply by 1: their weights are 0."""
        super().init_weights(generator)
        for module in self.modules():
            if isinstance(module, Norm):
                nn.init.zeros_(module.weight)


# ---- on disk and in memory -------------------------------------------------------------------------------------------

COMPUTED = {  # settings of which only these values are computed here, or are not there
    "hidden_activation": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}
SETTINGS = llama.SETTINGS | {
    "attention_bias": Setting("attention_bias", kind=bool),
    "query_pre_attn_scalar": Setting("query_pre_attn_scalar"),
    "sliding_window": Setting("sliding_window", optional=True),
}


def _from_hf(hf: Mapping[str, Any]) -> Gemma3Config:
    refuse_unless(hf, COMPUTED, Gemma3Config.title)
    sizes = read_settings(hf, SETTINGS | {"pattern": Setting("sliding_window_pattern", optional=True)})
    pattern, depth = sizes.pop("pattern", 6), sizes.get("num_hidden_layers", Gemma3Config.num_hidden_layers)
    order = hf.get("layer_types") or _every(pattern, depth)
    if not isinstance(order, list | tuple) or not all(isinstance(kind, str) for kind in order):
        raise UserError(f"config.json holds layer_types = {order!r}; expected a list of {SLIDING} and {FULL}")
    if SLIDING in order and hf.get("sliding_window", 1) is None:
        raise UserError(f"config.json holds {SLIDING} among its layer_types, but no sliding_window; state its width")
    longest = sizes.get("max_position_embeddings", Gemma3Config.max_position_embeddings)
    return Gemma3Config(**sizes, **_rotary(hf, longest), layer_types=tuple(order))


def _rotary(hf: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Of the positions of both kinds of layers: in `rope_parameters` by kind, before transformers 5 under names of their own."""

    def stated(source: Mapping[str, Any], name: str) -> dict[str, Any]:
        value = source.get(name) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"config.json holds {name} = {value!r}; expected an object with rope_type and its numbers")
        return dict(value)

    by_kind = stated(hf, "rope_parameters")
    everywhere = {
        "rope_scaling": stated(by_kind, FULL) | stated(hf, "rope_scaling"),
        "rope_theta": hf.get("rope_theta", 1e6),
    }
    local = {"rope_scaling": stated(by_kind, SLIDING), "rope_theta": hf.get("rope_local_base_freq", 1e4)}
    base, scaling = read_rotary(everywhere, longest, "Gemma 3")
    local_base, local_scaling = read_rotary(local, longest, "Gemma 3")
    if local_scaling is not None:
        raise UserError(
            f"config.json asks for {local['rope_scaling']!r} in layers with a window, which tunesmith's Gemma 3 does not "
            "support; their positions are plain (default)"
        )
    return {"rope_theta": base, "rope_scaling": scaling, "rope_local_base_freq": local_base}


def _to_hf(config: Gemma3Config) -> dict[str, Any]:
    return {setting.names[0]: getattr(config, field) for field, setting in SETTINGS.items()} | {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": list(config.layer_types),
        **rotary_to_hf(config.rope_theta, config.rope_scaling),
        "rope_local_base_freq": config.rope_local_base_freq,
    }


def _recognises(hf: Mapping[str, Any]) -> bool:
    stated = hf.get("architectures")
    names = ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification")
    return isinstance(stated, list) and any(name in names for name in stated)


def _kept(config: Gemma3Config) -> tuple[Kept, ...]:
    c, inner = config.width, config.intermediate_size
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    norm = 4 * c + 4  # its input, and 1 / rms
    return (
        Kept(exact=norm),
        Kept(c, read_by=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), remade=True),
        Kept(exact=4 * (queries + keys) + 4 * (config.heads + config.key_heads)),  # what their norms read
        Kept(queries + 2 * keys),  # turned ones, and values
        Kept(queries, exact=4 * config.heads),  # what attention gives, and its log-sum-exp
        Kept(queries, read_by=("self_attn.o_proj",), late=True, joined=True),
        Kept(exact=2 * norm, late=True),  # of the norm after attention, and of that before the MLP
        Kept(c, read_by=("mlp.gate_proj", "mlp.up_proj"), late=True, remade=True),
        Kept(2 * inner, late=True),  # what gate and up give
        Kept(inner, read_by=("mlp.down_proj",), late=True, remade=True),
        Kept(exact=norm, late=True),
    )


GEMMA3 = Family(
    name="gemma3_text",
    title="Gemma 3",
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    build=Gemma3,
    from_hf=_from_hf,
    to_hf=_to_hf,
    recognises=_recognises,
    keys=Keys(
        prefix="model.",
        embedding="embed_tokens",
        blocks="layers",
        unused=("rotary_emb.inv_freq",),
    ),
    linear_layers=llama.linear_layers,
    vectors=lambda config: (config.width,) * 4 + (config.head_width,) * 2,
    outside=lambda config: ((config.width,),),
    kept=_kept,
    sizes={
        "google/gemma-3-270m": Gemma3Config(262144, 640, 2048, 18, 4, 1, 256, 32768, sliding_window=512),
        "google/gemma-3-1b-pt": Gemma3Config(262144, 1152, 6912, 26, 4, 1, 256, 32768, sliding_window=512),
    },
)
