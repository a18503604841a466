"""A data set looked over before any training: what its rows lack, what cutting costs, what leaks, what length gives away.

Two passes, each linear: one over the texts (defects, duplicates, fingerprints for overlap), one over the stored tokens
(cuts, lengths), which training then finds in the cache. Returns records; prints and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.audit.cuts import (
    END_CUT,
    OWN,
    Cut,
    cut_pairs_end,
    cut_pairs_here,
    cut_pairs_shared,
    cut_rows_end,
    cut_rows_here,
)
from tunesmith.data.audit.first_pass import Texts, read_texts
from tunesmith.data.audit.overlap import Overlap, overlap
from tunesmith.data.audit.rows import CHECKS, DIALOGUES, PAIRS, REFUSED, TEXTS, UNREADABLE
from tunesmith.data.datasets import Source, holdout_rows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.template import Template
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UsageError
from tunesmith.stats import Interval, share_interval

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Defect:
    """How many rows have one defect, and where: all places, of unreadable and refused rows the first three of each reason.

    kind: a key of CHECKS, or `unreadable` or `refused` (by the template), of which `what` is the reason.
    """

    kind: str
    what: str
    rows: int
    places: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Lengths:
    """Tokens: of a pair's prompt, chosen or rejected answer, or of a whole row; end-of-text tokens are not counted."""

    mean: float
    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class LengthBias:
    """What length alone says about the preferred answer, in tokens, over usable pairs.

    longer, equal: shares of the pairs whose chosen answer is longer than the rejected one, or as long.
    rule: how often `the longer answer wins` is right, an equal pair counting one half.
    """

    longer: Interval
    equal: Interval
    rule: Interval


@dataclass(frozen=True)
class SplitAudit:
    """What was found in one split.

    usable: rows that training takes before any cutting: for pairs, as `reward` and `dpo` do.
    repeated_prompts: rows, no duplicates, whose prompt an earlier row has too: no defect, several answers to one prompt.
    findings: every check that applies to the forms found, also those that found nothing.
    """

    split: str
    rows: int
    usable: int
    forms: dict[str, int]
    repeated_prompts: int
    findings: tuple[Defect, ...]
    cuts: tuple[Cut, ...]
    lengths: dict[str, Lengths]
    bias: LengthBias | None
    overlaps: tuple[Overlap, ...]
    notes: tuple[str, ...]
    form: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found in a data set, at one block size and truncation rule. positions: the model's, None where it is unknown."""

    name: str
    block_size: int
    truncation: str
    splits: tuple[SplitAudit, ...]
    positions: int | None = None

    def problems(self) -> list[str]:
        """One line for each thing that is wrong or would be lost in training, with its remedy."""
        lines = []
        for s in self.splits:
            lines += [f"{s.split}: {_told(f)}: {f.remedy}" for f in s.findings if f.rows]
            lines += [
                f"{s.split}: {_told_cut(c, self.block_size, self.positions)}" for c in s.cuts if c.rule == OWN and c.cut
            ]
            lines += [f"{s.split}: {_told_overlap(o)}" for o in s.overlaps if o.prompts or o.texts]
        return lines

    def remarks(self) -> list[str]:
        """One line for each thing worth knowing that is not a defect of the data."""
        lines = [note for s in self.splits for note in s.notes]
        for s in self.splits:
            lines += [
                f"{o.other}: {o.unread:,} {_plural(o.unread)} not compared: cannot be read"
                for o in s.overlaps
                if o.unread
            ]
            lines += [
                f"{s.split}: {_told_end_cut(c, self.block_size)}"
                for c in s.cuts
                if c.rule == END_CUT and c.form != TEXTS and (c.no_signal or c.end_lost)
            ]
            if s.bias and 0.5 not in s.bias.rule:
                which = "longer" if s.bias.rule.mean > 0.5 else "shorter"
                right = max(s.bias.rule.mean, 1 - s.bias.rule.mean)
                lines.append(
                    f"{s.split}: `the {which} answer is better` is right for {right:.1%} of the pairs, counted in tokens of this "
                    "tokenizer: compare a reward model's accuracy with that, using its model's tokenizer (--tokenizer MODEL), "
                    "and compare answers of similar length"
                )
        return list(dict.fromkeys(lines))


