"""Named data sets and the ecosystem's formats: files to rows of text, with every bad row counted and told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.dialogue import (
    BadRow,
    Dialogue,
    Preference,
    Row,
    Text,
    check_text,
    parse_messages,
    parse_transcript,
)
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.readers import TEXT_SUFFIXES, Located, Report, read_file
from tunesmith.errors import UsageError, UserError
from tunesmith.hub import download_dataset
from tunesmith.options.training import DataOptions

HH_REPO, RM_STATIC_REPO = "Anthropic/hh-rlhf", "Dahoas/rm-static"
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
FORMATS = "text | messages | prompt + completion | prompt + chosen + rejected | chosen + rejected"
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "dev", "eval")}
PUBLISHED_ROWS = {  # train, test: counts of the report that spec'd these recipes and of the data set's card
    "hh": (160_800, 8_552), "hh-static": (84_576, 3_451), "hh-helpful-half": (21_917, 1_177), "hh-pairs": (21_917, 1_177),
    "hh:harmless-base": (42_537, 2_312), "hh:helpful-base": (43_835, 2_354), "hh:helpful-online": (22_007, 1_137),
    "hh:helpful-rejection-sampled": (52_421, 2_749),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A resolved data set: which files hold its splits, and how their rows become dialogues."""

    name: str
    recipe: str
    files: dict[str, tuple[Path, ...]]
    rm_static: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    seed: int = 0
    max_rows: int | None = None
    notes: tuple[str, ...] = ()

    def digests(self, split: str) -> dict[str, str]:
        """The content of each file that decides the split's rows: its name among them -> SHA-256, in the order of reading."""
        paths, rm = self.files[split], self.rm_static.get(split, ())
        named = {label(paths, i): path for i, path in enumerate(paths)}
        named |= {f"rm-static/{label(rm, i)}": path for i, path in enumerate(rm)}
        return {name: content_hash([path]) for name, path in named.items()}

    def fingerprint(self, split: str, digests: Mapping[str, str]) -> str:
        """Of everything that decides the split's rows and their report; digests: those of its files."""
        published = self.name if self.name in PUBLISHED_ROWS else ""
        labels = [label(self.files[split], i) for i in range(len(self.files[split]))]
        rules = repr((published, split, labels, self.recipe, self.seed, self.max_rows))
        return content_hash([rules, *map(bytes.fromhex, digests.values())])

    def raw_rows(self, split: str, report: Report) -> Iterator[Located]:
        """The rows that the recipe selects, as they stand in the files; unreadable lines go to `report`."""
        paths = self.files[split]
        read = (r for i, path in enumerate(paths) for r in read_file(path, i, report, label(paths, i)))
        return islice(RECIPES[self.recipe](self, split, read), self.max_rows)

    def rows(self, split: str, report: Report, *, pairs: bool = False) -> Iterator[Located]:
        """Located Dialogues, Texts and Preferences (`pairs`: only good Preferences) in order; bad rows go to `report`."""
        for located in self.raw_rows(split, report):
            report.rows += 1
            try:
                row = parse_pair(located.value) if pairs else parse_row(located.value)
                report.used += 1
                yield Located(row, located.file, located.line)
            except BadRow as reason:
                report.add_bad(str(reason), self.place(split, located.file, located.line))
        if not report.used:
            reasons = "; ".join(report.lines()) or f"it is empty; expected rows with {FORMATS}"
            raise UserError(f"{self.name} ({split}) has no usable row in {_names(self.files[split])}: {reasons}")
        expected = PUBLISHED_ROWS.get(self.name)
        if expected and self.max_rows is None and report.rows != (want := expected[split != "train"]):
            report.notes.append(f"{self.name} {split}: {report.rows:,} rows, the published data set has {want:,}")

    def place(self, split: str, file: int, line: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{label(self.files[split], file)}:{line}"


def label(paths: Sequence[Path], number: int) -> str:
    """A file's name, with its folder where the files of a split lie in several: `helpful-base/train.jsonl.gz`."""
    common = os.path.commonpath([path.parent for path in paths])
    return paths[number].relative_to(common).as_posix()


def open_dataset(options: DataOptions) -> Source:
    """Find the files of `options.name`: a recipe, a local file or directory, or a data set on the hub.

    Raises: UserError if something is missing; it says what was looked for and where.
    """
    name, seed, limit = options.name, options.seed, options.max_rows
    if limit is not None and limit < 1:
        raise UsageError(f"--data.max_rows is {limit}, expected at least 1")
    if name == "sample":
        here = Path(__file__).parents[1] / "sample"
        return Source(name, "rows", {s: (here / f"{s}.jsonl",) for s in ("train", "test")}, max_rows=limit)
    base = name.partition(":")[0]
    if base in ("hh", "hh-static", "hh-helpful-half", "hh-pairs"):
        subset = name.partition(":")[2]
        if subset and (base != "hh" or subset not in HH_SUBSETS):
            raise UserError(f"--data.name {name}: the subsets are {', '.join('hh:' + s for s in HH_SUBSETS)}")
        helpful_only = base in ("hh-helpful-half", "hh-pairs")
        wanted = (subset,) if subset else ("helpful-base",) if helpful_only else HH_SUBSETS
        files, notes = _hh_files(wanted, options)
        rm = _rm_static_files(options) if base == "hh-static" else {}
        return Source(name, base, files, rm, seed, limit, notes)
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name, "rows", {"train": (path,)}, max_rows=limit)
    if not path.is_dir():
        if path.suffix[1:].isalpha() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            near = "; names: hh, hh:SUBSET, hh-static, hh-helpful-half, hh-pairs, sample"
            raise UserError(f"data set {name!r} is neither a file nor a directory here, nor a known name{near}")
        path = download_dataset(name, [f"*{suffix}" for suffix in (*SUFFIXES, *TEXT_SUFFIXES)], "--data.name DIR")
    files = _split_files(path)
    if "train" not in files:
        raise UserError(
            f"{path} holds no train.* file; expected train{{{','.join((*SUFFIXES, *TEXT_SUFFIXES))}}} and, if you have one, test.*"
        )
    return Source(name, "rows", files, max_rows=limit)


