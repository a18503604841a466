"""What a MODEL name means: hub name, directory, adapter, run, RUN@STEP, a .gguf file, `smollm2` or `sample`; and loading it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch

from tunesmith.data.chosen_template import AUTO, chat_template, load_tokenizer_in, with_template_asked_for
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.device import resolve_device
from tunesmith.errors import UsageError, UserError, note, path_meant
from tunesmith.files import adapters
from tunesmith.files.adapters import AdapterFiles, load_adapter, read_adapter
from tunesmith.files.bases import SAMPLE, asked_base, holds_model, may_be_on_hub, places_of_base
from tunesmith.files.converted import SMOLLM2, converted_directory
from tunesmith.files.reward_models import is_reward_model, load_reward_model, set_score
from tunesmith.files.run import STEP_NAME, Run
from tunesmith.files.weights import load_model, weights_fingerprint
from tunesmith.hub import download_model
from tunesmith.jsontext import read_json
from tunesmith.models.family import Config
from tunesmith.models.known import SIZES, config_from_hf
from tunesmith.models.model import Model, build_model
from tunesmith.models.reward_head import SCORE, RewardModel

T = TypeVar("T")
PUBLISHED_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model that `smollm2` is, on the hub
EMBEDDED = ("sample", SMOLLM2)  # names that need neither a path nor the hub


def find_model(name: str) -> Path:
    """Directory of a MODEL: a whole model or an adapter. Raises: UserError if there is none, or its step has no checkpoint."""
    if not isinstance(name, str | PathLike) or not str(name):
        raise UsageError(
            f"model {name!r}: expected a name on the hub, a directory, a run, RUN@STEP, a .gguf file, {SMOLLM2} or sample"
        )
    name = str(name)
    if name == "sample":
        return SAMPLE
    if (directory := converted_directory(name)) is not None:
        return directory
    path = Path(name).expanduser()
    if (path / "status.json").exists():
        return Run(path).best_checkpoint()
    if path.is_dir():
        if not (path / "config.json").exists() and not is_adapter(path):
            inside = next((f"; name the file in it: {file}" for file in sorted(path.glob("*.gguf"))), "")
            raise UserError(
                f"{path} is neither a model (no config.json) nor an adapter (no {adapters.CONFIG}) nor a run (no status.json){inside}"
            )
        return path
    run, at, step = name.rpartition("@")
    if at and Path(run).is_dir():
        if not step.isdigit():
            raise UserError(f"{name}: expected RUN@STEP with a number, for example {run}@{_some_step(run)}")
        return Run(run).checkpoint(int(step))
    near = nearest_model(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or at:
        raise UserError(f"model {name!r}: there is no such directory{near}")
    try:
        return download_model(name)
    except UserError as error:
        raise UserError(f"{error}{near}") from None


def read_model(name: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of the directory of a MODEL. Raises: as `find_model` and `read`.

    A run that is being trained removes checkpoints. Where it has removed the one that was being read, the one that is best by
    then is read: never a part of one.
    """
    while True:
        directory = find_model(name)
        before = _identity(directory)
        try:
            content = read(directory)
        except (UserError, OSError):
            if before is not None and _identity(directory) == before:
                raise
        else:
            if _identity(directory) == before:
                return content


def _identity(directory: Path) -> tuple[int, int] | None:
    """What tells a directory from another of the same name; None where there is none."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def nearest_model(name: str) -> str:
    """`. Did you mean sample?` for a name like one of the known ones, or like a directory beside the one that is missing; else "".

    A file's directory, and what there is of SmolLM2 without the hub, are named too.
    """
    if name == PUBLISHED_SMOLLM2:
        return f". Without the hub: {SMOLLM2}, dequantised from 4 bits"
    if (path := Path(name).expanduser()).is_file():
        return f". It is a file: name its directory, {path.parent}"
    run, at, step = name.rpartition("@") if "@" in name else (name, "", "")
    more = {}
    if Path(run).name == run:
        more = {found.name: str(found) for found in Path("runs").glob("*") if (found / "status.json").exists()}
        more |= {} if at else {known: known for known in (*EMBEDDED, *SIZES)}
    near = path_meant(Path(run).expanduser(), Path.is_dir, more)
    return f"{near.removesuffix('?')}{at}{step}?" if near else ""


def _some_step(run: str) -> int:
    steps = [step for step, _ in Run(run).checkpoints()]
    return steps[-1] if steps else 1000


def checkpoints_of(name: str) -> list[str]:
    """`RUN@all` as `RUN@STEP` for every checkpoint it has; any other MODEL unchanged. Raises: UserError if there is none."""
    run, at, step = name.rpartition("@")
    if not at or step != "all":
        return [name]
    if not Path(run).is_dir():
        raise UserError(f"model {name!r}: there is no such directory{nearest_model(name)}")
    names = [f"{run}@{number}" for number, _ in Run(run).checkpoints()]
    if not names:
        raise UserError(f"{name}: {run} has no checkpoint")
    return names


def run_and_step(name: str) -> tuple[Run, int] | None:
    """The run and the step that a MODEL is a checkpoint of; None for any other MODEL."""
    directory = find_model(name)
    match = STEP_NAME.fullmatch(directory.name)
    path = directory.parent.parent
    return (Run(path), int(match[1])) if match and (path / "status.json").exists() else None


def lasting_name(name: str) -> str:
    """A MODEL's name that still means the same model later: the name on the hub, or a directory's path (`lasting_path`)."""
    if name == "sample" or name in SIZES:
        return name
    if (converted := converted_directory(name)) is not None:
        return str(converted.resolve())  # a cache does not move together with what uses it
    here = Path(name).expanduser().exists() or "@" in name
    return lasting_path(find_model(name)) if here else name


def lasting_path(directory: Path) -> str:
    """A directory below the current one by its path from there, so that both can move together; any other by its absolute path.

    Transformers and PEFT read a relative path from where they run; `_base_directory` also from every folder above an adapter.
    """
    whole, here = directory.resolve(), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) and whole != here else str(whole)


def is_adapted(name: str) -> bool:
    """Whether a MODEL is an adapter, so that its weights exist only after merging. Raises: as `find_model`."""
    return name not in (*EMBEDDED, *SIZES) and read_model(name, is_adapter)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a LoRA adapter and no whole model."""
    whole = (p for pattern in ("model*.safetensors", "pytorch_model*.bin") for p in directory.glob(pattern))
    return (directory / adapters.CONFIG).exists() and not any(whole)


