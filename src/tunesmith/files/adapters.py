"""LoRA adapters on disk, in PEFT's format: those trained here load in PEFT, and PEFT's load here."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError, first_three
from tunesmith.files.adapted_weights import AdaptedWeights, apply, take
from tunesmith.files.weights import read_pickled, read_safetensors, write_safetensors
from tunesmith.jsontext import read_json, write_json
from tunesmith.models.known import titles
from tunesmith.models.lora import LoRALinear, freeze_base, lora_layers, merge, replace_layer, short_name, strip
from tunesmith.models.model import Model
from tunesmith.models.reward_head import SCORE

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FINGERPRINT = "base_sha256"  # in the metadata of adapter_model.safetensors, which PEFT does not mind
FROM_HERE = "base_from_here"  # there too: the base's path from the adapter's directory, for what was moved as a whole
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's starts that put other weights into the base
VARIANTS = (  # settings of LoRA that compute something else
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
PREFIX = "base_model.model."


def save_adapter(
    model: Model, directory: Path, *, base: str, fingerprint: str, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, beside what is there.

    Args:
        base: name or directory of the base model, where PEFT's AutoPeftModel and `files.names.load` look for it.
        fingerprint: of the base's weights (`weights.weights_fingerprint`).
        extra: weights that were trained in full beside the adapters, by name (a reward model's `score.weight`).
    """
    layers, extra, keys = lora_layers(model), extra or {}, model.family.keys
    directory.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, layer in layers.items():
        state[f"{PREFIX}{keys.module(name)}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        state[f"{PREFIX}{keys.module(name)}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    state |= {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in extra.items()}
    metadata = {"format": "pt", FINGERPRINT: fingerprint}
    if base != "sample" and (here := Path(base).expanduser()).is_dir():
        metadata[FROM_HERE] = os.path.relpath(here.resolve(), directory.resolve())
    write_safetensors(state, directory / WEIGHTS, metadata)
    first = next(iter(layers.values()))
    ends = list(dict.fromkeys(short_name(name) for name in layers))
    linear = [n.removesuffix(".base") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    everywhere = len(layers) == sum(short_name(name) in ends for name in linear)

    def alpha(layer: LoRALinear) -> float:
        return layer.scaling * layer.rank

    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if extra else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": alpha(first),
        "lora_dropout": first.dropout,
        "rank_pattern": {keys.module(n): m.rank for n, m in layers.items() if m.rank != first.rank},
        "alpha_pattern": {keys.module(n): alpha(m) for n, m in layers.items() if alpha(m) != alpha(first)},
        "target_modules": ends if everywhere else [keys.module(name) for name in layers],
        "fan_in_fan_out": any(keys.is_transposed(f"{name}.weight") for name in layers),
        "bias": "none",
        "modules_to_save": [name.rpartition(".")[0] for name in extra] or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(directory / CONFIG, config)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies on disk.

    base: its recorded name or path; from_here: its path from the adapter's directory, "" where none is known.
    layers: module name -> (A, B, alpha / rank). extra: other weights by name. copies: module name -> the base's weight,
    which PEFT stores beside an adapter on the head. adapted: what else changes in the base.
    """

    where: str
    base: str
    from_here: str
    fingerprint: str
    dropout: float
    layers: dict[str, tuple[Tensor, Tensor, float]]
    extra: dict[str, Tensor]
    copies: dict[str, Tensor]
    adapted: AdaptedWeights


def read_adapter(directory: Path) -> AdapterFiles:
    """A LoRA adapter in PEFT's format, ours or PEFT's own.

    Raises: UserError if a file is missing or broken, or uses a variant that is not supported here; the message names the way out.
    """
    config = read_json(directory / CONFIG)
    if odd := _not_computed(config):
        raise UserError(
            f"{directory / CONFIG} uses {', '.join(odd)}; tunesmith computes plain LoRA without biases. {_remedy(directory, config)}"
        )
    tensors, metadata, file = _tensors(directory)
    halves: dict[str, dict[str, Tensor]] = {}
    extra, copies, adapted = {}, {}, AdaptedWeights()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            halves.setdefault(match[1], {})[match[2]] = value
        elif name == SCORE:
            extra[name] = value
        elif match := re.fullmatch(r"(.+)\.base_layer\.weight", name):
            copies[match[1]] = value
        elif not take(name, value, config, adapted):
            raise UserError(
                f"{file} holds {key}, which is not part of a LoRA adapter for {titles()}. {_remedy(directory, config)}"
            )
    layers = {}
    for name, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].shape[0] != half["B"].shape[-1]:
            raise UserError(f"{file}: the two matrices of {name} do not match; save the adapter again")
        layers[name] = (half["A"], half["B"], _scaling(directory, config, name, half["A"].shape[0]))
    for name, half in adapted.low_rank.items():
        adapted.scaling[name] = _scaling(directory, config, name, len(half.get("A", ())) or 1)
    if not layers and not adapted:
        raise UserError(f"{file} holds no adapter")
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path is {base!r}, expected a name or directory")
    fingerprint, dropout = metadata.get(FINGERPRINT, ""), _number(directory, config, "lora_dropout", 0.0)
    from_here = metadata.get(FROM_HERE, "")
    return AdapterFiles(str(directory), base, from_here, fingerprint, dropout, layers, extra, copies, adapted)


def _tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """Tensors, metadata and the file that they are from: safetensors, or the .bin of PEFT before 0.6."""
    old = directory / OLD_WEIGHTS
    if old.exists() and not (directory / WEIGHTS).exists():
        return read_pickled(old), {}, old
    return *read_safetensors(directory / WEIGHTS), directory / WEIGHTS


def _not_computed(config: Mapping[str, Any]) -> list[str]:
    """Settings of an adapter_config.json that ask for anything but plain LoRA."""
    odd = [f"peft_type {config['peft_type']!r}"] if config.get("peft_type", "LORA") != "LORA" else []
    odd += [key for key in VARIANTS if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    start = str(config.get("init_lora_weights"))
    return odd + ([f"init_lora_weights {start!r} (it changes the base)"] if start.startswith(CHANGES_BASE) else [])


def _remedy(directory: Path, config: Mapping[str, Any]) -> str:
    """How to have PEFT merge a variant that is not supported here."""
    if any(part in str(config.get("peft_type")) for part in ("PROMPT", "PREFIX", "P_TUNING")):
        return "Such an adapter does not change weights and cannot be merged; train a LoRA adapter"
    return (
        f'Merge it with peft and load {directory}-merged: python -c "import peft, transformers as t; '
        f"peft.AutoPeftModelForCausalLM.from_pretrained('{directory}').merge_and_unload().save_pretrained('{directory}-merged'); "
        f"t.AutoTokenizer.from_pretrained('{config.get('base_model_name_or_path')}').save_pretrained('{directory}-merged')\""
    )


def _scaling(directory: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise UserError(f"{directory / CONFIG}: alpha_pattern is {alphas!r}, expected an object")
    alpha = _number(directory, {"lora_alpha": _by_pattern(alphas, name, config.get("lora_alpha"))}, "lora_alpha", None)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(directory: Path, config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{directory / CONFIG}: {key} is {value!r}, expected a number")
    return float(value)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the end of the name, or a pattern for it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def load_adapter(model: Model, files: AdapterFiles, *, fingerprint: str = "") -> None:
    """Put an adapter from disk on a plain `model` (freezing it), or load its weights into the same adapter already on it.

    fingerprint: of `model`'s weights without adapters; "" checks shapes only.
    Raises: UserError if the adapter was trained on a different base, or does not fit the layers.
    """
    linear = {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ours = model.family.keys.ours
    same = all(
        ours(name) not in linear or torch.equal(weight, linear[ours(name)].weight.to(weight.dtype))
        for name, weight in files.copies.items()
    )
    if not same or (fingerprint and files.fingerprint and fingerprint != files.fingerprint):
        raise UserError(
            f"{files.where} was trained on different weights from those that its base {files.base!r} has now; "
            "name the right base with --model.base, or in its adapter_config.json (base_model_name_or_path)"
        )
    present, problems = lora_layers(model), list[str]()
    if not present:
        apply(model, files.adapted, files.where)
    for theirs, (a, b, scaling) in files.layers.items():
        name = ours(theirs)
        if name not in linear or (present and name not in present):
            problems.append(f"there is no {'adapter' if name in linear else 'layer'} {theirs} in the model")
            continue
        base, layer = linear[name], present.get(name)
        if (a.shape[1], b.shape[0]) != (base.in_features, base.out_features) or (layer and layer.rank != len(a)):
            problems.append(
                f"{theirs} has rank {len(a)} and {a.shape[1]} inputs and {b.shape[0]} outputs, the model "
                f"{f'rank {layer.rank} and ' if layer else ''}{base.in_features} and {base.out_features}"
            )
            continue
        if layer is None:
            layer = LoRALinear(base, len(a), scaling * len(a), files.dropout)
            replace_layer(model, name, layer)
        with torch.no_grad():
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
        layer.scaling = scaling
    if problems:
        raise UserError(f"{files.where} does not fit this base: {first_three(problems)}")
    if not present:
        freeze_base(model)


def merge_into_base(model: Model) -> None:
    """Add the adapters of `model` to its weights and take them off."""
    merge(model)
    strip(model)
    if model.lm_head.weight is not model.embedding.weight:  # an adapted head is no longer the embedding
        model.config = dataclasses.replace(model.config, tied_head=False)
