"""`--train.compile true`: the same losses, and after the first batches nothing is compiled anew."""

import shutil

import pytest
import torch

from tunesmith.batching import Batches
from tunesmith.datasets import open_dataset
from tunesmith.evaluate import nll_sum
from tunesmith.models import load_for_training
from tunesmith.options import DataOptions
from tunesmith.tokenstore import tokenise


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_blocks_give_the_same_losses_and_do_not_recompile(tiny_directory):
    model, tokenizer = load_for_training(str(tiny_directory), init="pretrained", dropout=0.0, seed=0)
    store = tokenise(open_dataset(DataOptions(name="sample")), "train", tokenizer)
    batches = Batches(
        store, range(len(store)), batching="packed", block_size=256, batch_size=2, loss_on="assistant", fill_to=64
    )
    plain = [nll_sum(model.train(), batches[i]).item() for i in range(24)]
    torch._dynamo.reset()
    for block in model.h:
        block.compile()

    def step(i):
        loss = nll_sum(model, batches[i])
        loss.backward()
        return loss.item()

    first = [step(i) for i in range(12)]
    torch._dynamo.utils.counters.clear()
    later = [step(i) for i in range(12, 24)]
    assert first + later == pytest.approx(plain, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0
    assert len({batches[i].documents.lengths for i in range(12, 24)}) == 12  # every batch was packed otherwise
