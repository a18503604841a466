"""LoRA adapters on disk, in PEFT's format: those trained here load in PEFT, and PEFT's load here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.files.weights import read_json, read_safetensors, write_safetensors
from tunesmith.models.gpt2 import GPT
from tunesmith.models.lora import HEAD, LoRALinear, freeze_base, lora_layers, replace_layer, short_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "base_sha256"  # in the metadata of adapter_model.safetensors, which PEFT does not mind
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's starts that put other weights into the base
PREFIX = "base_model.model."
SCORE = "score.weight"  # of a reward model: trained in full beside its adapters


def their_name(name: str) -> str:
    """What transformers' GPT-2 calls the layer `h.0.attn.c_attn` or `lm_head`."""
    return name if name == HEAD else f"transformer.{name}"


def save_adapter(
    model: GPT, directory: Path, *, base: str, fingerprint: str, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, beside what is there.

    Args:
        base: name or directory of the base model, where PEFT's AutoPeftModel and `files.names.load` look for it.
        fingerprint: of the base's weights (`weights.weights_fingerprint`).
        extra: weights that were trained in full beside the adapters, by name (a reward model's `score.weight`).
    """
    layers, extra = lora_layers(model), extra or {}
    directory.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, layer in layers.items():
        state[f"{PREFIX}{their_name(name)}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        state[f"{PREFIX}{their_name(name)}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    state |= {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in extra.items()}
    write_safetensors(state, directory / WEIGHTS, {"format": "pt", FINGERPRINT: fingerprint})
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
        "rank_pattern": {their_name(n): m.rank for n, m in layers.items() if m.rank != first.rank},
        "alpha_pattern": {their_name(n): alpha(m) for n, m in layers.items() if alpha(m) != alpha(first)},
        "target_modules": ends if everywhere else [their_name(name) for name in layers],
        "fan_in_fan_out": any(name != HEAD for name in layers),  # transformers' Conv1D stores W transposed
        "bias": "none",
        "modules_to_save": [name.rpartition(".")[0] for name in extra] or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies on disk.

    layers: module name -> (A, B, alpha / rank). extra: other weights by name. copies: module name -> the base's weight,
    which PEFT stores beside an adapter on the head.
    """

    where: str
    base: str
    fingerprint: str
    dropout: float
    layers: dict[str, tuple[Tensor, Tensor, float]]
    extra: dict[str, Tensor]
    copies: dict[str, Tensor]


def read_adapter(directory: Path) -> AdapterFiles:
    """A LoRA adapter in PEFT's format, ours or PEFT's own.

    Raises: UserError if a file is missing or broken, or uses a variant that `LoRALinear` does not compute.
    """
    config = read_json(directory / CONFIG)
    odd = [f"peft_type {config['peft_type']!r}"] if config.get("peft_type", "LORA") != "LORA" else []
    odd += [key for key in ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens") if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    start = str(config.get("init_lora_weights"))
    odd += [f"init_lora_weights {start!r} (it changes the base)"] if start.startswith(CHANGES_BASE) else []
    if odd:
        raise UserError(f"{directory / CONFIG} uses {', '.join(odd)}; tunesmith computes plain LoRA without biases")
    tensors, metadata = read_safetensors(directory / WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    extra, copies = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            halves.setdefault(match[1], {})[match[2]] = value
        elif name == SCORE:
            extra[name] = value
        elif match := re.fullmatch(r"(.+)\.base_layer\.weight", name):
            copies[match[1]] = value
        else:
            raise UserError(f"{directory / WEIGHTS} holds {key}, which is no part of a LoRA adapter on a GPT-2")
    layers = {}
    for name, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].shape[0] != half["B"].shape[-1]:
            raise UserError(f"{directory / WEIGHTS}: the two halves of {name} do not belong together; save it again")
        rank = half["A"].shape[0]
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise UserError(f"{directory / CONFIG}: lora_alpha is {alpha!r}, expected a number")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[name] = (half["A"], half["B"], float(scaling))
    if not layers:
        raise UserError(f"{directory / WEIGHTS} holds no adapter")
    base, dropout = str(config.get("base_model_name_or_path") or ""), float(config.get("lora_dropout") or 0.0)
    return AdapterFiles(str(directory), base, metadata.get(FINGERPRINT, ""), dropout, layers, extra, copies)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the end of the name, or a pattern for it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def load_adapter(model: GPT, files: AdapterFiles, *, fingerprint: str = "") -> None:
    """Put an adapter from disk on a plain `model` (which is frozen by that), or its weights into the same one on it.

    fingerprint: of `model`'s weights without adapters; "" checks shapes only.
    Raises: UserError if the adapter was trained on another base, or does not fit the layers.
    """
    linear = {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ours = {their_name(name): name for name in linear}
    same = all(
        name not in ours or torch.equal(weight, linear[ours[name]].weight.to(weight.dtype))
        for name, weight in files.copies.items()
    )
    if not same or (fingerprint and files.fingerprint and fingerprint != files.fingerprint):
        raise UserError(
            f"{files.where} was trained on other weights than those that its base {files.base!r} has now; "
            "name the right base in its adapter_config.json (base_model_name_or_path)"
        )
    present, problems = lora_layers(model), []
    for theirs, (a, b, scaling) in files.layers.items():
        name = ours.get(theirs)
        if name is None or (present and name not in present):
            problems.append(f"there is no {'adapter' if name else 'layer'} {theirs} in the model")
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
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{files.where} does not fit this base: {'; '.join(problems[:3])}{more}")
    if not present:
        freeze_base(model)
