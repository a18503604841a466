"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + scaling * B (A dropout(x)),   scaling = alpha / rank

A is (rank, in) and drawn at random, B is (out, rank) and starts at 0: a fresh adapter changes nothing. What W has no
need of any more is not computed: it gets no gradient, no weight-gradient product and no optimizer state.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.models.family import HEAD


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it; takes the layer's place in a model.

    >>> layer = LoRALinear(nn.Linear(8, 6), rank=2, alpha=4)
    >>> layer.lora_A.shape, layer.lora_B.shape, layer.scaling
    (torch.Size([2, 8]), torch.Size([6, 2]), 2.0)
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Raises: UserError if `rank` is below 1 or above what the layer's matrix can have."""
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise UserError(
                f"LoRA rank {rank} does not fit a layer of {base.in_features:,} inputs and {base.out_features:,} outputs; "
                f"expected 1 to {min(base.in_features, base.out_features):,}"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.scaling, self.dropout = rank, alpha / rank, dropout
        self.enabled = True
        self.unmerged: nn.Parameter | None = None  # the base's own weight while `merge` has put another in its place
        weight = base.weight
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=weight.device, dtype=weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=weight.device, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)  # as PEFT and the paper's own code

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        if not self.active:
            return y  # type: ignore[no-any-return]
        low = self.low(x).reshape(-1, self.rank)
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, self.lora_B.t()).view(y.shape)  # one pass over y, not two

    def low(self, x: Tensor) -> Tensor:
        """scaling * A dropout(x): (..., in) -> (..., rank)."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.lora_A) * self.scaling

    @property
    def active(self) -> bool:
        """Whether the adapter adds something that is not in the base's weight already."""
        return self.enabled and self.unmerged is None

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: (out, in)."""
        return self.scaling * (self.lora_B.double() @ self.lora_A.double())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def head_parts(head: nn.Module, hidden: Tensor, tied: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A head's weight, and what an adapter adds (`low_rank` in `losses`): the head is never computed in full.

    tied: what to take for its weight (`Model.states_and_head`), or None.
    """
    if isinstance(head, LoRALinear):
        return head.base.weight, (head.low(hidden), head.lora_B) if head.active else None
    assert isinstance(head, nn.Linear)
    return head.weight if tied is None else tied, None


# ---- putting adapters on a model and taking them off -----------------------------------------------------------------


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> layer of every adapter in `model`, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def find_targets(model: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers that `targets` means.

    targets: parts joined by commas: `all-linear` (all but the head), the end of a name (`c_attn`, `mlp.c_proj`,
        `lm_head`), or a pattern for the whole name (`h.0.*`, `*.attn.*`).
    Raises: UserError naming every part that fits no layer, and what there is.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    adapted: set[str] = set()
    unknown = []
    for part in (p.strip() for p in targets.split(",")):
        if part == "all-linear":
            fitting = {name for name in layers if name != HEAD}  # as in PEFT
        elif any(c in part for c in "*?["):
            fitting = {name for name in layers if fnmatch.fnmatchcase(name, part)}
        else:
            fitting = {name for name in layers if f".{name}".endswith(f".{part}")}
        if not fitting:
            unknown.append(part)
        adapted |= fitting
    if unknown:
        ends = dict.fromkeys(short_name(name) for name in layers)
        blocks = next((name.partition(".")[0] for name in layers if short_name(name) != name), "blocks")
        raise UserError(
            f"--lora.targets: no linear layer is called {', '.join(map(repr, unknown))}. There are {', '.join(ends)} "
            f"(in each block {blocks}.0, {blocks}.1, ...); or use all-linear, or patterns such as {blocks}.0.*"
        )
    return [name for name in layers if name in adapted]


def short_name(name: str) -> str:
    """A layer's name without its block: `h.3.attn.c_attn` -> `attn.c_attn`."""
    return re.sub(r"^\w+\.\d+\.", "", name)


def apply_lora(
    model: nn.Module,
    targets: str = "all-linear",
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Freeze `model` and put a fresh adapter beside each of the layers that `targets` means; returns their names.

    Args:
        targets: as in `find_targets`.
        rank: of the product that is added to each weight; 1 or more.
        alpha: the added product is scaled by alpha / rank.
        dropout: probability in [0, 1), before A, in training only.
        seed: of the A matrices; the global random state stays as it is.
    Raises: UserError if no layer fits, `rank` does not fit a layer, or the model has adapters already.
    """
    if lora_layers(model):
        raise UserError("the model already has adapters; merge and strip them first, or start from its base")
    names = find_targets(model, targets)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        replace_layer(model, name, LoRALinear(_linear(model, name), rank, alpha, dropout, generator))
    freeze_base(model)
    return names


def freeze_base(model: nn.Module) -> None:
    """Everything but the adapters gets no gradient."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the submodule `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its base: adapters add nothing. Afterwards each is as it was."""
    layers = list(lora_layers(model).values())
    before = [(layer.enabled, layer.base.weight) for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
            if layer.unmerged is not None:
                layer.base.weight = layer.unmerged
        yield
    finally:
        for layer, (enabled, weight) in zip(layers, before, strict=True):
            layer.enabled, layer.base.weight = enabled, weight


def merge(model: nn.Module) -> None:
    """Put W + scaling B A in the place of every adapted W; `unmerge` brings the very same W back.

    The sum is made in float64 and rounded once. A head that is tied to the embedding gets a weight of its own: the
    embedding must not change with it.
    """
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if layer.unmerged is None:
                weight = layer.base.weight
                object.__setattr__(layer, "unmerged", weight)  # no second parameter of the module
                merged = (weight.double() + layer.delta()).to(weight.dtype)
                layer.base.weight = nn.Parameter(merged, requires_grad=False)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.unmerged is not None:
            layer.base.weight = layer.unmerged
            object.__setattr__(layer, "unmerged", None)


def strip(model: nn.Module) -> None:
    """Replace every adapted layer by its base, with the weight that it has now: after `merge`, a plain model.

    Adapters froze the rest of the model; without them all of it can be trained again.
    """
    for name, layer in lora_layers(model).items():
        replace_layer(model, name, layer.base)
    model.requires_grad_(True)
