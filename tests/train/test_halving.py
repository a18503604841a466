"""A micro-batch in two: the same targets in the same documents, whole pairs, and no piece above a limit."""

import pytest

from made_pairs import batches_of, read_back
from reference import batch_nll, pack_batch, random_model
from short_memory import FLOAT64, documents_of, leaves, text_batches
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.halving import split_to


@pytest.mark.parametrize("fill_to", [1, 64])
@pytest.mark.parametrize("batching", ["packed", "padded", "windows"])
def test_halves_hold_the_same_documents_targets_and_sources(batching, fill_to):
    for batch in text_batches(batching, 1 if batching == "windows" else fill_to):
        parts = leaves(batch)
        assert len(parts) == (4 if batching == "windows" else len(batch.sources))
        assert [d for part in parts for d in documents_of(part)] == documents_of(batch)
        assert tuple(s for part in parts for s in part.sources) == batch.sources
        assert (sum(p.count for p in parts), sum(p.tokens for p in parts)) == (batch.count, batch.tokens)
        assert all(len(part.targets) % part.fill_to == 0 for part in parts)
        for half in batch.halves():
            assert half.size == batch.size // 2
        model = random_model(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=6144, block_size=256))
        assert sum(batch_nll(model, part)[0] for part in parts) == pytest.approx(
            batch_nll(model, batch)[0], rel=FLOAT64
        )


@pytest.mark.parametrize("fill_to", [1, 64])
def test_a_row_is_cut_at_the_border_nearest_to_its_middle_and_loses_its_padding(fill_to):
    def row(*lengths):
        return pack_batch([[list(range(1, n + 1)) for n in lengths]], lambda document, t: True)

    def widths(batch, padding=0):
        batch = type(batch)(**{**vars(batch), "padding": (padding,), "fill_to": fill_to})
        return [half.input_ids.shape[1] for half in batch.halves()]

    steady = fill_to > 1
    assert widths(row(100, 100, 100, 100)) == ([256, 256] if steady else [200, 200])
    assert widths(row(30, 300, 70)) == ([384, 128] if steady else [330, 70])
    assert widths(row(100, 120, 180), padding=180) == ([128, 128] if steady else [100, 120])
    assert widths(row(10, 20, 30)) == [30, 30]  # 128 would be more than the whole
    assert row(400).halves() is None


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_halves_of_pairs_are_whole_pairs_with_their_numbers(batching, steady):
    batches = batches_of(batching=batching, steady=steady, batch_size=4)
    for batch in (batches[i] for i in range(4)):
        parts = leaves(batch)
        assert [part.count for part in parts] == [1] * batch.count
        assert [pair for part in parts for pair in read_back(part)] == read_back(batch)
        assert tuple(n for part in parts for n in part.pairs) == batch.pairs
        assert tuple(n for part in parts for n in part.sources) == batch.sources
        assert sum(part.tokens for part in parts) == batch.tokens
        for half in batch.halves():
            assert half.size < batch.size
            longest = max(sum(batches.rows.store.lengths[i]) for i in half.sources)
            assert half.tokens <= batch.tokens / 2 + longest / 2  # no cut is nearer to the middle
            assert half.documents.reach <= batch.documents.reach
            assert len(half.targets) % (64 if steady else 1) == 0
            if steady and batch.size > 128:
                assert half.size % 128 == 0


def test_a_limit_is_kept_and_nothing_below_it_is_split():
    first, second = text_batches("packed")
    assert split_to([first, second], None) == [first, second]
    assert split_to([first, second], first.size) == [first, second]
    parts = split_to([first, second], 512)
    assert [part.size for part in parts] == [512] * 4
    assert [d for part in parts for d in documents_of(part)] == documents_of(first) + documents_of(second)