def _hh_files(subsets: Sequence[str], options: DataOptions) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    if options.root is None:
        root = download_dataset(
            HH_REPO, [f"{s}/{split}.jsonl.gz" for s in subsets for split in ("train", "test")], "--data.root DIR"
        )
    else:
        root = Path(options.root).expanduser()
        if not root.is_dir():
            raise UserError(
                f"--data.root {root} is not a directory; it should hold helpful-base/train.jsonl.gz and so on"
            )
    present: list[tuple[str, list[Path | None]]] = []
    missing: list[tuple[str, list[Path | None]]] = []
    for subset in subsets:
        found = [
            next((p for p in (root / subset / f"{s}.jsonl.gz", root / subset / f"{s}.jsonl") if p.exists()), None)
            for s in SPLIT_NAMES
        ]
        (present if all(found) else missing).append((subset, found))
    names = ", ".join(f"{subset}/{{train,test}}.jsonl.gz" for subset, _ in missing)
    if missing and not (options.allow_missing and present):
        raise UserError(
            f"{root} lacks {names}. Add them, name one subset (hh:SUBSET), or pass --data.allow_missing true"
        )
    files = {split: tuple(path for _, found in present if (path := found[i])) for i, split in enumerate(SPLIT_NAMES)}
    return files, ((f"going on without {names}",) if missing else ())


def _rm_static_files(options: DataOptions) -> dict[str, tuple[Path, ...]]:
    if options.rm_static is None:
        return _split_files(download_dataset(RM_STATIC_REPO, ["*.parquet", "*.jsonl"], "--data.rm_static DIR"))
    root = Path(options.rm_static).expanduser()
    files = _split_files(root) if root.is_dir() else {}
    if set(files) != {"train", "test"}:
        raise UserError(f"--data.rm_static {root}: expected a directory with train.* and test.* (Parquet or JSONL)")
    return files


def _split_files(root: Path) -> dict[str, tuple[Path, ...]]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    rows = [p for p in files if p.name.endswith(SUFFIXES)]  # a train-log.txt beside train.jsonl is no data
    found = rows or [p for p in files if p.name.endswith(TEXT_SUFFIXES)]
    splits = {}
    for split, prefixes in SPLIT_NAMES.items():  # of test, validation, ... the first that is there
        by_prefix = (tuple(p for p in found if p.name.lower().startswith(prefix)) for prefix in prefixes)
        if named := next(filter(None, by_prefix), ()):
            splits[split] = named
    return splits


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(p) for p in paths)


# ---- raw rows to dialogues -----------------------------------------------------------------------------------------


def parse_row(row: Any) -> Row:
    """A Dialogue, Text or Preference from a row in one of FORMATS.

    Strings in the HH form are taken apart; any other prompt is one user turn and any other answer one assistant turn.
    Raises: BadRow with the reason.
    """
    read = read_row(row)
    if isinstance(read, Text):
        return read.check()
    (read.chosen if isinstance(read, Preference) else read).check()
    return read


