"""Named data sets, files and directories as rows: dialogues, texts and preferences, every bad row counted and reported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.columns import FORMATS, Columns, parse_columns
from tunesmith.data.dialogue import BadRow
from tunesmith.data.documents import split_keys, split_of_word
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.forms import Reader, checked, repeats_prompts
from tunesmith.data.forms import parse_pair as parse_pair
from tunesmith.data.forms import parse_row as parse_row
from tunesmith.data.forms import read_row as read_row
from tunesmith.data.hh import HH_SUBSETS, PUBLISHED_ROWS, RECIPES, hh_files, rm_static_files
from tunesmith.data.layout import find_layout
from tunesmith.data.mixture import mixed, parse_sets, shares
from tunesmith.data.readers import SUFFIXES, TEXT_SUFFIXES, Located, Report, read_file, read_object, suffix_of
from tunesmith.errors import UsageError, UserError, did_you_mean, path_meant
from tunesmith.hub import download_dataset
from tunesmith.options.training import DataOptions

NAMED = ("hh", *(f"hh:{subset}" for subset in HH_SUBSETS), "hh-static", "hh-helpful-half", "hh-pairs", "sample")
READING = 2  # raise it when rows of own files come to mean something else: what was tokenised of them is then made anew
HEAD = 200  # rows at the beginning of a split that show how its answers are written


@dataclass(frozen=True)
class Source:
    """A resolved data set: which files hold its splits, and how their rows become dialogues.

    columns: `--data.columns`. keys: of a JSON object with several splits, the key of each. split_column, split_of: a column
    that says of every row where it belongs, and what its values mean; "" for rows of neither split. own: files of the user's.
    parts, weights: of a mixture, the sets that it is made of; `files` are then theirs, one after the other.
    """

    name: str
    recipe: str
    files: dict[str, tuple[Path, ...]]
    rm_static: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    seed: int = 0
    max_rows: int | None = None
    notes: tuple[str, ...] = ()
    columns: Columns = ()
    keys: dict[str, str] = field(default_factory=dict)
    split_column: str = ""
    split_of: dict[str, str] = field(default_factory=dict)
    own: bool = False
    parts: tuple[Source, ...] = ()
    weights: tuple[float | None, ...] = ()

    def digests(self, split: str) -> dict[str, str]:
        """The content of each file that decides the split's rows: its name among them -> SHA-256, in the order of reading."""
        if self.parts:
            inner = [part.digests(split).items() for part in self.parts]
            return {self._of_part(i, name): digest for i, found in enumerate(inner) for name, digest in found}
        paths, rm = self.files[split], self.rm_static.get(split, ())
        named = {label(paths, i): path for i, path in enumerate(paths)}
        named |= {f"rm-static/{label(rm, i)}": path for i, path in enumerate(rm)}
        return {name: content_hash([path]) for name, path in named.items()}

    def _of_part(self, number: int, name: str) -> str:
        """A file of one of the mixture's sets; a set may be there twice."""
        return f"{self.parts[number].name}#{number + 1}/{name}"

    def fingerprint(self, split: str, digests: Mapping[str, str] | None = None) -> str:
        """Of everything that decides the split's rows and their report; digests: those of its files, where they are known."""
        digests = self.digests(split) if digests is None else digests
        if self.parts:
            inner = []
            for i, part in enumerate(self.parts):
                own = self._of_part(i, "")
                mine = {name.removeprefix(own): digest for name, digest in digests.items() if name.startswith(own)}
                inner.append(part.fingerprint(split, mine))
            return content_hash([repr((inner, self.weights, self.seed, self.max_rows))])
        published = self.name if self.name in PUBLISHED_ROWS else ""
        labels = [label(self.files[split], i) for i in range(len(self.files[split]))]
        rules = [repr((published, split, labels, self.recipe, self.seed, self.max_rows))]
        if self.own:
            read_as = (READING, self.columns, self.keys.get(split), self.split_column, sorted(self.split_of.items()))
            rules.append(repr(read_as))
        return content_hash([*rules, *map(bytes.fromhex, digests.values())])

    def content(self, digests: Mapping[str, str]) -> str:
        """Of which rows there are, independent of the files' names; digests: those of their files."""
        mixed = [repr([(p.recipe, w) for p, w in zip(self.parts, self.weights, strict=True)])] if self.parts else []
        return content_hash([self.recipe, *mixed, *map(bytes.fromhex, digests.values())])

    def raw_rows(self, split: str, report: Report) -> Iterator[Located]:
        """The rows that the recipe selects, as they stand in the files; unreadable lines go to `report`. Not of a mixture."""
        paths, key = self.files[split], self.keys.get(split, "")
        read = (r for i, path in enumerate(paths) for r in read_file(path, i, report, label(paths, i), key))
        if any(self.split_of.values()):
            read = (r for r in read if self._split_of(r.value) == split)
        return islice(RECIPES[self.recipe](self.rm_static.get(split, ()), self.seed, read), self.max_rows)

    def _split_of(self, row: Any) -> str:
        value = row.get(self.split_column) if isinstance(row, dict) else None
        return "train" if value is None else self.split_of.get(str(value), "")

    def opened(self, split: str, report: Report) -> tuple[Reader, Iterator[Located]]:
        """The rows as `raw_rows`, and the reader that makes dialogues of them. Not of a mixture."""
        rows = self.raw_rows(split, report)
        head = list(islice(rows, HEAD))
        honoured = (self.split_column, *(("group",) if not self.own else ()))
        echoes = repeats_prompts((located.value for located in head), self.columns)
        return Reader(self.columns, honoured, echoes), chain(head, rows)

    def rows(self, split: str, report: Report, *, pairs: bool = False, as_text: bool = False) -> Iterator[Located]:
        """Located Dialogues, Texts and Preferences in order; bad rows go to `report`.

        pairs: only good Preferences. as_text: rows of which every token is learned (`forms.checked`).
        """
        if self.parts:
            yield from islice(_mixed_rows(self, split, report, pairs=pairs, as_text=as_text), self.max_rows)
            return
        reader, rows = self.opened(split, report)
        for located in rows:
            report.rows += 1
            try:
                row = reader.read_pair(located.value) if pairs else checked(reader.read(located.value), as_text=as_text)
                report.used += 1
                yield Located(row, located.file, located.line)
            except BadRow as reason:
                report.add_bad(str(reason), self.place(split, located.file, located.line))
        if not report.used:
            reasons = "; ".join(report.lines()) or f"it is empty; expected rows with {FORMATS}"
            raise UserError(
                f"{self.name} ({split}) has no usable row in {', '.join(map(str, self.files[split]))}: {reasons}"
            )
        report.form += reader.form_lines()
        report.notes += reader.notes()
        expected = PUBLISHED_ROWS.get(self.name)
        if expected and self.max_rows is None and report.rows != (want := expected[split != "train"]):
            report.notes.append(f"{self.name} {split}: {report.rows:,} rows, but the published data set has {want:,}")

    def place(self, split: str, file: int, line: int) -> str:
        """`file:line` of a row, for messages."""
        for part in self.parts:
            if file < len(part.files[split]):
                return part.place(split, file, line)
            file -= len(part.files[split])
        return f"{label(self.files[split], file)}:{line}"


