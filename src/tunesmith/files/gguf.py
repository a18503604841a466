"""A GGUF file as a directory in the Hugging Face layout: its weights dequantised to float32, its tokenizer and template.

The `gguf` package (extra `gguf`) reads the format; what each architecture stores is in `models.in_gguf`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.files.gguf_tokenizer import special_ids, write_tokenizer
from tunesmith.files.weights import config_to_hf, empty_model, from_hf_state_dict, to_hf_state_dict, write_safetensors
from tunesmith.jsontext import write_json
from tunesmith.models.in_gguf import ARCHITECTURES, EMBEDDING, HEAD, ROPE_FACTORS, Header, config_of
from tunesmith.models.known import FAMILIES, config_from_hf
from tunesmith.models.model import Model

MAGIC = b"GGUF"


def convert(file: Path, directory: Path) -> None:
    """Write the model in a GGUF file into `directory`: config.json, weights in float32, tokenizer, template.

    Costs the model in float32 in memory, and as much on disk.
    Raises: UserError in one line if the file is cut, damaged, or holds what is not computed here; OSError from writing.
    """
    reader, values = _opened(file)
    header = _header(reader, values, file)
    hf = config_of(header, tuple(FAMILIES))
    try:
        config = config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{file}: {error} (this config.json was made of the file's metadata)") from None
    tokens = write_tokenizer(header, directory)
    if tokens > config.vocab_size:
        raise UserError(
            f"{file}: its vocabulary has {tokens:,} tokens, but there are embeddings for {config.vocab_size:,}; "
            "the file was not made of one model, convert it again"
        )
    model = empty_model(config)
    from_hf_state_dict(model, _weights(reader, header, model, hf), str(file))
    ids = {"bos_token_id": None, "eos_token_id": None, **special_ids(header)}  # null where the file names none
    write_json(directory / "config.json", config_to_hf(model, 0) | ids)
    write_safetensors(to_hf_state_dict(model), directory / "model.safetensors", {"format": "pt"})


def _package() -> ModuleType:
    try:
        return importlib.import_module("gguf")  # a quarter of a second, which no other MODEL should pay
    except ImportError:
        raise UserError(
            "reading a GGUF file takes the package gguf, which is not installed: pip install gguf"
        ) from None


def _opened(file: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader of a file, and the file's metadata. Raises: UserError if it is no whole GGUF file."""
    gguf = _package()
    try:
        with file.open("rb") as opened:
            begins = opened.read(4)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    if begins != MAGIC:
        raise UserError(f"{file} is not a GGUF file: it begins with {begins!r}, not {MAGIC!r}; download it again")
    try:
        reader = gguf.GGUFReader(file)
        return reader, {name: _value(field) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        size, reason = file.stat().st_size, str(error).strip().splitlines()[0][:120]
        raise UserError(
            f"{file} cannot be read as GGUF ({reason}): its {size:,} bytes are cut off or damaged, or in a newer form than the "
            "package gguf knows; download it again, or try pip install --upgrade gguf"
        ) from None


def _header(reader: Any, values: dict[str, Any], file: Path) -> Header:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if (parts := values.get("split.count", 1)) > 1:
        raise UserError(
            f"{file} is one of {parts} parts of a split GGUF; join them first: llama-gguf-split --merge {file.name} whole.gguf"
        )
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    head, embedding, rope = (tensors.get(name) for name in (HEAD, EMBEDDING, ROPE_FACTORS))
    equal = (
        head is not None
        and embedding is not None
        and head.tensor_type == embedding.tensor_type
        and np.array_equal(head.data, embedding.data)
    )
    return Header(str(file), values, shapes, equal, () if rope is None else tuple(map(float, rope.data)))


def _value(field: Any) -> Any:
    """A metadata field's content; 32-bit numbers as the shortest decimals that they stand for, as they were written by hand."""
    content = field.contents()
    if field.types and field.types[0].name == "FLOAT32":
        return float(str(np.float32(content)))
    return content


def _weights(reader: Any, header: Header, model: Model, hf: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(published name, weight in float32 as published files store it), one by one."""
    gguf, stored = _package(), ARCHITECTURES[header.architecture]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    names, keys = gguf.get_tensor_name_map(number, model.config.depth), model.family.keys
    ours = {}
    for name in model.state_dict():
        module, _, kind = keys.theirs(name).rpartition(".")
        ours[f"{names.get_name(module)}.{kind}"] = name
    for tensor in reader.tensors:
        if tensor.name in (ROPE_FACTORS, *[HEAD] * header.tied):
            continue
        if tensor.name not in ours:
            yield tensor.name, torch.empty(0)  # one that no model of this shape has: `from_hf_state_dict` says so
            continue
        weight, own = stored.restored(tensor.name, _dequantised(gguf, tensor, header), hf), ours[tensor.name]
        yield keys.theirs(own), keys.turned(own, weight)


def _dequantised(gguf: ModuleType, tensor: Any, header: Header) -> Tensor:
    """A tensor's content in float32. Raises: UserError for a kind of quantisation that the package cannot undo."""
    try:
        plain = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{header.where}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf cannot dequantise; "
            "take a file of this model that is quantised differently, as Q8_0"
        ) from None
    return torch.from_numpy(np.array(plain, np.float32)).view(header.shapes[tensor.name])
