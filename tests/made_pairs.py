"""Preference pairs of made-up tokens, and how a batch of pairs reads."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from tunesmith.data.datasets import Source
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.readers import Report
from tunesmith.data.tokenstore import TokenStore

END = 0


def made_store(pairs) -> PairStore:
    """Pairs of made-up tokens: (prompt, chosen, rejected), each a list of numbers from 1 on."""
    rows = [part for pair in pairs for part in pair]
    source = Source("made", "rows", {"train": (Path("made.jsonl"),)})
    places = np.array([(0, 1 + i // 3) for i in range(len(rows))], np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    tokens = np.array([t for row in rows for t in row], np.uint16)
    empty = np.zeros(0, np.uint8)
    return PairStore(TokenStore(tokens, empty, offsets, empty, empty, places, END, END, source, "train", Report(), ""))


def random_pairs(shapes, seed=0, vocabulary=500):
    """A pair of random tokens for each (tokens of the prompt, of the chosen, of the rejected answer)."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(1, vocabulary, n).tolist() for n in shape) for shape in shapes]


SHAPES = [(3 + i % 23, 1 + (7 * i) % 19, 1 + (5 * i) % 29) for i in range(60)]
PAIRS = random_pairs(SHAPES)


def batches_of(pairs=PAIRS, rows=None, steady=False, **changes) -> Batches[PairRows]:
    """Batches of made-up pairs, of which 64 tokens go into a row."""
    options = {
        "batching": "packed",
        "block_size": 64,
        "batch_size": 2,
        "seed": 1,
        "fill_to": 64 if steady else 1,
    } | changes
    return Batches(PairRows(made_store(pairs), range(len(pairs)) if rows is None else rows, BatchLayout(**options)))


def read_back(batch):
    """(prompt, (chosen, its targets), (rejected, its targets)) of every pair, from the batch's tensors alone."""
    ids, documents = batch.input_ids[0].tolist(), batch.documents
    assert batch.input_ids.shape[0] == 1
    cuts = list(pairwise(np.cumsum([0, *documents.lengths]).tolist()))
    stretches = [ids[a:b] for a, b in cuts]
    parents = list(documents.parents)
    found, first, sequence = [], 0, 0
    for i in range(0, 3 * batch.count, 3):
        assert parents[i : i + 3] == [-1, i, i], "both answers continue the prompt"
        answers = []
        for stretch in (i + 1, i + 2):
            n, (a, b) = batch.lengths[sequence], cuts[stretch]
            rows = batch.rows[first : first + n].tolist()
            assert rows == [cuts[i][1] - 1, *range(a, b)][:n], "from the prompt's last token and the answer's own"
            assert int(batch.last[sequence]) == b - 1
            answers.append((stretches[stretch], batch.targets[first : first + n].tolist()))
            first, sequence = first + n, sequence + 1
        found.append((stretches[i], *answers))
    assert parents[3 * batch.count :] == [-1] * (len(parents) - 3 * batch.count), "filler continues nothing"
    assert {t for s in stretches[3 * batch.count :] for t in s} <= {END}
    assert (sequence, first) == (len(batch.lengths), sum(batch.lengths))
    return found


def whole(pair):
    """What `read_back` gives of a pair that was not cut."""
    prompt, *answers = pair
    return (prompt, *((answer, [*answer, END]) for answer in answers))
