"""Downloads from the Hugging Face hub, only of what is used: named, or a default. Every failure comes with a way around it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError


def download_dataset(repo: str, patterns: Sequence[str], otherwise: str) -> Path:
    """Local directory of a data set on the hub, downloaded once. Raises: UserError naming `otherwise` as the way out."""
    return _snapshot(repo, "dataset", patterns, otherwise)


def download_model(repo: str) -> Path:
    """Local directory of a model or adapter on the hub: config, tokenizer and safetensors (else the old .bin weights)."""
    otherwise = "a local directory as the model's name"
    small = [
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
        "spm.model",
        "vocab.json",
        "merges.txt",
        "*.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ]
    directory = _snapshot(repo, "model", [*small, "model*.safetensors"], otherwise)
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot(repo, "model", [*small, "pytorch_model*.bin", "adapter_model.bin"], otherwise)
    return directory


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches, and no warnings: what matters is told in the error."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, hide = logger.level, not sys.stderr.isatty() and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def _snapshot(repo: str, kind: str, patterns: Sequence[str], otherwise: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    network_errors: Any = HfHubHTTPError.__bases__  # OSError, and the base of all errors of the HTTP library in use
    try:
        with _quiet():
            return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))
    except HFValidationError:
        raise UserError(f"{repo!r} is neither a directory here nor a name on the hub (owner/name)") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no {kind} {repo!r} (or it is private and needs a login); check the name, or give {otherwise}"
        ) from None
    except network_errors as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{kind} {repo!r} is not a directory here and cannot be downloaded from the hub ({reason}); give {otherwise}"
        ) from None