def read_row(row: Any) -> Row:
    """As `parse_row`, also where there is nothing to learn from: an empty answer, none at all, two prompts that differ."""
    if not isinstance(row, dict):
        raise BadRow("not an object with columns")
    columns = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= columns:
        chosen, rejected = (_dialogue(row.get("prompt"), row[name]) for name in ("chosen", "rejected"))
        return Preference(chosen, rejected)
    if "messages" in columns:
        return parse_messages(row["messages"])
    if {"prompt", "completion"} <= columns:
        return _dialogue(row["prompt"], row["completion"])
    if "text" in columns:
        if not isinstance(row["text"], str):
            raise BadRow("`text` is not a string")
        if row["text"].startswith("\n\nHuman:"):
            return parse_transcript(row["text"])
        return Text(check_text(row["text"]))
    raise BadRow(f"no known columns (found {', '.join(sorted(columns)) or 'none'}; expected {FORMATS})")


def parse_pair(row: Any) -> Preference:
    """A Preference from a row with chosen and rejected. Raises: BadRow with the reason."""
    if not isinstance(row, dict) or row.get("chosen") is None or row.get("rejected") is None:
        raise BadRow("no pair (columns chosen and rejected)")
    return Preference(*(_dialogue(row.get("prompt"), row[name]) for name in ("chosen", "rejected"))).check()


def _dialogue(prompt: Any, answer: Any) -> Dialogue:
    if isinstance(answer, list) or isinstance(prompt, list):
        turns = [(prompt, "user"), (answer, "assistant")] if prompt is not None else [(answer, "assistant")]
        lists = [part if isinstance(part, list) else [{"role": role, "content": part}] for part, role in turns]
        return parse_messages(list(chain.from_iterable(lists)))
    if not isinstance(answer, str) or not (prompt is None or isinstance(prompt, str)):
        raise BadRow("prompt or answer is neither text nor a list of turns")
    if prompt is None or prompt.startswith("\n\nHuman:"):
        return parse_transcript((prompt or "") + answer)
    return parse_messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


# ---- recipes: which raw rows, in which order -----------------------------------------------------------------------


def _all_rows(_source: Source, _split: str, rows: Iterator[Located]) -> Iterator[Located]:
    return rows


def _static(source: Source, split: str, rows: Iterator[Located]) -> Iterator[Located]:
    """All of HH without the rows that rm-static holds: the report's EYLSFTStaticDataset."""
    report, known = Report(), set()
    for number, path in enumerate(source.rm_static[split]):
        for r in read_file(path, number, report):
            try:
                known.add(r.value["prompt"] + r.value["chosen"])
            except (KeyError, TypeError):
                raise UserError(
                    f"{path}:{r.line} is no row of rm-static: expected the texts prompt and chosen (--data.rm_static)"
                ) from None
    if report.bad:  # a row less here would be a row more to train on
        raise UserError(f"--data.rm_static: {'; '.join(report.lines())}; download it again")
    return (r for r in rows if not isinstance(r.value, dict) or r.value.get("chosen") not in known)


def _helpful_half(_source: Source, _split: str, rows: Iterator[Located]) -> Iterator[Located]:
    """The first half of helpful-base in the order of torch.manual_seed(123); randperm: the report's SFTDataset."""
    listed = list(rows)
    return (listed[i] for i in _randperm(len(listed) // 2, 123))


def _pairs(source: Source, _split: str, rows: Iterator[Located]) -> Iterator[Located]:
    """A random half of helpful-base: the report's RLHFDataset."""
    listed = list(rows)
    return (listed[i] for i in _randperm(len(listed), source.seed)[: len(listed) // 2])


def _randperm(n: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


RECIPES: dict[str, Callable[[Source, str, Iterator[Located]], Iterator[Located]]] = {
    "rows": _all_rows,
    "hh": _all_rows,
    "hh-static": _static,
    "hh-helpful-half": _helpful_half,
    "hh-pairs": _pairs,
}


def holdout_rows(rows: int, share: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row numbers for training and validation where a data set has no test split: a seeded share, at least one each.

    Raises: UserError if there are fewer than two rows.
    """
    if rows < 2:
        raise UserError(
            "one usable row cannot be split into training and validation; give a directory with train.* and test.*"
        )
    order = np.random.default_rng(seed).permutation(rows)
    held = min(max(1, round(rows * share)), rows - 1)
    return np.sort(order[held:]), np.sort(order[:held])