def audit(
    source: Source,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    truncation: str | None = "auto",
    loss_on: str = "assistant",
    holdout: float = 0.05,
    seed: int = 0,
    against: Sequence[Source] = (),
    positions: int | None = None,
) -> Audit:
    """Look over every split of `source`.

    truncation: None where rows are not cut one by one (windows). holdout, seed: as in training, for a data set without
        a test split. against: other data sets, in which the rows of this one should not be. positions: as in Audit.
    Raises: UserError for a file that cannot be read or has no row at all; UsageError for settings out of range.
    """
    if block_size < 1:
        raise UsageError(f"--data.block_size is {block_size}, expected at least 1")
    for several in (found for found in (source, *against) if found.parts):
        raise UsageError(
            f"--audit takes one data set at a time: audit each of {several.name} alone, with the others as --against"
        )
    if not 0 < holdout < 1:
        raise UsageError(f"--data.holdout is {holdout}, expected a share between 0 and 1")
    texts = {split: read_texts(source, split, tokenizer.template) for split in source.files}
    overlaps = _overlaps(texts, holdout, seed, against, tokenizer.template)
    splits = []
    for split, read in texts.items():
        cuts, lengths, bias, notes = _read_tokens(source, split, read, tokenizer, block_size, truncation, loss_on)
        forms = {form: n for form, n in read.forms.items() if n}
        splits.append(
            SplitAudit(
                split,
                read.rows,
                sum(read.usable.values()),
                forms,
                read.repeated_prompts,
                tuple(_findings(read, forms)),
                cuts,
                lengths,
                bias,
                tuple(overlaps[split]),
                notes,
                tuple(read.form),
            )
        )
    return Audit(source.name, block_size, truncation or "windows", tuple(splits), positions)


# ---- texts ---------------------------------------------------------------------------------------------------------


def _findings(read: Texts, forms: Mapping[str, int]) -> Iterator[Defect]:
    for kind, report, remedy in (("unreadable", read.unreadable, UNREADABLE), ("refused", read.refused, REFUSED)):
        for reason, n in report.bad.items():
            yield Defect(kind, reason, n, tuple(report.places[reason]), remedy)
    for kind, check in CHECKS.items():
        if any(form in forms for form in check.forms):
            places = tuple(read.defects[kind])
            yield Defect(kind, check.label, len(places), places, check.remedy)


# ---- overlap -------------------------------------------------------------------------------------------------------


def _overlaps(
    texts: Mapping[str, Texts], holdout: float, seed: int, against: Sequence[Source], template: Template
) -> dict[str, list[Overlap]]:
    overlaps: dict[str, list[Overlap]] = {split: [] for split in texts}
    train = texts["train"].prints
    if "test" in texts:
        overlaps["test"].append(overlap(texts["test"].prints, train, "train"))
    elif len(usable := [p for p in train if p.usable]) > 1:
        rest, held = holdout_rows(len(usable), holdout, seed)
        ours = [usable[i] for i in held]
        whose = "rows held out for validation (--data.holdout)"
        overlaps["train"].append(overlap(ours, [usable[i] for i in rest], "the rest of train", whose=whose))
    for other in against:
        for other_split in other.files:
            there = read_texts(other, other_split, template)
            unread = sum(there.unreadable.bad.values())
            for split, read in texts.items():
                overlaps[split].append(
                    overlap(read.prints, there.prints, f"{other.name} ({other_split})", unread=unread)
                )
    return overlaps


# ---- tokens --------------------------------------------------------------------------------------------------------


