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
from tunesmith.errors import UserError, note
from tunesmith.jsontext import parse_json, read_json, write_json
from tunesmith.models.gpt2 import GPT, GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
TIED = {"lm_head.weight", "wte.weight"}  # one and the same tensor where the head is tied
COMPUTED = {  # settings of which only these values are computed here; without one transformers takes the first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
NAMES = {  # ours -> GPT-2's name in config.json, and the general one that transformers takes as well
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "vocab_size": ("vocab_size",),
    "block_size": ("n_positions", "max_position_embeddings", "n_ctx"),
    "dropout": ("resid_pdrop",),
    "layer_norm_epsilon": ("layer_norm_epsilon",),
    "n_inner": ("n_inner",),
    "tied_head": ("tie_word_embeddings",),
}
FRACTIONS = ("dropout", "layer_norm_epsilon")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints carry


def config_from_hf(hf: dict[str, Any]) -> GPTConfig:
    """The shape in a Hugging Face `config.json`, read as transformers reads it: other names and missing ones included.

    Raises: UserError if it is no GPT-2, uses a variant that this model does not compute, or holds a value that is no size
        (each is named).
    """
    kind = hf.get("model_type")
    says_gpt2 = kind == "gpt2" or (kind is None and _looks_like_gpt2(hf))
    if not says_gpt2:
        raise UserError(f"config.json says model_type {kind!r}; tunesmith supports gpt2 models")
    odd = [f"{k} = {hf[k]!r}" for k, fine in COMPUTED.items() if k in hf and hf[k] not in fine]
    if odd:
        raise UserError(f"config.json asks for {', '.join(odd)}, which tunesmith's GPT-2 does not support")
    given = {ours: _named(hf, theirs) for ours, theirs in NAMES.items() if not hf.keys().isdisjoint(theirs)}
    given = {ours: found for ours, found in given.items() if ours != "n_inner" or found[1] is not None}
    wrong = [f"{name} = {value!r}" for ours, (name, value) in given.items() if not _is_fine(ours, value)]
    if wrong:
        raise UserError(
            f"config.json holds {', '.join(wrong)}; expected whole numbers of at least 1 (dropout and layer_norm_epsilon: "
            "numbers, tie_word_embeddings: true or false)"
        )
    values: dict[str, Any] = {o: float(value) if o in FRACTIONS else value for o, (_, value) in given.items()}
    return GPTConfig(**values)


def _looks_like_gpt2(hf: dict[str, Any]) -> bool:
    """Whether a config without model_type is one: by its architecture, or by GPT-2's own names for sizes."""
    stated = hf.get("architectures")
    stated = stated if isinstance(stated, list) else []
    return any(str(name).startswith("GPT2") for name in stated) or (not stated and {"n_embd", "n_layer"} <= hf.keys())


def _named(hf: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of several names that the config has a value for, and that value; None where all that it has are null."""
    there = [name for name in names if name in hf]
    return next(((name, hf[name]) for name in there if hf[name] is not None), (there[0], None))


def _is_fine(name: str, value: Any) -> bool:
    if name == "tied_head":
        return isinstance(value, bool)
    if name in FRACTIONS:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    return type(value) is int and 1 <= value < 2**31


def config_to_hf(config: GPTConfig, end_of_text: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same GPT2LMHeadModel."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
    }


def from_hf_state_dict(model: GPT, state: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy published weights into `model`, whatever their dtype, with or without the prefix `transformer.`.

    A head that is stored although the model's is tied must equal the embedding (it is checked, not assumed). Weights
    that a GPT-2 does not use, of a value head for instance, are left out with a note, as transformers does.
    Raises: UserError naming every missing or misshapen weight, and those of blocks that config.json does not count.
    """
    targets = dict(model.state_dict())
    waiting, problems, unused = set(targets), [], []
    with torch.no_grad():
        for key, value in state:
            name = key.removeprefix("transformer.")
            if name.endswith(BUFFERS):
                continue
            if name not in targets:
                block = re.match(r"h\.(\d+)\.", name)
                beyond = block is not None and int(block[1]) >= model.config.n_layer
                problems.extend([f"unknown weight {key}"] * beyond)
                unused.extend([key] * (not beyond))
                continue
            value = value.t() if name.endswith(TRANSPOSED) else value
            if value.shape != targets[name].shape:
                found, asked = tuple(value.shape), tuple(targets[name].shape)
                problems.append(f"{key} has shape {found}, config.json asks for {asked}")
            elif (
                name in TIED <= set(targets) and model.config.tied_head and not waiting >= TIED
            ):  # the other came first
                if not torch.equal(value.to(targets[name].dtype), targets[name]):
                    problems.append("lm_head.weight differs from wte.weight, but config.json ties them")
            else:
                targets[name].copy_(value)
            waiting.discard(name)
    if model.config.tied_head and not waiting >= TIED:  # either name stands for both: safetensors keeps one of them
        waiting -= TIED
    problems += [f"missing weight {name}" for name in sorted(waiting)]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{where} does not hold this model: {'; '.join(problems[:3])}{more}")
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        note(f"{where} also holds {', '.join(unused[:3])}{more}, which a GPT-2 does not use: left out")


def to_hf_state_dict(model: GPT) -> dict[str, Tensor]:
    """Weights under the names and in the orientation of transformers' GPT2LMHeadModel; a tied head is left out."""
    state = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            if not model.config.tied_head:
                state[name] = value.contiguous()
        else:
            state[f"transformer.{name}"] = (value.t() if name.endswith(TRANSPOSED) else value).contiguous()
    return state


def load_model(directory: Path, *, dropout: float | None = None) -> GPT:
    """The model in a directory, on the CPU in float32, in evaluation mode.

    Reads model.safetensors, a sharded index, or an old pytorch_model.bin (unpickled with `weights_only=True`, which
    runs no code). Weights of any float dtype are converted.
    Raises: UserError naming the file and what is wrong with it.
    """
    config = config_from_hf(read_json(directory / "config.json"))
    check_size(config, directory)
    if dropout is not None:
        config = GPTConfig(**{**vars(config), "dropout": dropout})
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


def empty_model(config: GPTConfig) -> GPT:
    """A model of that shape on the CPU, whose weights are not set yet."""
    with _Unset():
        return GPT(config)


MOST_BLOCKS, MANY_NUMBERS = 10_000, 10**9


def check_size(config: GPTConfig, directory: Path) -> None:
    """Raises: UserError for a shape so far beyond the weights that building it would exhaust this machine."""
    numbers = config.n_embd * (config.vocab_size + config.block_size + 12 * config.n_embd * config.n_layer)
    stored = sum(file.stat().st_size for file in _weight_files(directory) if file.exists())
    if config.n_layer > MOST_BLOCKS or (numbers > MANY_NUMBERS and numbers > stored):
        raise UserError(
            f"{directory}: config.json asks for {config.n_layer:,} blocks and about {numbers:,} numbers, but the "
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


def save_model(model: GPT, tokenizer: Tokenizer, directory: Path) -> None:
    """Write `model` and its tokenizer so that `transformers.AutoModelForCausalLM` and ours load them equally."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in to_hf_state_dict(model).items()}
    write_safetensors(state, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", config_to_hf(model.config, tokenizer.end_of_text, model.wte.weight.dtype))
    tokenizer.save(directory, model.config.block_size, model.config.vocab_size)


def write_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, with a full disk or a read-only folder told as the OSError that it is."""
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


def weights_fingerprint(model: GPT) -> str:
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