def _mixed_rows(source: Source, split: str, report: Report, *, pairs: bool, as_text: bool) -> Iterator[Located]:
    """The rows of a mixture. The parts are read twice: to count their usable rows, and to give those that are drawn."""
    reports = [Report() for _ in source.parts]
    counts = [
        sum(1 for _ in part.rows(split, its, pairs=pairs, as_text=as_text))
        for part, its in zip(source.parts, reports, strict=True)
    ]
    wanted = shares(counts, source.weights)
    first = [sum(len(p.files[split]) for p in source.parts[:i]) for i in range(len(source.parts))]
    rows = [enumerate(part.rows(split, Report(), pairs=pairs, as_text=as_text)) for part in source.parts]
    for part, its in zip(source.parts, reports, strict=True):  # before the first row: max_rows may end it at any
        for reason, n in its.bad.items():
            report.bad[reason] = report.bad.get(reason, 0) + n
            report.places[reason] = [*report.places.get(reason, []), *its.places[reason]][:3]
        report.form += [f"{part.name}: {line}" for line in its.form]
        report.notes += [f"{part.name}: {line}" for line in its.notes]
    report.rows = sum(report.bad.values())
    drawn = ", ".join(f"{k:,} of {n:,} rows of {p.name}" for k, n, p in zip(wanted, counts, source.parts, strict=True))
    report.notes.append(f"mixture, {split}: {drawn}")
    for which, number in mixed(counts, wanted, source.seed):
        located = next(row for i, row in rows[which] if i == number)
        report.rows += 1
        report.used += 1
        yield Located(located.value, first[which] + located.file, located.line)


