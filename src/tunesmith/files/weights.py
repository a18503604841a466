"""Models on disk in the Hugging Face layout: config.json, model.safetensors (or shards), tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tunesmith.data.fingerprint import content_hash
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError, first_three, note
from tunesmith.jsontext import parse_json, read_json, write_json
from tunesmith.models.family import HEAD, Config
from tunesmith.models.known import config_from_hf
from tunesmith.models.model import Model, build_model


def config_to_hf(model: Model, end_of_text: int) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same language model."""
    family = model.family
    return {
        "architectures": [family.causal],
        "model_type": family.name,
        **family.to_hf(model.config),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def from_hf_state_dict(model: Model, state: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy published weights of any dtype into `model`, with or without the architecture's prefix.

    A head that is stored although the model's is tied must equal the embedding (it is checked, not assumed). Weights
    that the architecture does not use, of a value head for instance, are left out with a note, as transformers does.
    Raises: UserError naming every missing or misshapen weight, and those of blocks that config.json does not count.
    """
    config, keys = model.config, model.family.keys
    targets = dict(model.state_dict())
    head, embedding = f"{HEAD}.weight", f"{keys.embedding}.weight"
    both = {head, embedding}  # one and the same tensor where the head is tied
    waiting, problems, unused = set(targets), [], []
    with torch.no_grad():
        for key, value in state:
            name = keys.ours(key)
            if name.endswith(keys.unused):
                continue
            if name not in targets:
                block = re.match(rf"{keys.blocks}\.(\d+)\.", name)
                beyond = block is not None and int(block[1]) >= config.depth
                problems.extend([f"unknown weight {key}"] * beyond)
                unused.extend([key] * (not beyond))
                continue
            value, target = keys.turned(name, value), targets[name]
            second = config.tied_head and name in both <= set(targets) and not waiting >= both  # the other came first
            if value.shape != target.shape:
                problems.append(f"{key} has shape {tuple(value.shape)}, config.json asks for {tuple(target.shape)}")
            elif not second:
                target.copy_(value)
            elif not torch.equal(value.to(target.dtype), target):
                problems.append(f"{head} differs from {embedding}, but config.json ties them")
            waiting.discard(name)
    if config.tied_head and not waiting >= both:  # either name stands for both: safetensors keeps one of them
        waiting -= both
    problems += [f"missing weight {name}" for name in sorted(waiting)]
    if problems:
        raise UserError(f"{where} does not hold this model: {first_three(problems)}")
    if unused:
        rest = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        note(f"{where} also holds {', '.join(unused[:3])}{rest}, which a {model.family.title} does not use: left out")


def to_hf_state_dict(model: Model) -> dict[str, Tensor]:
    """Weights under the names and in the orientation of transformers' model; a tied head is left out."""
    keys, tied = model.family.keys, model.config.tied_head
    return {
        keys.theirs(name): keys.turned(name, value).contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == f"{HEAD}.weight")
    }


def load_model(directory: Path, *, dropout: float | None = None) -> Model:
    """The model in a directory, on the CPU in float32, in evaluation mode.

    Reads model.safetensors, a sharded index, or an old pytorch_model.bin (unpickled with `weights_only=True`, which
    runs no code). Weights of any float dtype are converted.
    Raises: UserError naming the file and what is wrong with it.
    """
    config = config_from_hf(read_json(directory / "config.json"))
    check_size(config, directory)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    model = empty_model(config)
    from_hf_state_dict(model, stored_weights(directory), str(directory))
    return model.eval()


class _Unset(TorchFunctionMode):
    """Inside, the functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def empty_model(config: Config) -> Model:
    """A model of that shape on the CPU, whose weights are not set yet."""
    with _Unset():
        return build_model(config)


MOST_BLOCKS, MANY_NUMBERS = 10_000, 10**9


def check_size(config: Config, directory: Path) -> None:
    """Raises: UserError for a shape so far beyond the weights that building it would exhaust this machine."""
    numbers = config.family.count(config)
    stored = sum(file.stat().st_size for file in _weight_files(directory) if file.exists())
    if config.depth > MOST_BLOCKS or (numbers > MANY_NUMBERS and numbers > stored):
        raise UserError(
            f"{directory}: config.json asks for {config.depth:,} blocks and {numbers:,} numbers, but the "
            f"weights have {stored:,} bytes; correct config.json, or download the model again"
        )


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights. Raises: UserError if there are none, or the index of them is broken."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    old, old_index = directory / "pytorch_model.bin", directory / "pytorch_model.bin.index.json"
    if single.exists():
        files = [single]
    elif index.exists() or old_index.exists():
        listed = read_json(index if index.exists() else old_index)
        if not isinstance(listed.get("weight_map"), dict):
            raise UserError(f"{directory}: the index of the weights has no weight_map; download the model again")
        files = [directory / name for name in sorted(set(map(str, listed["weight_map"].values())))]
    elif old.exists():
        files = [old]
    else:
        raise UserError(f"{directory} holds no weights: neither model.safetensors (or its index) nor pytorch_model.bin")
    return files


def stored_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) one by one, so that a model is never in memory twice. Raises: UserError naming the broken file."""
    for file in _weight_files(directory):
        try:
            if file.suffix == ".bin":
                yield from _unpickled(file)
                continue
            with safe_open(file, framework="pt") as stored:
                keys = list(stored.keys())
            for key in keys:  # opened anew for each: the pages of what was read before leave this process's memory
                with safe_open(file, framework="pt") as stored:
                    yield key, stored.get_tensor(key)
        except FileNotFoundError:
            raise UserError(f"{file} is missing, but the index lists it; download the model again") from None
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{file} cannot be read as weights ({reason}); download or save it again") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Named tensors of an old .bin file, read without running code in it. Raises: UserError naming the file if it is broken."""
    try:
        return dict(_unpickled(path))
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as weights ({reason}); download or save it again") from None


def _unpickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    """An old pytorch_model.bin, without running code in it. Raises: ValueError if it holds anything but named tensors."""
    try:  # files of torch before 1.6 are no zip and cannot be mapped into memory
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ValueError(
            "it is damaged, or holds Python objects, which are not loaded because they can run code"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError("it holds something other than named tensors")
    yield from state.items()


def save_model(model: Model, tokenizer: Tokenizer, directory: Path) -> None:
    """Write `model` and its tokenizer so that `transformers.AutoModelForCausalLM` and ours load them equally."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in to_hf_state_dict(model).items()}
    write_safetensors(state, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", config_to_hf(model, tokenizer.end_of_text))
    tokenizer.save(directory, model.longest, model.config.vocab_size)


def write_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, with a full disk or a read-only folder raised as the OSError that it is."""
    try:
        safetensors.torch.save_file(state, path, metadata)
    except SafetensorError as error:
        code = next((int(word.strip("(),. ")) for word in str(error).split() if word.strip("(),. ").isdigit()), 0)
        raise OSError(code, os.strerror(code) if code else str(error), str(path)) from None
    if metadata and len(metadata) > 1:
        _sort_metadata(path)
    path.chmod(0o666 & ~_umask())


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in an order that changes from save to save; equal content shall be equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, (len(text), size)
        file.seek(8)
        file.write(text.ljust(size))  # the format pads its header with spaces


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises: UserError naming the file if it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as weights ({reason}); download or save it again") from None


def weights_fingerprint(model: Model) -> str:
    """SHA-256 over shape and weights: two models with the same one compute the same."""

    def parts() -> Iterator[str | memoryview]:
        yield repr(dataclasses.replace(model.config, dropout=0.0))
        for name, value in model.named_parameters():  # a tied head comes once
            plain = value.detach().cpu().contiguous()
            yield f"{name} {plain.dtype} {tuple(plain.shape)}"
            yield plain.flatten().view(torch.uint8).numpy().data

    return content_hash(parts())


def _umask() -> int:
    """The process's file mode mask (safetensors makes its files private; models are to be shared as any file)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