def _read_tokens(
    source: Source, split: str, read: Texts, tokenizer: Tokenizer, block_size: int, truncation: str | None, loss_on: str
) -> tuple[tuple[Cut, ...], dict[str, Lengths], LengthBias | None, tuple[str, ...]]:
    cuts: list[Cut] = []
    lengths: dict[str, Lengths] = {}
    bias, notes = None, dict.fromkeys(read.notes)
    if read.usable[PAIRS]:
        pairs = PairStore(tokenise(source, split, tokenizer, form="pairs"))
        cuts += [
            cut_pairs_end(pairs, read.skipped, tokenizer, block_size),
            cut_pairs_shared(pairs, block_size),
        ]
        if truncation:
            cuts.append(cut_pairs_here(pairs, block_size, truncation))
        prompt, chosen, rejected = pairs.lengths.T
        lengths |= {k: _lengths(v) for k, v in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items()}
        bias = length_bias(chosen, rejected)
        notes |= dict.fromkeys(pairs.store.report.notes)
    if read.usable[DIALOGUES] or read.usable[TEXTS]:
        store = tokenise(source, split, tokenizer)
        alone = np.array([tuple(place) not in read.pair_places for place in store.places.tolist()])
        for form, wanted in ((DIALOGUES, ~store.plain & alone), (TEXTS, store.plain & alone)):
            if read.usable[form]:
                rows = np.flatnonzero(wanted)
                cuts.append(cut_rows_end(store, rows, form, block_size, loss_on))
                if truncation:
                    cuts.append(cut_rows_here(store, rows, form, block_size, truncation, loss_on))
                lengths[form] = _lengths(store.lengths[rows])
        notes |= dict.fromkeys(store.report.notes)
    return tuple(cuts), lengths, bias, tuple(notes)


def _lengths(tokens: Array) -> Lengths:
    median, p95 = np.percentile(tokens, [50, 95]).tolist()
    return Lengths(float(tokens.mean()), median, p95, int(tokens.max()))


def length_bias(chosen: Array, rejected: Array) -> LengthBias:
    """From the lengths of the answers; (pairs,) each."""
    n, longer, equal = len(chosen), int((chosen > rejected).sum()), int((chosen == rejected).sum())
    return LengthBias(share_interval(longer, n), share_interval(equal, n), share_interval(longer + equal / 2, n))


# ---- words ---------------------------------------------------------------------------------------------------------


def _told(finding: Defect) -> str:
    return f"{finding.rows:,} {_plural(finding.rows)}: {finding.what} ({_places(finding.places, finding.rows)})"


def _told_cut(cut: Cut, block_size: int, positions: int | None) -> str:
    parts = {
        "left out": cut.left_out,
        "with nothing left to learn": cut.no_signal,
        "without the end of their answer": cut.end_lost,
        "without the beginning of the prompt": cut.prompt_start_lost,
        "without the end of the prompt": cut.prompt_end_lost,
    }
    cost = ", ".join(f"{n:,} {what}" for what, n in parts.items() if n) or "nothing is lost"
    if positions is None:
        way = f"--data.block_size {cut.longest:,} would fit them all, if the model has as many positions"
    elif cut.longest <= positions:
        way = f"--data.block_size {cut.longest:,} would fit them all"
    else:
        way = f"the longest has {cut.longest:,} tokens and the model has {positions:,} positions: shorten or split such rows"
    return (
        f"{cut.cut:,} of {cut.rows:,} {cut.form} are longer than block_size {block_size:,} ({cost}; "
        f"{_places(cut.places, cut.cut)}): {way}"
    )


def _told_overlap(overlap: Overlap) -> str:
    where = _places(overlap.places, len(overlap.places))
    return (
        f"{overlap.prompts:,} prompts and {overlap.texts:,} whole texts of {overlap.rows:,} {overlap.whose or _plural(overlap.rows)} "
        f"are also in {overlap.other} ({where}): remove them from one of the two, or scores there measure memorisation"
    )


def _places(places: Sequence[str], n: int) -> str:
    return f"{', '.join(places[:3])}{', ...' if n > 3 else ''}"


def _told_end_cut(cut: Cut, block_size: int) -> str:
    where = f" ({_places(cut.no_signal_places, cut.no_signal)})" if cut.no_signal else ""
    return (
        f"{cut.no_signal:,} of {cut.rows:,} {cut.form} teach nothing{where} and {cut.end_lost:,} lose the end of their answer in tools "
        f"that truncate at {block_size:,}: configure those to keep the end, or allow {cut.longest:,} tokens"
    )


def _plural(n: int) -> str:
    return "row" if n == 1 else "rows"