def label(paths: Sequence[Path], number: int) -> str:
    """A file's name, with its folder where the files of a split lie in several: `helpful-base/train.jsonl.gz`."""
    common = os.path.commonpath([path.parent for path in paths])
    return paths[number].relative_to(common).as_posix()


def open_dataset(options: DataOptions) -> Source:
    """Find the files of `options.name`: a recipe, a file or directory, a data set on the hub, or a mixture of such.

    Raises: UserError if something is missing; it says what was looked for and where.
    """
    name, limit = options.name, options.max_rows
    if limit is not None and limit < 1:
        raise UsageError(f"--data.max_rows is {limit}, expected at least 1")
    if not name.strip():
        raise UsageError("--data.name is empty; give a data set, a file or a directory (is a shell variable unset?)")
    sets = parse_sets(name)
    if len(sets) > 1:
        return _mixture(options, sets)
    name = sets[0][0]
    if is_named(name):
        if options.columns or options.config:
            given = "columns" if options.columns else "config"
            raise UsageError(f"--data.{given} is for your own files; {name} has fixed columns and no configurations")
        return _named(name, options)
    path, columns = Path(name).expanduser(), parse_columns(options.columns)
    own = Source(name, "rows", {}, seed=0, max_rows=limit, columns=columns, own=True)
    if path.is_file():
        if options.config:
            raise UsageError(
                f"--data.config {options.config}: {name} is one file; configurations are those of a directory"
            )
        return _with_splits_inside(replace(own, files={"train": (path,)}))
    if not path.is_dir():
        if path.suffix[1:].isalpha() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"data set {name!r} is neither a file nor a directory here, nor a known name{_near(path)}")
        wanted = [f"*{suffix}{gz}" for suffix in (*SUFFIXES, *TEXT_SUFFIXES) for gz in ("", ".gz")]
        path = download_dataset(name, wanted, "--data.name DIR")
    layout = find_layout(path, options.config)
    found = replace(own, files=layout.files, notes=layout.notes)
    return found if "test" in layout.files else _with_splits_inside(found)


def _named(name: str, options: DataOptions) -> Source:
    """The sample, or a recipe on HH-RLHF."""
    base, _, subset = name.partition(":")
    if name == "sample":
        here = Path(__file__).parents[1] / "sample"
        return Source(name, "rows", {s: (here / f"{s}.jsonl",) for s in ("train", "test")}, max_rows=options.max_rows)
    if subset and (base != "hh" or subset not in HH_SUBSETS):
        raise UserError(
            f"--data.name {name}: the subsets are {', '.join('hh:' + s for s in HH_SUBSETS)}{did_you_mean(name, NAMED)}"
        )
    helpful_only = base in ("hh-helpful-half", "hh-pairs")
    wanted = (subset,) if subset else ("helpful-base",) if helpful_only else HH_SUBSETS
    files, notes = hh_files(wanted, options)
    rm = rm_static_files(options) if base == "hh-static" else {}
    return Source(name, base, files, rm, options.rows_seed, options.max_rows, notes)


