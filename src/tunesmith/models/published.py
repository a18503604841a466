"""Hugging Face's config.json: the parts of reading and writing it that all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.errors import UserError


class Setting:
    """An entry of config.json that a configuration takes over.

    names: its names there, of which the first that has a value counts. kind: int (at least 1), float (in [0, 1)) or bool.
    optional: null means the architecture's own default, as leaving it out does.
    """

    def __init__(self, *names: str, kind: type = int, optional: bool = False) -> None:
        self.names, self.kind, self.optional = names, kind, optional

    def find(self, hf: Mapping[str, Any]) -> tuple[str, Any] | None:
        """Its name and value there, null if all of its names have that; None where none is there."""
        present = [name for name in self.names if name in hf]
        name = next((name for name in present if hf[name] is not None), present[0] if present else None)
        return None if name is None or (self.optional and hf[name] is None) else (name, hf[name])

    def fits(self, value: Any) -> bool:
        """Whether it is a value of the kind."""
        if self.kind is bool or isinstance(value, bool):
            return isinstance(value, bool) and self.kind is bool
        if self.kind is float:
            return isinstance(value, int | float) and 0 <= value < 1
        return isinstance(value, int) and 1 <= value < 2**31


def refuse_unless(hf: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]], title: str) -> None:
    """Raises: UserError naming the settings that ask for something else than the values in `computed`."""
    odd = [f"{name} = {hf[name]!r}" for name, values in computed.items() if name in hf and hf[name] not in values]
    if odd:
        raise UserError(f"config.json asks for {', '.join(odd)}, which tunesmith's {title} does not support")


def refuse_quantised(hf: Mapping[str, Any]) -> None:
    """Raises: UserError if the weights beside a config.json are numbers of another kind, with scales that belong to them."""
    stated = hf.get("quantization_config") or hf.get("compression_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
        raise UserError(
            f"config.json says that the weights are quantised ({method or 'quantization_config'}), which tunesmith does not read. Take the "
            "model in bfloat16 or float32 (or a .gguf file), or let transformers dequantise it and save it again"
        )


def refuse_windows(hf: Mapping[str, Any], title: str) -> None:
    """Raises: UserError if some layers of a config.json see only the last tokens (the two ways to say so)."""
    kinds = hf.get("layer_types") or []
    refuse_unless(hf, {"use_sliding_window": (False,)}, title)
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(f"config.json asks for layers of {other[0]!r}, which tunesmith's {title} does not support")


def read_settings(hf: Mapping[str, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Field -> value of the settings that config.json holds. Raises: UserError naming every value that is not of its kind."""
    given = {field: entry for field, setting in settings.items() if (entry := setting.find(hf)) is not None}
    wrong = [f"{name} = {value!r}" for field, (name, value) in given.items() if not settings[field].fits(value)]
    if wrong:
        numbers = " and ".join(field for field, setting in settings.items() if setting.kind is float)
        flags = " and ".join(name for setting in settings.values() if setting.kind is bool for name in setting.names)
        raise UserError(
            f"config.json holds {', '.join(wrong)}; expected whole numbers of at least 1 ({numbers}: numbers, {flags}: "
            "true or false)"
        )
    return {field: float(value) if settings[field].kind is float else value for field, (_, value) in given.items()}
