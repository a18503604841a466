"""Which rows are held out and estimated on is decided by one seed, their order in training by another."""

import json

import pytest

from tunesmith.data.datasets import open_dataset
from tunesmith.options.training import DataOptions, DPOConfig, PairDataOptions, SFTConfig
from tunesmith.train.splits import in_batches, load_splits


@pytest.fixture
def rows(tmp_path):
    """A file without a test split: 60 rows, each dialogue and pair at once."""
    path = tmp_path / "own.jsonl"
    lines = ({"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": "No."} for n in range(60))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def batches(kind, tokenizer, name, **options):
    """Training and validation batches of a run, by the numbers of their rows; windows by their tokens."""
    pairs = kind is DPOConfig
    config = kind(data=(PairDataOptions if pairs else DataOptions)(name=name, block_size=32, holdout=0.5, **options))
    splits = load_splits(config.data, tokenizer, pairs=pairs)
    data = in_batches(splits, config, pairs=pairs)

    def content(batch):
        return batch.sources or tuple(batch.input_ids.flatten().tolist())

    return [content(data.train[i]) for i in range(8)], [content(b) for b in data.validation.fixed(4)]


@pytest.mark.parametrize(
    ("kind", "batching"), [(SFTConfig, "packed"), (SFTConfig, "windows"), (SFTConfig, "padded"), (DPOConfig, "packed")]
)
def test_runs_of_two_seeds_share_their_validation_rows_and_not_their_order(kind, batching, tokenizer, rows):
    first = batches(kind, tokenizer, rows, batching=batching, seed=1)
    second = batches(kind, tokenizer, rows, batching=batching, seed=2, split_seed=1)
    assert second[1] == first[1]
    assert second[0] != first[0]
    assert batches(kind, tokenizer, rows, batching=batching, seed=2)[1] != first[1]


def test_without_it_a_run_is_what_it_was(tokenizer, rows):
    left_out, named = (batches(SFTConfig, tokenizer, rows, seed=5, **more) for more in ({}, {"split_seed": 5}))
    assert left_out == named


def test_the_rows_that_a_mixture_draws_do_not_depend_on_the_order_either(tmp_path, rows):
    name = f"{rows}*0.5,sample*0.5"
    drawn = [open_dataset(DataOptions(name=name, seed=s, split_seed=r)) for s, r in ((1, None), (2, 1), (2, None))]
    prints = [source.fingerprint("train", dict.fromkeys(source.digests("train"), "00" * 32)) for source in drawn]
    assert prints[0] == prints[1] != prints[2]
