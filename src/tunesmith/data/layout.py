"""Which files of a directory make a data set: splits by name, configurations, and what is not data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.documents import split_of_word
from tunesmith.data.readers import SUFFIXES, TEXT_SUFFIXES, read_object, suffix_of
from tunesmith.errors import UserError

ALL = "all"  # as --data.config: every configuration
NO_DATA = re.compile(
    r"(.*[_.-])?(results?|metrics|config|infos?|state|args|arguments|index|tokens_map|history|report)\.json"
    r"|(tokenizer|vocab|added_tokens|dataset_dict|status|environment|package|metrics|log)[^/]*\.jsonl?"
    r"|cache-.*\.arrow|(readme|licen[cs]e|notice|requirements|changelog)[^/]*\.txt"
)
"""Names, in lower case, of files that hold results or settings; `datasets` leaves its caches beside what it saved."""
SMALL = 1 << 16  # bytes up to which a JSON file is looked into
_SHARD = re.compile(r"([_.-]?\d+)?([_.-]of[_.-]\d+)?$")
_WORDS = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Layout:
    """The files of each split, and what to tell of the choice."""

    files: dict[str, tuple[Path, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A file of rows: its split ("" where no name says), the rank of the word that says so, and its configuration."""

    path: Path
    split: str
    rank: int
    config: str


def find_layout(root: Path, config: str | None = None) -> Layout:
    """The files of train and, if there is one, test in a directory.

    A split is in a file's name (`train-00000-of-00002.parquet`, `en_train.jsonl`) or a folder's (`train/part0.jsonl`); files
    without one are train where nothing else is. What else is in the names makes configurations, of which `config` picks one.
    Raises: UserError if there is no file for train, or several configurations of which none was picked.
    """
    paths = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    known = [p for p in paths if suffix_of(p) in SUFFIXES]
    rows = [p for p in known if not _is_no_data(p)]
    aside = [p for p in known if p not in rows]
    found = [_classify(root, p) for p in rows or (p for p in paths if _is_text(p))]
    chosen, notes = _pick(root, found, config)
    splits = {split: [f for f in chosen if f.split == split] for split in ("train", "test")}
    if not splits["train"] and (unnamed := [f for f in chosen if not f.split]):
        splits["train"] = unnamed
        if len(unnamed) > 1 and not all(_is_text(f.path) or f.path.suffix == ".arrow" for f in unnamed):
            notes.append(f"no file is named train: all {len(unnamed)} files count as train ({_list(root, unnamed)})")
    if not splits["train"]:
        raise UserError(
            f"{root} holds no train.* file; expected train{{{','.join((*SUFFIXES, *TEXT_SUFFIXES))}}} or such files "
            f"in a folder train (gzipped or not), and optionally test.*; or name a file"
        )
    best = min((f.rank for f in splits["test"]), default=0)  # of test, validation, ... the first that is there
    splits["test"] = [f for f in splits["test"] if f.rank == best]
    used = {f.path for files in splits.values() for f in files}
    if left := [f for f in chosen if f.path not in used]:
        notes.append(f"not used: {_list(root, left)}")
    if aside:
        notes.append(
            f"not data: {', '.join(p.relative_to(root).as_posix() for p in aside[:3])}{', ...' if aside[3:] else ''}"
        )
    for files in splits.values():
        _check_twice(root, files)
    return Layout({split: tuple(f.path for f in files) for split, files in splits.items() if files}, tuple(notes))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _is_text(path: Path) -> bool:
    return suffix_of(path) in TEXT_SUFFIXES and not NO_DATA.fullmatch(path.name.lower())


def _is_no_data(path: Path) -> bool:
    """Whether a file holds results or settings: by its name, or as one small JSON object of numbers."""
    if NO_DATA.fullmatch(path.name.lower()):
        return True
    if suffix_of(path) != ".json" or path.stat().st_size > SMALL:
        return False
    value = read_object(path)
    return bool(value) and not any(isinstance(v, str | list | dict) for v in (value or {}).values())


def _classify(root: Path, path: Path) -> Found:
    """A file's split and configuration, by its name or else by the nearest folder that is named after a split."""
    *folders, name = path.relative_to(root).as_posix().lower().split("/")
    stem = name.removesuffix(".gz").removesuffix(suffix_of(path))
    parts = [*folders, stem]
    for i in reversed(range(len(parts))):
        if known := _split_in(parts[i]):
            split, rank, rest = known
            if i == len(folders):  # the file's own name, of which shard numbers are no part
                rest = _SHARD.sub("", rest)
            config = (*folders[:i], rest.strip("_.-"), *folders[i + 1 :])
            return Found(path, split, rank, "/".join(p for p in config if p and p != "data"))
    return Found(path, "", 0, "/".join(p for p in folders if p != "data"))


def _split_in(name: str) -> tuple[str, int, str] | None:
    """The split that a name has as one of its words, its rank, and the rest of the name."""
    for word in _WORDS.finditer(name):
        known = split_of_word(word[0])
        if known is None and word.start() == 0:  # trainset, testdata: as a beginning the word is enough
            known = next(
                (known for n in (5, 4) if (known := split_of_word(word[0][:n])) and word[0][:n] in ("train", "test")),
                None,
            )
        if known:
            return *known, f"{name[: word.start()]}{name[word.end() :]}"
    return None


def _pick(root: Path, found: Sequence[Found], config: str | None) -> tuple[list[Found], list[str]]:
    """The files of one configuration. Raises: UserError if there are several and none was picked, or the name is unknown."""
    configs = sorted({f.config for f in found if f.split == "train"}) or sorted({f.config for f in found})
    names = ", ".join(c or "default" for c in configs)
    if config == ALL:
        return list(found), []
    if config is not None:
        wanted = "" if config == "default" and "" in configs else config.lower()
        if wanted not in configs:
            raise UserError(f"--data.config {config}: {root} has {names or 'no rows'}")
    elif len(configs) > 1:
        raise UserError(
            f"{root} holds several configurations ({names}): name one with --data.config, or {ALL} to join them"
        )
    else:
        wanted = configs[0] if configs else ""
    own = [f for f in found if f.config == wanted]
    if any(f.split == "test" for f in own):
        return own, []
    others = {f.config for f in found if f.split == "test"}
    shared = [f for f in found if f.split == "test"] if len(others) == 1 and len(configs) == 1 else []
    return own + shared, []


def _check_twice(root: Path, files: Sequence[Found]) -> None:
    """Raises: UserError for a file that is there in two formats: its rows would count twice."""
    stems: dict[Path, Path] = {}
    for path in (f.path for f in files):
        stem = path.with_name(path.name.lower().removesuffix(".gz").removesuffix(suffix_of(path)))
        if stem in stems:
            raise UserError(
                f"{root} holds {stems[stem].name} and {path.name}: are these the same rows twice? Name one of the two, or move one away"
            )
        stems[stem] = path


def _list(root: Path, files: Sequence[Found]) -> str:
    names = [f.path.relative_to(root).as_posix() for f in files]
    return f"{', '.join(names[:3])}{', ...' if names[3:] else ''}"
