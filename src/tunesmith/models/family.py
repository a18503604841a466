"""`Family`: all that depends on an architecture. Each has a file of its own in this wing, which ends in its Family.

No torch here: a plan counts from shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head"  # every model here has this attribute; Keys.head is its published name


class Config(Protocol):
    """The shape of a model: a frozen dataclass of its architecture's own, whose fields keep the names of its publication."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def family(self) -> Family: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def tied_head(self) -> bool:
        """Whether the head's weight is the embedding's."""

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state."""

    @property
    def depth(self) -> int:
        """Blocks."""

    @property
    def heads(self) -> int:
        """Attention heads of queries."""

    @property
    def key_heads(self) -> int:
        """Attention heads of keys and values: fewer than of queries where these share them."""

    @property
    def head_width(self) -> int:
        """Numbers in a head's query, key or value."""

    @property
    def inner(self) -> int:
        """Numbers between the layers of a block's MLP."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model reads."""

    def resized(
        self,
        *,
        depth: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        longest: int | None = None,
        dropout: float | None = None,
    ) -> Self:
        """The same with these values; what follows from a size follows it. Raises: UserError naming all that is wrong with it."""


class LinearLayer(NamedTuple):
    """The sizes of a linear layer. bias: whether it has one."""

    inputs: int
    outputs: int
    bias: bool = True

    @property
    def matrix(self) -> int:
        """Numbers in its matrix: multiplications a token."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of one token between a block's forward and its backward, of one operation.

    numbers: in the type of the arithmetic, 2 or 4 bytes. exact: bytes that do not depend on it (the residual stream that a
    norm reads is float32, like a norm's statistics and attention's log-sum-exp).
    read_by: the linear layers (or norms) whose weights need it for their gradient: it is kept if one of them learns; empty:
    always kept.
    late: comes after attention, which in the last block only tokens that carry loss leave.
    remade: cheap to compute again: not kept with activation checkpointing "selective".
    joined: a copy of attention's result, made where documents share a row or only some tokens leave attention.
    beside: in a branch that starts at the block's input, as attention does. picked: the part of that input which such a branch
    keeps where only some tokens leave attention; elsewhere it is the tensor that attention's norm keeps.
    """

    numbers: int = 0
    exact: int = 0
    read_by: tuple[str, ...] = ()
    late: bool = False
    remade: bool = False
    joined: bool = False
    beside: bool = False
    picked: bool = False


@dataclass(frozen=True)
class Keys:
    """How the weights are called and laid out in published files; here they have the same names without the prefix.

    prefix: stands before every name but the head's. embedding, blocks: the modules of that kind, without the prefix.
    head: the head's name there. transposed: ends of the names of matrices that are stored (in, out).
    unused: ends of the names of stored tensors that are no weights (masks of old versions).
    """

    prefix: str
    embedding: str
    blocks: str
    head: str = HEAD
    transposed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def theirs(self, name: str) -> str:
        """A module's or weight's name in published files.

        >>> Keys(prefix="transformer.", embedding="wte", blocks="h").theirs("h.0.attn.c_attn")
        'transformer.h.0.attn.c_attn'
        """
        module, dot, rest = name.partition(".")
        return f"{self.head}{dot}{rest}" if module == HEAD else self.prefix + name

    def module(self, name: str) -> str:
        """A module's or weight's name in transformers' model, which adapters go by: its head is `lm_head` whatever files say."""
        return name if name.partition(".")[0] == HEAD else self.theirs(name)

    def ours(self, key: str) -> str:
        """The name here of what is called `key` in published files or in transformers; with or without the prefix."""
        module, dot, rest = key.partition(".")
        return f"{HEAD}{dot}{rest}" if module == self.head else key.removeprefix(self.prefix)

    def turned(self, name: str, weight: Tensor) -> Tensor:
        """A weight of ours as published files store it, or one of theirs as it is here: transposed, or the same."""
        return weight.t() if self.is_transposed(name) else weight

    def is_transposed(self, name: str) -> bool:
        """Whether published files store this weight, called as here or as there, (in, out)."""
        return name.endswith(self.transposed)


@dataclass(frozen=True)
class Family:
    """An architecture. Functions take its own configuration class.

    name: Hugging Face's `model_type`. title: in messages. causal, classifier: the classes in transformers.
    build: the class of the model (`model.build_model`).
    from_hf: a `config.json`, read as transformers reads it, to a configuration; raises UserError naming what is asked for
        and not computed here. to_hf: the reverse, without the entries that all families share (`files.weights.config_to_hf`).
    recognises: whether a `config.json` without model_type is of this family.
    linear_layers: name within a block -> sizes, of every linear layer of a block, in forward order.
    vectors: sizes of a block's other weights (norms). outside: shapes of the weights that are in no block, besides
        embedding and head.
    kept: of a block, in forward order.
    sizes: published configurations by their names on the hub. tokenizer: theirs, where it comes with this package.
    """

    name: str
    title: str
    causal: str
    classifier: str
    build: Callable[[Any], Any]
    from_hf: Callable[[Mapping[str, Any]], Config]
    to_hf: Callable[[Any], dict[str, Any]]
    recognises: Callable[[Mapping[str, Any]], bool]
    keys: Keys
    linear_layers: Callable[[Any], Mapping[str, LinearLayer]]
    vectors: Callable[[Any], tuple[int, ...]]
    outside: Callable[[Any], tuple[tuple[int, ...], ...]]
    kept: Callable[[Any], tuple[Kept, ...]]
    sizes: Mapping[str, Config]
    tokenizer: str | None = None

    def tensor_sizes(self, config: Config) -> list[int]:
        """Numbers in each weight of a model of that shape; a tied head counts once."""
        linear = self.linear_layers(config).values()
        block = [n for layer in linear for n in (layer.matrix, layer.outputs * layer.bias) if n]
        block += self.vectors(config)
        ends = [config.vocab_size * config.width] * (1 if config.tied_head else 2)
        return block * config.depth + ends + [math.prod(sizes) for sizes in self.outside(config)]

    def count(self, config: Config) -> int:
        """Numbers in a model of that shape."""
        return sum(self.tensor_sizes(config))

    def late_layers(self, config: Config) -> frozenset[str]:
        """The linear layers of a block that come after attention."""
        return frozenset(name for kept in self.kept(config) if kept.late for name in kept.read_by)