def _near(path: Path) -> str:
    """The names there are, and the one that was probably meant: a data set's, or a file's beside the missing one."""
    names = "; names: hh, hh:SUBSET, hh-static, hh-helpful-half, hh-pairs, sample"
    return f"{names}{did_you_mean(str(path), NAMED) or path_meant(path)}"


def beside(options: DataOptions, name: str) -> DataOptions:
    """The options for another set beside the main one, read whole; a named set has its own columns and configuration."""
    own = options if not is_named(name) else replace(options, columns=None, config=None)
    return replace(own, name=name, max_rows=None)


def is_named(name: str) -> bool:
    """Whether a data set is called so, wherever the name is used; else it is a file, a directory or a set on the hub."""
    return name == "sample" or name.partition(":")[0] in ("hh", "hh-static", "hh-helpful-half", "hh-pairs")


def _mixture(options: DataOptions, sets: Sequence[tuple[str, float | None]]) -> Source:
    """Several sets as one; it has a test split where all of them have one."""
    parts = tuple(open_dataset(beside(options, name)) for name, _ in sets)
    splits = [s for s in ("train", "test") if all(s in part.files for part in parts)]
    files = {split: tuple(chain.from_iterable(part.files[split] for part in parts)) for split in splits}
    notes = [f"{part.name}: {note}" for part in parts for note in part.notes]
    alone = [part.name for part in parts if "test" in part.files] if "test" not in splits else []
    if alone:
        notes.append(f"the test rows of {', '.join(alone)} are not used: the other sets have no test rows")
    weights = tuple(weight for _, weight in sets)
    return Source(
        options.name,
        "rows",
        files,
        seed=options.rows_seed,
        max_rows=options.max_rows,
        notes=tuple(notes),
        parts=parts,
        weights=weights,
    )


def _with_splits_inside(source: Source) -> Source:
    """The source with the splits that its files hold: under keys of a JSON object, or by a column of the rows."""
    files = source.files["train"]
    if len(files) == 1 and suffix_of(files[0]) in (".json", ".jsonl") and (keys := split_keys(read_object(files[0]))):
        return replace(source, files=dict.fromkeys(keys, files), keys=keys)
    head = [r.value for r in islice(source.raw_rows("train", Report()), HEAD) if isinstance(r.value, dict)]
    columns = [c for row in head for c in row if c.strip().lower() == "split" and split_of_word(str(row[c]))]
    if not columns:
        return source
    column = columns[0]
    whole = replace(source, max_rows=None)
    every = (r.value.get(column) for r in whole.raw_rows("train", Report()) if isinstance(r.value, dict))
    values = Counter(str(value) for value in every if value is not None)
    known = {value: split_of_word(value) for value in values}
    best = min((found[1] for found in known.values() if found and found[0] == "test"), default=0)
    split_of = {v: f[0] if f and (f[0] == "train" or f[1] == best) else "" for v, f in known.items()}
    left = [f"{n:,} of {v!r}" for v, n in values.items() if not split_of[v]]
    notes = (
        (f"rows that their column `{column}` puts in neither train nor test are not used: {', '.join(left)}",)
        if left
        else ()
    )
    splits = [s for s in ("train", "test") if s in split_of.values()]
    if "train" not in splits:
        raise UserError(
            f"{source.name}: no row's column `{column}` says train ({', '.join(values)}); rename or drop the column"
        )
    return replace(
        source,
        files=dict.fromkeys(splits, files),
        split_column=column,
        split_of=split_of,
        notes=(*source.notes, *notes),
    )


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
