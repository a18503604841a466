"""HH-RLHF: its files in the publisher's layout, and the report's recipes, which select its rows and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.data.layout import find_layout
from tunesmith.data.readers import Located, Report, read_file
from tunesmith.errors import UserError
from tunesmith.hub import download_dataset
from tunesmith.options.training import DataOptions

HH_REPO, RM_STATIC_REPO = "Anthropic/hh-rlhf", "Dahoas/rm-static"
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
PUBLISHED_ROWS = {  # train, test: counts of the report that spec'd these recipes and of the data set's card
    "hh": (160_800, 8_552), "hh-static": (84_576, 3_451), "hh-helpful-half": (21_917, 1_177), "hh-pairs": (21_917, 1_177),
    "hh:harmless-base": (42_537, 2_312), "hh:helpful-base": (43_835, 2_354), "hh:helpful-online": (22_007, 1_137),
    "hh:helpful-rejection-sampled": (52_421, 2_749),
}  # fmt: skip


def hh_files(subsets: Sequence[str], options: DataOptions) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
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
            for s in ("train", "test")
        ]
        (present if all(found) else missing).append((subset, found))
    names = ", ".join(f"{subset}/{{train,test}}.jsonl.gz" for subset, _ in missing)
    if missing and not (options.allow_missing and present):
        raise UserError(
            f"{root} lacks {names}. Add them, name one subset (hh:SUBSET), or pass --data.allow_missing true"
        )
    files = {
        split: tuple(path for _, found in present if (path := found[i])) for i, split in enumerate(("train", "test"))
    }
    return files, ((f"continuing without {names}",) if missing else ())


def rm_static_files(options: DataOptions) -> dict[str, tuple[Path, ...]]:
    if options.rm_static is None:
        return find_layout(download_dataset(RM_STATIC_REPO, ["*.parquet", "*.jsonl"], "--data.rm_static DIR")).files
    root = Path(options.rm_static).expanduser()
    try:
        files = find_layout(root).files
    except UserError:
        files = {}
    if set(files) != {"train", "test"}:
        raise UserError(f"--data.rm_static {root}: expected a directory with train.* and test.* (Parquet or JSONL)")
    return files


# ---- recipes: which raw rows, in which order -----------------------------------------------------------------------


def _all_rows(_rm_static: Sequence[Path], _seed: int, rows: Iterator[Located]) -> Iterator[Located]:
    return rows


def _static(rm_static: Sequence[Path], _seed: int, rows: Iterator[Located]) -> Iterator[Located]:
    """All of HH without the rows that rm-static holds: the report's EYLSFTStaticDataset."""
    report, known = Report(), set()
    for number, path in enumerate(rm_static):
        for r in read_file(path, number, report):
            try:
                known.add(r.value["prompt"] + r.value["chosen"])
            except (KeyError, TypeError):
                raise UserError(
                    f"{path}:{r.line} is not a row of rm-static: expected the text columns prompt and chosen (--data.rm_static)"
                ) from None
    if report.bad:  # a row less here would be a row more to train on
        raise UserError(f"--data.rm_static: {'; '.join(report.lines())}; download it again")
    return (r for r in rows if not isinstance(r.value, dict) or r.value.get("chosen") not in known)


def _helpful_half(_rm_static: Sequence[Path], _seed: int, rows: Iterator[Located]) -> Iterator[Located]:
    """The first half of helpful-base in the order of torch.manual_seed(123); randperm: the report's SFTDataset."""
    listed = list(rows)
    return (listed[i] for i in _randperm(len(listed) // 2, 123))


def _pairs(_rm_static: Sequence[Path], seed: int, rows: Iterator[Located]) -> Iterator[Located]:
    """A random half of helpful-base: the report's RLHFDataset."""
    listed = list(rows)
    return (listed[i] for i in _randperm(len(listed), seed)[: len(listed) // 2])


def _randperm(n: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


RECIPES: dict[str, Callable[[Sequence[Path], int, Iterator[Located]], Iterator[Located]]] = {
    "rows": _all_rows,
    "hh": _all_rows,
    "hh-static": _static,
    "hh-helpful-half": _helpful_half,
    "hh-pairs": _pairs,
}
"""(files of rm-static, seed, raw rows) -> the rows that a recipe selects, in its order."""
