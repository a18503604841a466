"""Rotary position embedding: pairs of numbers of every query and key are turned by angles that grow with the position.

Su et al. 2021, arXiv 2104.09864. Number i of a head and number i + R / 2 are a pair, as in all published files read here;
pair i turns by position * base ** (-2 i / R). Scores then depend on distances only, and no weight limits the length.

Shapes: B rows, T tokens a row, H heads, D numbers a head, the first R of which are turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.errors import UserError


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`, for longer texts than a model first learned from (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """As Llama 3.1: pairs whose full turn takes more than longest / low positions turn `factor` times as slowly.

    Those of less than longest / high turn as before, and what lies between goes over from one to the other.
    longest: positions that the model first learned from (`original_max_position_embeddings`).
    Source: Llama Team 2024, arXiv 2407.21783, section 3.4.1 names the base only; the rule is that of its published code.
    """

    factor: float
    low: float
    high: float
    longest: int


Scaling = LinearScaling | Llama3Scaling | None


@dataclass(frozen=True)
class Rotary:
    """width: R, even. base: what the angles are powers of (`rope_theta`)."""

    width: int
    base: float = 10_000.0
    scaling: Scaling = None

    def frequencies(self, device: torch.device | str = "cpu") -> Tensor:
        """Angle of each pair at position 1, in radians: (R / 2,) float32, in the steps of transformers' own rounding."""
        exponents = torch.arange(0, self.width, 2, device=device).float() / self.width
        turns = 1.0 / self.base**exponents
        if self.scaling is None:
            return turns
        slow = turns / self.scaling.factor
        if isinstance(self.scaling, LinearScaling):
            return slow
        low, high, longest = self.scaling.low, self.scaling.high, self.scaling.longest
        length = 2 * math.pi / turns  # positions of a full turn
        share = (longest / length - low) / (high - low)
        between = (1 - share) * slow + share * turns
        return torch.where(length > longest / low, slow, torch.where(length < longest / high, turns, between))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rotate`. positions: (1 or B, T) int64; each result: (1 or B, T, 1, R / 2) float32."""
        angles = positions[..., None, None].float() * self.frequencies(positions.device)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) with the pairs among its first R numbers turned; cos and sin as `Rotary.angles` gives them.

    Computed in float32 at least and rounded once to x's type.
    """
    if torch.compiler.is_compiling():
        return _turned(x, cos, sin)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    """Keeps the angles alone for backward, which turns back; plain operations would keep four tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    if torch.compiler.is_compiling() or x.dtype is not cos.dtype:
        a, b, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
        turned = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
        return torch.cat([*turned, rest], -1)
    # into the places where they belong: one pass each over halves of x, and no tensor beside the result
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y[..., half : 2 * half]).addcmul_(a, sin)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y


# ---- in config.json --------------------------------------------------------------------------------------------------


def read_rotary(hf: Mapping[str, Any], longest: int, title: str, base: float = 10_000.0) -> tuple[float, Scaling]:
    """Base and scaling in a `config.json`: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` with both.

    longest: the model's. base: where none is stated.
    Raises: UserError naming a kind of scaling that is not computed here, or a value that is none.
    """
    stated = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise UserError(
            f"config.json holds rope_scaling = {stated!r}; expected an object with rope_type and its numbers"
        )
    kind = stated.get("rope_type", stated.get("type", "default"))
    part = stated.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    nested = [f"{name} = {value!r}" for name, value in stated.items() if isinstance(value, Mapping)]
    odd = [f"rope_type = {kind!r}"] * (kind not in ("default", "linear", "llama3"))
    odd += [f"partial_rotary_factor = {part!r}"] * (part not in (None, 1))
    if odd or nested:
        raise UserError(
            f"config.json asks for {', '.join(odd + nested)}, which tunesmith's {title} does not support; its positions are "
            "plain (default), linear or llama3"
        )

    def number(name: str, *found: Any) -> float:
        value = next((value for value in found if value is not None), None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"config.json holds {name} = {value!r}; expected a number above 0")
        return float(value)

    base = number("rope_theta", stated.get("rope_theta"), hf.get("rope_theta", base))
    if kind == "default":
        return base, None
    factor = number("factor", stated.get("factor"))
    if kind == "linear":
        return base, LinearScaling(factor)
    name = "original_max_position_embeddings"
    first = number(
        name, first_longest(hf).get(name), stated.get(name), longest
    )  # transformers believes them in this order
    low, high = (number(name, stated.get(name)) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise UserError(
            f"config.json holds low_freq_factor = {low:g} and high_freq_factor = {high:g}; expected a higher high"
        )
    return base, Llama3Scaling(factor, low, high, int(first))


def first_longest(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Positions that a model first learned from, where they stand beside `rope_scaling` (`original_max_position_embeddings`)."""
    return {name: value for name, value in hf.items() if name == "original_max_position_embeddings"}


def rotary_to_hf(base: float, scaling: Scaling) -> dict[str, Any]:
    """The reverse, in the older form, which all versions of transformers read."""
    stated: dict[str, Any] | None = None
    if isinstance(scaling, LinearScaling):
        stated = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        stated = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.longest,
        }
    return {"rope_theta": base, "rope_scaling": stated}