def gives_scores(name: str) -> bool:
    """Whether a MODEL is a reward model. Raises: as `find_model`."""
    return read_model(name, lambda d: bool(read_adapter(d).extra) if is_adapter(d) else is_reward_model(d))


def load(name: str, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a MODEL, ready for evaluation and generation. An adapter is merged into its base.

    >>> model, tokenizer = load("sample", device="cpu")

    Args:
        name: name on the hub (`gpt2-medium`), directory in the Hugging Face layout, PEFT adapter directory, run
            directory (its best checkpoint), `RUN@STEP`, a .gguf file, `smollm2`, or `sample`.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: of the weights.
    Raises: UserError saying what was looked for and where.
    """
    where = resolve_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {dtype!r}, expected a floating-point one, as torch.bfloat16")

    def read(directory: Path) -> tuple[Model, Tokenizer]:
        model, tokenizer = load_plain(directory), _tokenizer_in(directory)
        tokenizer.limit(model.config.vocab_size, str(directory))
        return model, tokenizer

    model, tokenizer = read_model(name, read)
    return model.to(where, dtype), tokenizer


def load_reward(name: str, *, device: str = "auto") -> tuple[RewardModel, Tokenizer]:
    """A reward model that `tunesmith reward` made (or transformers, as GPT2ForSequenceClassification), and its tokenizer.

    name: as in `load`. Raises: UserError if it is not a reward model; otherwise as `load`.
    """
    where = resolve_device(device)
    with chat_template(AUTO):  # what it scores is read in the form that it was trained with
        model, tokenizer = read_model(
            name, lambda directory: (_reward_model(directory, name), _tokenizer_in(directory))
        )
    return model.eval().to(where), tokenizer


def _reward_model(directory: Path, name: str) -> RewardModel:
    if is_adapter(directory):
        files = read_adapter(directory)
        if not files.extra:
            raise UserError(f"{name} is an adapter for a language model, which gives no scores")
        model = RewardModel(_merged(directory, files))
        set_score(model, files.extra[SCORE], directory)
        return model
    if not is_reward_model(directory):
        raise UserError(f"{name} is a language model, not a reward model; train one with tunesmith reward")
    return load_reward_model(directory)


def load_plain(directory: Path, *, dropout: float | None = None) -> Model:
    """The language model in a directory, on the CPU in float32; an adapter is merged into its base."""
    if is_adapter(directory):
        files = read_adapter(directory)
        if files.extra:
            raise UserError(f"{directory} is an adapter for a reward model: it gives scores, not text")
        return _merged(directory, files, dropout)
    if is_reward_model(directory):
        raise UserError(f"{directory} is a reward model: it gives scores, not text; name a language model")
    return load_model(directory, dropout=dropout)


def load_adapted(directory: Path, files: AdapterFiles | None = None, dropout: float | None = None) -> Model:
    """The base of an adapter with the adapter beside its layers, not merged. Raises: UserError if the base is a different one."""
    files = files or read_adapter(directory)
    model = load_plain(_base_directory(directory, files), dropout=dropout)
    load_adapter(model, files, fingerprint=weights_fingerprint(model) if files.fingerprint else "")
    return model.eval()


def _merged(directory: Path, files: AdapterFiles, dropout: float | None = None) -> Model:
    model = load_adapted(directory, files, dropout)
    adapters.merge_into_base(model)
    return model


def _base_directory(directory: Path, files: AdapterFiles) -> Path:
    """The base of an adapter: of the places where one lies, the first with the weights that the adapter was trained on.

    Looked at in this order: `base_at`; where it lay from the adapter; its recorded path, a relative one also from every
    folder above the adapter; the base that the adapter's run keeps; the hub, its cache first. A single one that is found
    is compared when it is loaded.

    Raises: UserError naming every place.
    """
    asked = None
    if at := asked_base():
        asked, at.used = at.name, True
    if not files.base and asked is None:
        raise UserError(
            f"{directory / adapters.CONFIG} names no base model (base_model_name_or_path); add it, or give --model.base"
        )
    bases = list(
        dict.fromkeys(
            find_model(str(place)).resolve() for place in places_of_base(directory, files) if holds_model(place)
        )
    )
    if asked is not None and (base := find_model(asked).resolve()) != directory.resolve():
        bases = list(dict.fromkeys([base, *bases]))
    if not bases and may_be_on_hub(files.base):
        try:
            return find_model(files.base)
        except UserError as error:
            hub = f", nor on the hub ({error})"
    else:
        hub = ""
    if not bases:
        places = ", ".join(dict.fromkeys(map(os.path.normpath, places_of_base(directory, files))))
        raise UserError(
            f"{directory} is an adapter for {files.base!r}, which is in none of these places: {places}{hub}. Name its directory "
            "with --model.base"
        )
    if len(bases) == 1 or not files.fingerprint:
        return bases[0]
    right = next((place for place in bases if _weights_of(place) == files.fingerprint), None)
    if right is None:
        raise UserError(
            f"{directory} was trained on different weights from those found where its base {files.base!r} was looked for: "
            f"{', '.join(map(str, bases))}. Name the right base with --model.base"
        )
    if asked is not None and right != bases[0]:
        note(
            f"--model.base {asked} holds different weights from those that {directory} was trained on; its base is read from {right}"
        )
    return right


def _weights_of(directory: Path) -> str:
    """The fingerprint of the model in a directory; "" for one that cannot be loaded."""
    try:
        return weights_fingerprint(load_plain(directory))
    except UserError:
        return ""


def _tokenizer_in(directory: Path) -> Tokenizer:
    """The tokenizer in a model's directory; an adapter's is its base's where it has none of its own.

    Where an adapter does not say what ends an answer, its base does.
    """
    if not is_adapter(directory):
        return load_tokenizer_in(directory)
    if not (directory / "tokenizer.json").exists():
        return _tokenizer_in(_base_directory(directory, read_adapter(directory)))
    tokenizer = load_tokenizer_in(directory)
    if not (directory / "generation_config.json").exists():
        tokenizer.special = tokenizer.special.ending_as(_base_directory(directory, read_adapter(directory)))
    return tokenizer


def load_for_training(name: str, *, init: str, dropout: float, seed: int) -> tuple[Model, Tokenizer]:
    """Model and tokenizer to train, on the CPU in float32; `init` "random" draws new weights from `seed`.

    With random weights the four gpt2 names need no download: their shapes and GPT-2's tokenizer come with the package.
    """
    if init == "random":
        model = new_model(dataclasses.replace(shape_of(name), dropout=dropout), seed)
        tokenizer = load_tokenizer(name)
    else:
        model, tokenizer = read_model(
            name,
            lambda directory: (
                load_plain(directory, dropout=dropout),
                _tokenizer_in(directory),
            ),
        )
    tokenizer.limit(model.config.vocab_size, name)
    return model, tokenizer


def shape_of(name: str) -> Config:
    """Shape of a named size (gpt2, gpt2-medium, ...), which needs no download, or of a MODEL."""
    return SIZES[name] if name in SIZES else _stored_shape(find_model(name))


def _stored_shape(directory: Path) -> Config:
    """The shape of the model in a directory; an adapter's is its base's. Raises: as `find_model` and `config_from_hf`."""
    while is_adapter(directory):
        directory = _base_directory(directory, read_adapter(directory))
    return config_from_hf(read_json(directory / "config.json"))


def known_shape(model: str) -> Config | None:
    """The shape of a local MODEL or a named size; None where it would take a download to find out."""
    if (size := SIZES.get(re.sub("-(Instruct|Base)$", "", model))) is not None:  # a model's versions have one shape
        return size
    if model not in EMBEDDED and not Path(model.rpartition("@")[0] or model).expanduser().exists():
        return None
    try:
        return _stored_shape(find_model(model))
    except (UserError, OSError):  # nothing that could be trained: the run will tell
        return None


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a MODEL: an adapter's is its base's where it has none of its own.

    The one of the named sizes (gpt2, gpt2-medium, ...) comes with the package and needs no download. Raises: as `find_model`.
    """
    if name in SIZES and SIZES[name].family.tokenizer == "gpt2":
        return with_template_asked_for(Tokenizer.gpt2())
    return read_model(name, _tokenizer_in)


def new_model(shape: Config, seed: int) -> Model:
    """A model of that shape with new weights, drawn from `seed`, on the CPU in float32."""
    model = build_model(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model
