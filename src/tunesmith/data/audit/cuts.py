"""What cutting rows to a block size costs: by the rules of the usual tools, and by the one that training here follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data.audit.rows import PAIRS, prompt_of
from tunesmith.data.cutting import Piece, cut_rows
from tunesmith.data.dialogue import Preference
from tunesmith.data.encoding import END, NEXT, ids_of
from tunesmith.data.pairstore import PairStore, cut_pairs
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import TokenStore

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
    places, no_signal_places: `file:line` of the first three rows of `cut` and of `no_signal`.
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
    places: tuple[str, ...] = ()
    no_signal_places: tuple[str, ...] = ()


def cut_pairs_end(
    store: PairStore, skipped: Sequence[tuple[Preference, str]], tokenizer: Tokenizer, block_size: int
) -> Cut:
    """END_CUT on the pairs of `store`, and on those (with their places) that training skips although they have two texts."""
    prompt, chosen, rejected = store.lengths.T
    longest = prompt + np.maximum(chosen, rejected) + 1
    over = np.flatnonzero(longest > block_size).tolist()
    cut, same = list(map(store.place, over)), [store.place(i) for i in over if _alike(store, i, block_size - prompt[i])]
    end_lost, prompt_end_lost = int((prompt + chosen + 1 > block_size).sum()), int((prompt > block_size).sum())
    most = int(longest.max(initial=0))
    template = tokenizer.template
    for row, place in skipped:
        left, right = (
            [*ids_of(template.whole(dialogue.messages), tokenizer), tokenizer.end_of_answer]
            for dialogue in (row.chosen, row.rejected)
        )
        end_lost += len(left) > block_size
        prompt_end_lost += len(ids_of(template.segments(prompt_of(row.chosen.messages), True), tokenizer)) > block_size
        most = max(most, len(left), len(right))
        cut += [place] if max(len(left), len(right)) > block_size else []
        same += [place] if left[:block_size] == right[:block_size] else []
    return Cut(
        END_CUT,
        PAIRS,
        len(store) + len(skipped),
        len(cut),
        no_signal=len(same),
        end_lost=end_lost,
        prompt_end_lost=prompt_end_lost,
        longest=most,
        places=tuple(cut[:3]),
        no_signal_places=tuple(same[:3]),
    )


def _alike(store: PairStore, pair: int, room: int) -> bool:
    """Whether the two answers, each with its end, begin with the same `room` tokens."""
    if room <= 0:
        return True
    _, a, b = (np.append(part, store.store.end_of_answer)[:room] for part in store.tokens(pair))
    return np.array_equal(a, b)


def cut_pairs_shared(store: PairStore, block_size: int) -> Cut:
    """SHARED: whichever of prompt and longer answer takes under half of the block stays whole, else both shrink alike."""
    prompt, chosen, rejected = store.lengths.T
    answer = np.maximum(chosen, rejected) + 1
    both = (block_size * (answer / (prompt + answer))).astype(np.int64)
    room = np.where(answer * 2 < block_size, block_size, np.where(prompt * 2 < block_size, block_size - prompt, both))
    kept = np.minimum(room, answer)
    kept_prompt = np.minimum(np.maximum(block_size - kept, 0), prompt)
    over = np.flatnonzero((kept < answer) | (kept_prompt < prompt)).tolist()
    same = [store.place(i) for i in np.flatnonzero(kept < answer).tolist() if _alike(store, i, kept[i])]
    return Cut(
        SHARED,
        PAIRS,
        len(store),
        len(over),
        no_signal=len(same),
        end_lost=int((chosen + 1 > kept).sum()),
        prompt_end_lost=int((kept_prompt < prompt).sum()),
        longest=int((prompt + answer).max(initial=0)),
        places=tuple(map(store.place, over[:3])),
        no_signal_places=tuple(same[:3]),
    )


def cut_pairs_here(store: PairStore, block_size: int, rule: str) -> Cut:
    """OWN on pairs. Raises: UsageError for a rule that pairs do not know."""
    lengths = store.lengths
    cuts, truncation = cut_pairs(store, np.arange(len(store)), block_size, rule)
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    left_out = np.setdiff1d(np.arange(len(store)), cuts.pairs).tolist()
    same = left_out if rule == "keep_start" else []  # only that rule cuts answers; it leaves out what became equal
    return Cut(
        OWN,
        PAIRS,
        len(store),
        sum(truncation.counts.values()),
        len(left_out),
        len(same),
        end_lost=int((~cuts.ends[:, 0]).sum()),
        prompt_start_lost=int((cuts.starts > 0).sum()),
        prompt_end_lost=int((cuts.starts + cuts.prompts < lengths[cuts.pairs, 0]).sum()),
        longest=int(longest.max(initial=0)),
        places=tuple(map(store.place, np.flatnonzero(longest > block_size)[:3].tolist())),
        no_signal_places=tuple(map(store.place, same[:3])),
    )


def cut_rows_end(store: TokenStore, rows: Array, form: str, block_size: int, loss_on: str) -> Cut:
    """END_CUT on dialogues or plain texts, the rows of these numbers."""
    lengths = store.lengths[rows]
    over = rows[lengths + 1 > block_size].tolist()
    no_signal, prompt_end_lost = [], 0
    for row in over:
        flags = _flags(store, row)
        prompt_end_lost += _last_answer(flags)[0] > block_size
        # a token that carries NEXT teaches the one after it, which must still be there
        if loss_on != "all" and not np.any(flags[: block_size - 1] & NEXT):
            no_signal.append(store.place(row))
    return Cut(
        END_CUT,
        form,
        len(rows),
        len(over),
        no_signal=len(no_signal),
        end_lost=len(over),
        prompt_end_lost=prompt_end_lost,
        longest=int(lengths.max(initial=-1)) + 1,
        places=tuple(map(store.place, over[:3])),
        no_signal_places=tuple(no_signal[:3]),
    )


def cut_rows_here(store: TokenStore, rows: Array, form: str, block_size: int, rule: str, loss_on: str) -> Cut:
    """OWN on dialogues or plain texts, the rows of these numbers."""
    pieces, _ = cut_rows(store, rows, block_size, rule)
    lengths = store.lengths
    kept: dict[int, list[Piece]] = {row: [] for row in rows[lengths[rows] > block_size].tolist()}
    for piece in pieces.taken(np.flatnonzero(lengths[pieces.rows] > block_size)):
        kept[piece.row].append(piece)
    no_signal = []
    counts = dict.fromkeys(("left_out", "end_lost", "prompt_start_lost", "prompt_end_lost"), 0)
    for row, stretches in kept.items():
        if not stretches:
            counts["left_out"] += 1
            continue
        flags = _flags(store, row)
        answer, end = _last_answer(flags)
        there = np.zeros(len(flags), np.bool_)
        for piece in stretches:
            there[piece.start : piece.stop] = True
        if loss_on != "all" and not np.any(flags[there]):
            no_signal.append(store.place(row))
        counts["end_lost"] += not there[end]
        counts["prompt_start_lost"] += not there[0]
        counts["prompt_end_lost"] += answer > 0 and not there[answer - 1]
    return Cut(
        OWN,
        form,
        len(rows),
        len(kept),
        no_signal=len(no_signal),
        longest=int(lengths[rows].max(initial=0)),
        places=tuple(map(store.place, list(kept)[:3])),
        no_signal_places=tuple(no_signal[:3]),
        **counts,
    )


def _flags(store: TokenStore, row: int) -> Array:
    return np.asarray(store.flags[int(store.offsets[row]) : int(store.offsets[row + 1])])


def _last_answer(flags: Array) -> tuple[int, int]:
    """Numbers of the first and the last token of a row's last answer; of a plain text, of the text."""
    end = int(np.flatnonzero(flags & END)[-1])
    outside = np.flatnonzero((flags[:end] & NEXT) == 0)  # the last of them stands two tokens before the answer
    return (int(outside[-1]) + 2 if len(outside) else 0), end
