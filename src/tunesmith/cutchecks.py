"""What cutting rows to a block size costs: by the rules of the usual tools, and by the one that training here follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.batching import cut_rows
from tunesmith.dialogue import END, NEXT, Preference, render, segments
from tunesmith.pairs import PairStore, cut_pairs
from tunesmith.rowchecks import PAIRS
from tunesmith.tokenizer import Tokenizer
from tunesmith.tokenstore import TokenStore

Array = np.ndarray[Any, Any]
END_CUT, SHARED, OWN = "end cut off", "in proportion", "tunesmith"


@dataclass(frozen=True)
class Cut:
    """Rows of one form, cut to a block size by one rule. All counts are rows.

    rule: END_CUT: prompt + answer + one end-of-text token, cut at the right, as most tools do. SHARED: prompt and answer
        each lose their end, in proportion (LLaMA-Factory). OWN: what --data.truncation does here, where the end of an
        answer is only a target and takes no room.
    cut: longer than the block size. left_out: of these, not used at all.
    no_signal: nothing is left to learn: a pair's two sequences became the same, or no answer's token is left.
    end_lost: the (chosen, or last) answer is used without its end, so that stopping is not learned from it.
    prompt_start_lost, prompt_end_lost: of what stands before the (last) answer.
    longest: tokens that the longest row takes: no block size from there on cuts anything.
    """

    rule: str
    form: str
    rows: int
    cut: int = 0
    left_out: int = 0
    no_signal: int = 0
    end_lost: int = 0
    prompt_start_lost: int = 0
    prompt_end_lost: int = 0
    longest: int = 0


def cut_pairs_end(store: PairStore, skipped: Sequence[Preference], tokenizer: Tokenizer, block_size: int) -> Cut:
    """END_CUT on the pairs of `store` and on those that training here skips although they have two texts."""
    prompt, chosen, rejected = store.lengths.T
    longest = prompt + np.maximum(chosen, rejected) + 1
    same = 0
    for pair in np.flatnonzero(longest > block_size).tolist():
        room = block_size - int(prompt[pair])
        if room <= 0:
            same += 1
            continue
        _, a, b = (np.append(part, store.store.end_of_text)[:room] for part in store.tokens(pair))
        same += np.array_equal(a, b)
    counts = np.array([
        (longest > block_size).sum(), same, (prompt + chosen + 1 > block_size).sum(), (prompt > block_size).sum(),
    ])  # fmt: skip
    top = int(longest.max(initial=0))
    for row in skipped:
        left, right = (
            [*tokenizer.encode(render(d.messages)), store.store.end_of_text] for d in (row.chosen, row.rejected)
        )
        before = len(tokenizer.encode("".join(text for text, _ in _prompt_segments(row))))
        counts += [
            max(len(left), len(right)) > block_size, left[:block_size] == right[:block_size], len(left) > block_size, before > block_size,
        ]  # fmt: skip
        top = max(top, len(left), len(right))
    cut, no_signal, end_lost, prompt_end_lost = counts.tolist()
    return Cut(
        END_CUT, PAIRS, len(store) + len(skipped), cut, 0, no_signal, end_lost, 0, prompt_end_lost, top
    )  # fmt: skip


def _prompt_segments(pair: Preference) -> list[tuple[str, bool]]:
    pieces = segments(pair.chosen.messages)
    return pieces[:-1] if pieces[-1][1] else pieces


def cut_pairs_shared(store: PairStore, block_size: int) -> Cut:
    """SHARED: whichever of prompt and longer answer takes under half of the block stays whole, else both shrink alike."""
    prompt, chosen, rejected = store.lengths.T
    answer = np.maximum(chosen, rejected) + 1
    room = np.where(
        answer * 2 < block_size,
        block_size,
        np.where(
            prompt * 2 < block_size, block_size - prompt, (block_size * (answer / (prompt + answer))).astype(np.int64)
        ),
    )
    kept = np.minimum(room, answer)
    kept_prompt = np.minimum(np.maximum(block_size - kept, 0), prompt)
    same = 0
    for pair in np.flatnonzero(kept < answer).tolist():
        _, a, b = (np.append(part, store.store.end_of_text)[: kept[pair]] for part in store.tokens(pair))
        same += np.array_equal(a, b)
    return Cut(
        SHARED, PAIRS, len(store), cut=int(((kept < answer) | (kept_prompt < prompt)).sum()), no_signal=same,
        end_lost=int((chosen + 1 > kept).sum()), prompt_end_lost=int((kept_prompt < prompt).sum()),
        longest=int((prompt + answer).max(initial=0)),
    )  # fmt: skip


def cut_pairs_here(store: PairStore, block_size: int, rule: str) -> Cut:
    """OWN on pairs. Raises: UsageError for a rule that pairs do not know."""
    lengths = store.lengths
    cuts, told = cut_pairs(store, range(len(store)), block_size, rule)
    left_out = len(store) - len(cuts)
    return Cut(
        OWN, PAIRS, len(store), cut=sum(told.counts.values()), left_out=left_out,
        no_signal=left_out if rule == "keep_start" else 0,  # only that rule cuts answers, and leaves out what became equal
        end_lost=sum(not c.ends[0] for c in cuts), prompt_start_lost=sum(c.start > 0 for c in cuts),
        prompt_end_lost=sum(c.start + c.prompt < int(lengths[c.pair, 0]) for c in cuts),
        longest=int((lengths[:, 0] + lengths[:, 1:].max(1)).max(initial=0)),
    )  # fmt: skip


def cut_rows_end(store: TokenStore, rows: Array, form: str, block_size: int, loss_on: str) -> Cut:
    """END_CUT on dialogues or plain texts, the rows of these numbers."""
    lengths = store.lengths[rows]
    no_signal = prompt_end_lost = 0
    for row in rows[lengths + 1 > block_size].tolist():
        flags = _flags(store, row)
        prompt_end_lost += _last_answer(flags)[0] > block_size
        # a token that carries NEXT teaches the one after it, which must still be there
        no_signal += loss_on != "all" and not np.any(flags[: block_size - 1] & NEXT)
    cut = int((lengths + 1 > block_size).sum())
    return Cut(
        END_CUT, form, len(rows), cut, no_signal=no_signal, end_lost=cut, prompt_end_lost=prompt_end_lost,
        longest=int(lengths.max(initial=-1)) + 1,
    )  # fmt: skip


def cut_rows_here(store: TokenStore, rows: Array, form: str, block_size: int, rule: str, loss_on: str) -> Cut:
    """OWN on dialogues or plain texts, the rows of these numbers."""
    pieces, told = cut_rows(store, rows.tolist(), block_size, rule)
    lengths = store.lengths
    kept: dict[int, list[tuple[int, int]]] = {}
    for piece in pieces:
        if len(piece) < lengths[piece.row]:
            kept.setdefault(piece.row, []).append((piece.start, piece.stop))
    left_out = len(rows) - len({piece.row for piece in pieces})
    counts = np.zeros(4, np.int64)
    for row, stretches in kept.items():
        flags = _flags(store, row)
        answer, end = _last_answer(flags)
        there = np.zeros(len(flags), np.bool_)
        for start, stop in stretches:
            there[start:stop] = True
        counts += [
            loss_on != "all" and not np.any(flags[there]), not there[end], not there[0], answer > 0 and not there[answer - 1],
        ]  # fmt: skip
    no_signal, end_lost, prompt_start_lost, prompt_end_lost = counts.tolist()
    return Cut(
        OWN, form, len(rows), sum(t.cut for t in told), left_out, no_signal, end_lost, prompt_start_lost, prompt_end_lost,
        int(lengths[rows].max(initial=0)),
    )  # fmt: skip


def _flags(store: TokenStore, row: int) -> Array:
    return np.asarray(store.flags[int(store.offsets[row]) : int(store.offsets[row + 1])])


def _last_answer(flags: Array) -> tuple[int, int]:
    """Numbers of the first and the last token of a row's last answer; of a plain text, of the text."""
    end = int(np.flatnonzero(flags & END)[-1])
    outside = np.flatnonzero((flags[:end] & NEXT) == 0)  # the last of them stands two tokens before the answer
    return (int(outside[-1]) + 2 if len(outside) else 0), end
