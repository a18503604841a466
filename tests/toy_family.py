"""A small Llama as a file of `models/` would add it: nothing in it is as in GPT-2 but the order of attention and MLP.

No positions in the weights but rotary ones, keys and values of fewer heads, norms without bias, a gated MLP, no biases, a
head that is not tied, no matrix stored transposed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.attention import attend_documents
from tunesmith.models.family import Family, Kept, Keys, LinearLayer
from tunesmith.models.linear import Linear
from tunesmith.models.model import Model
from tunesmith.models.published import Setting, read_settings, refuse_unless
from tunesmith.models.recompute import plain


@dataclass(frozen=True)
class ToyConfig:
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    hidden_size: int = 32
    intermediate_size: int = 56
    vocab_size: int = 64
    max_position_embeddings: int = 96
    dropout: float = 0.0
    tied_head: bool = False

    family = property(lambda self: TOY)
    width = property(lambda self: self.hidden_size)
    depth = property(lambda self: self.num_hidden_layers)
    heads = property(lambda self: self.num_attention_heads)
    key_heads = property(lambda self: self.num_attention_heads)  # the cache holds them repeated
    head_width = property(lambda self: self.hidden_size // self.num_attention_heads)
    inner = property(lambda self: 2 * self.intermediate_size)
    longest = property(lambda self: self.max_position_embeddings)

    def resized(self, *, depth=None, heads=None, width=None, longest=None, dropout=None):
        sizes = {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": width}
        sizes |= {"max_position_embeddings": longest, "dropout": dropout}
        return replace(self, **{name: size for name, size in sizes.items() if size is not None})


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D), rotated by the angles of its positions, (1 or B, T, 1, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
    def __init__(self, c: ToyConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.width, self.shared = layer, c.head_width, c.num_attention_heads // c.num_key_value_heads
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(c.width, 1e-6) for _ in range(2))
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, sizes in linear_layers(c).items():
            part, _, own = name.partition(".")
            setattr(getattr(self, part), own, Linear(sizes.inputs, sizes.outputs, bias=False))

    def forward(self, x, documents, rows=None, cache=None, chain=plain, cos=None, sin=None) -> Tensor:
        a, m, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (layer(h).unflatten(2, (-1, self.width)) for layer in (a.q_proj, a.k_proj, a.v_proj))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (z.repeat_interleave(self.shared, 2) for z in (k, v))
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, documents)
        elif documents is not None:
            y = attend_documents(q, k, v, documents)
        else:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        y = y.flatten(2)
        if rows is not None:
            x, y = x.flatten(0, 1)[rows], y.flatten(0, 1)[rows]
        x = x + a.o_proj(y)
        h = self.post_attention_layernorm(x)
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))


class Toy(Model):
    LIMIT = "the model was trained on texts of at most {:,} tokens"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = nn.RMSNorm(config.width, 1e-6)
        self.add_head()

    embedding = property(lambda self: self.embed_tokens)
    blocks = property(lambda self: self.layers)
    last_norm = property(lambda self: self.norm)

    def embed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        return embedded.to(self.exact_dtype)

    def for_blocks(self, positions: Tensor) -> tuple[Tensor, ...]:
        half = torch.arange(0, self.config.head_width, 2, device=positions.device) / self.config.head_width
        angles = positions[..., None, None] * 10_000.0 ** -torch.cat([half, half])
        return angles.cos(), angles.sin()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.1, generator=generator)


def linear_layers(c: ToyConfig) -> dict[str, LinearLayer]:
    keys = c.num_key_value_heads * c.head_width
    own = {
        "q_proj": (c.width, c.width),
        "k_proj": (c.width, keys),
        "v_proj": (c.width, keys),
        "o_proj": (c.width, c.width),
    }
    mlp = {"gate_proj": (c.width, c.intermediate_size), "up_proj": (c.width, c.intermediate_size)}
    mlp["down_proj"] = (c.intermediate_size, c.width)
    parts = {"self_attn": own, "mlp": mlp}
    return {f"{part}.{name}": LinearLayer(*sizes, bias=False) for part in parts for name, sizes in parts[part].items()}


SETTINGS = {
    "num_hidden_layers": Setting("num_hidden_layers"),
    "num_attention_heads": Setting("num_attention_heads"),
    "num_key_value_heads": Setting("num_key_value_heads"),
    "hidden_size": Setting("hidden_size"),
    "intermediate_size": Setting("intermediate_size"),
    "vocab_size": Setting("vocab_size"),
    "max_position_embeddings": Setting("max_position_embeddings"),
    "tied_head": Setting("tie_word_embeddings", kind=bool),
}


def from_hf(hf: Any) -> ToyConfig:
    refuse_unless(hf, {"hidden_act": ("silu",), "rope_scaling": (None,)}, "Llama")
    return ToyConfig(**read_settings(hf, SETTINGS))


def to_hf(config: ToyConfig) -> dict[str, Any]:
    return {setting.names[0]: getattr(config, field) for field, setting in SETTINGS.items()} | {"hidden_act": "silu"}


TOY = Family(
    name="llama",
    title="Llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    build=Toy,
    from_hf=from_hf,
    to_hf=to_hf,
    recognises=lambda hf: False,
    keys=Keys(prefix="model.", embedding="embed_tokens", blocks="layers"),
    linear_layers=linear_layers,
    vectors=lambda c: (c.width, c.width),
    outside=lambda c: ((c.width,),),
    kept=lambda c: (
        Kept(exact=4 * c.width + 4),
        Kept(exact=4 * c.width, read_by=("input_layernorm",)),  # torch keeps the quotient for the norm's own weight
        Kept(c.width, read_by=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Kept(4 * c.width, exact=4 * c.heads),
        Kept(c.width, read_by=("self_attn.o_proj",), late=True, joined=True),
        Kept(exact=4 * c.width + 4, late=True),
        Kept(exact=4 * c.width, read_by=("post_attention_layernorm",), late=True),
        Kept(c.width, read_by=("mlp.gate_proj", "mlp.up_proj"), late=True),
        Kept(3 * c.intermediate_size, late=True),
        Kept(c.intermediate_size, read_by=("mlp.down_proj",), late=True),
    ),
    sizes={},
)
