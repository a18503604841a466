"""What a MODEL name means: hub name, directory, run, RUN@STEP, or `sample`; and loading it."""

from __future__ import annotations

from pathlib import Path

import torch

from tunesmith.device import resolve_device
from tunesmith.errors import UserError
from tunesmith.gpt import GPT, SIZES, GPTConfig
from tunesmith.hub import download_model
from tunesmith.runlog import Run
from tunesmith.tokenizer import Tokenizer
from tunesmith.weights import config_from_hf, load_model, read_json

SAMPLE = Path(__file__).parent / "sample" / "model"


def find_model(name: str) -> Path:
    """Directory of a MODEL. Raises: UserError if there is none, or its step has no checkpoint."""
    if name == "sample":
        return SAMPLE
    path = Path(name).expanduser()
    if (path / "status.json").exists():
        return Run(path).best_checkpoint()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path} is neither a model (no config.json) nor a run (no status.json)")
        return path
    run, at, step = name.rpartition("@")
    if at and Path(run).is_dir():
        if not step.isdigit():
            raise UserError(f"{name}: expected RUN@STEP with a number, for example {run}@{_some_step(run)}")
        return Run(run).checkpoint(int(step))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: there is no such directory")
    return download_model(name)


def _some_step(run: str) -> int:
    steps = [step for step, _ in Run(run).checkpoints()]
    return steps[-1] if steps else 1000


def load(name: str, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of a MODEL, ready for evaluation and generation.

    >>> model, tokenizer = load("sample", device="cpu")

    Args:
        name: name on the hub (`gpt2-medium`), directory in the Hugging Face layout, run directory (its best
            checkpoint), `RUN@STEP`, or `sample`.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: of the weights.
    Raises: UserError saying what was looked for and where.
    """
    where = resolve_device(device)
    directory = find_model(name)
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    check_pair(model.config, tokenizer, str(directory))
    return model.to(where, dtype), tokenizer


def load_for_training(name: str, *, init: str, dropout: float, seed: int) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer to train, on the CPU in float32; `init` "random" draws new weights from `seed`.

    With random weights the four gpt2 names need no download: their shapes and GPT-2's tokenizer come with the package.
    """
    if init == "random":
        if name in SIZES:
            config, tokenizer = SIZES[name], Tokenizer.gpt2()
        else:
            directory = find_model(name)
            config, tokenizer = config_from_hf(read_json(directory / "config.json")), Tokenizer.load(directory)
        model = GPT(GPTConfig(**{**vars(config), "dropout": dropout}))
        model.init_weights(torch.Generator().manual_seed(seed))
    else:
        directory = find_model(name)
        model, tokenizer = load_model(directory, dropout=dropout), Tokenizer.load(directory)
    check_pair(model.config, tokenizer, name)
    return model, tokenizer


def check_pair(config: GPTConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raises: UserError if the tokenizer can produce ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model embeddings for {config.vocab_size:,}"
        )
