"""Micro-batches to split, and an allocation that fails: shared by the tests of memory that ends."""

import itertools
from pathlib import Path

import torch

from made_pairs import batches_of
from reference import random_model
from tiny_runs import tiny_config
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.reward_head import RewardModel
from tunesmith.train.pair_loss import PreferenceLoss, dpo_loss_sum, reward_loss_sum
from tunesmith.train.splits import load_splits
from tunesmith.train.token_loss import nll_sum

FLOAT64 = 1e-12
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.89 GiB\nmore lines"


def text_batches(batching, fill_to=1, batch_size=4):
    """The first two micro-batches of the sample data."""
    data = tiny_config(SAMPLE, Path("unused"), data__batching=batching).data
    splits = load_splits(data, Tokenizer.load(SAMPLE))
    layout = BatchLayout(batching, block_size=256, batch_size=batch_size, seed=1, fill_to=fill_to)
    batches = Batches(text_rows(splits.train, splits.train_rows, layout))
    return [batches[0], batches[1]]


def leaves(batch):
    """All that a batch can be split into."""
    return [batch] if (halves := batch.halves()) is None else [leaf for half in halves for leaf in leaves(half)]


def documents_of(batch):
    """(tokens, their targets or -1) of every document that carries loss, in order."""
    flat, wanted = batch.input_ids.flatten().tolist(), [-1] * batch.size
    for at, target in zip(batch.rows[: batch.count].tolist(), batch.targets[: batch.count].tolist(), strict=True):
        wanted[at] = target
    lengths = batch.documents.lengths if batch.documents else [batch.input_ids.shape[1]] * len(batch.input_ids)
    cuts = itertools.pairwise([0, *itertools.accumulate(lengths)])
    return [(flat[a:b], wanted[a:b]) for a, b in cuts if max(wanted[a:b]) >= 0]


def fail():
    raise torch.OutOfMemoryError(CUDA)


def case(kind):
    """A model in float64, two micro-batches, and the summed loss."""
    pairs = kind in ("dpo", "reward")
    torch.manual_seed(0)
    shape = {"vocab_size": 500 if pairs else 6144, "block_size": 256 if not pairs else 64}
    model = random_model(GPTConfig(n_layer=2, n_head=2, n_embd=16, **shape), dtype=torch.float64).train()
    if not pairs:
        batching, _, steady = kind.partition(" ")
        return model, text_batches(batching, 64 if steady else 1), lambda batch: nll_sum(model, batch)
    batches = batches_of(batch_size=4)
    if kind == "dpo":
        table = torch.randn(len(batches.rows), 2, dtype=torch.float64) - 30
        losses = PreferenceLoss(beta=0.3)
        return model, [batches[0], batches[1]], lambda b: dpo_loss_sum(model, b, table[list(b.pairs)], losses)
    scorer = RewardModel(model)
    scorer.init_score(0)
    return scorer, [batches[0], batches[1]], lambda batch: reward_loss_sum(scorer, batch)
