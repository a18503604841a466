"""`--train.compile true`: the same losses, and after the first batches nothing is compiled anew."""

import shutil

import pytest
import torch
from torch.nn.attention import varlen

import tunesmith as ts
from families import here, in_transformers, random_ids
from reference import random_model
from tiny_runs import tiny_config
from tunesmith.data.datasets import open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.files.names import SAMPLE, load_for_training
from tunesmith.models import attention as module
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT, GPTConfig
from tunesmith.models.lora import apply_lora
from tunesmith.options.training import DataOptions, PairDataOptions
from tunesmith.train.pair_loss import PreferenceLoss, dpo_loss_sum, estimate_dpo
from tunesmith.train.reference import adapter_off
from tunesmith.train.token_loss import estimate_loss, nll_sum


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_blocks_give_the_same_losses_and_do_not_recompile(tiny_directory):
    model, tokenizer = load_for_training(str(tiny_directory), init="pretrained", dropout=0.0, seed=0)
    store = tokenise(open_dataset(DataOptions(name="sample")), "train", tokenizer)
    layout = BatchLayout("packed", block_size=256, batch_size=2, loss_on="assistant", fill_to=64)
    batches = Batches(text_rows(store, range(len(store)), layout))
    plain = [nll_sum(model.train(), batches[i]).item() for i in range(24)]
    torch._dynamo.reset()
    model.compile_blocks()

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


# ---- as on a card: with the variable-length kernel blocks are compiled whole -----------------------------------------


RAN = []  # the dtypes that the kernel was run with


@torch.library.custom_op("tunesmith_tests::varlen", mutates_args=())
def varlen_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, cu_keys: torch.Tensor
) -> torch.Tensor:
    """Stands for the card's kernel: opaque to the compiler, shaped like it. What it gives depends on every argument."""
    RAN.append(q.dtype)
    return q * 0.5 + v.mean() + cu.float().mean() - cu_keys.float().mean() + k.mean()


@varlen_kernel.register_fake
def _(q, k, v, cu, cu_keys):
    return torch.empty_like(q)


varlen_kernel.register_autograd(lambda ctx, grad: (grad * 0.5, None, None, None, None))


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Counts what is compiled; code that would be left uncompiled after too many versions is an error.

    Each block asks for its path as on a card; under autocast the answer is the variable-length kernel.
    """
    monkeypatch.setattr(module, "flash_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda q, k, v, cu, cu_keys, *rest, **more: varlen_kernel(q, k, v, cu, cu_keys)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield lambda: torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def stores():
    tokenizer = Tokenizer.load(SAMPLE)
    kinds = {"dialogues": DataOptions, "texts": DataOptions, "pairs": PairDataOptions}
    return {
        form: tokenise(open_dataset(kind(name="sample")), "train", tokenizer, form=form) for form, kind in kinds.items()
    }


def small(tokens):
    return random_model(GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=tokens, block_size=256)).train()


VERSIONS = {
    "packed": 4,
    "windows": 6,  # its short last batch in an estimate is a shape of its own
    "padded": 8,
}  # first blocks and last, training and estimate; widths vary when padded


@pytest.mark.parametrize("batching", VERSIONS)
def test_after_one_estimate_and_a_few_steps_nothing_is_compiled_anew(stores, as_on_a_card, batching):
    store = stores["texts" if batching == "windows" else "dialogues"]
    rows = range(41)  # the last batch of an estimate is short
    layout = BatchLayout(batching, block_size=256, batch_size=2, fill_to=64)
    batches, model = Batches(text_rows(store, rows, layout)), small(6144)
    model.compile_blocks(backend="eager")  # what is compiled anew is up to the guards, not to the kernels

    def estimate_and_steps(first):
        estimate_loss(model, batches.fixed(), "bf16")
        for i in range(first, first + 6):
            nll_sum(model, batches[i], "bf16").backward()

    estimate_and_steps(0)
    warm = as_on_a_card()
    assert 0 < warm <= VERSIONS[batching]
    estimate_and_steps(6)
    assert as_on_a_card() == warm


def test_nor_in_dpo_with_a_reference_pass_for_every_batch(stores, as_on_a_card):
    """More versions than the eight that torch would make: training, estimates, adapters off, each for first blocks and last."""
    layout = BatchLayout("packed", block_size=256, batch_size=2, fill_to=64)
    batches = Batches(PairRows(PairStore(stores["pairs"]), range(40), layout))
    model, loss = small(6144), PreferenceLoss()
    apply_lora(model, rank=2, alpha=4.0)
    model.compile_blocks(backend="eager")
    reference = adapter_off(model, "bf16")

    def estimate_and_steps(first):
        estimate_dpo(model, batches.fixed(), reference, loss, "bf16")
        for i in range(first, first + 5):
            dpo_loss_sum(model, batches[i], reference(batches[i]), loss, "bf16")[0].backward()

    estimate_and_steps(0)
    warm = as_on_a_card()
    assert warm > 0
    estimate_and_steps(5)
    assert as_on_a_card() == warm


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_model_of_a_process_takes_the_path_of_its_own_width_dropout_and_precision(as_on_a_card, backend):
    """The first compiles with plain numbers. With the second of another width they are symbols, in torch 2.11 as later."""
    taken, documents = [], module.Documents.from_rows([[10, 6]])
    for width, heads, dropout, dtype in [
        (32, 2, 0.0, torch.bfloat16),
        (32, 4, 0.0, torch.bfloat16),
        (64, 2, 0.0, torch.float16),
        (24, 2, 0.0, torch.bfloat16),  # heads of 12: no multiple of 8
        (64, 2, 0.1, torch.bfloat16),
        (64, 2, 0.2, torch.bfloat16),
        (64, 2, 0.0, torch.bfloat16),
    ]:
        model = random_model(
            GPTConfig(n_layer=2, n_head=heads, n_embd=width, vocab_size=64, block_size=32, dropout=dropout)
        )
        model.train().compile_blocks(backend=backend)
        RAN.clear()
        with torch.autocast("cpu", dtype):
            model(torch.arange(16)[None], documents).sum().backward()
        taken.append(len(RAN) == 2 and set(RAN) == {dtype})
    assert taken == [True, True, True, False, False, False, True]


@pytest.mark.parametrize(("asked", "times"), [(True, 1), ("auto", 0), (False, 0)])
def test_blocks_are_compiled_where_that_is_asked_for_and_on_a_cpu_not_by_itself(
    monkeypatch, tiny_directory, tmp_path, asked, times
):
    calls = []
    monkeypatch.setattr(GPT, "compile_blocks", lambda self, **_options: calls.append(self))
    ts.sft(tiny_config(tiny_directory, tmp_path / "run", train__steps=1, train__compile=asked))
    assert len(calls) == times


@pytest.mark.parametrize("case", ["qwen3 biases", "gpt_neox", "gemma3_text untied"])
def test_blocks_of_every_family_are_compiled_whole(as_on_a_card, case):
    """fullgraph: a graph break would be an error. Kinds of layers differ in code: windows and none."""
    model, plain = here(in_transformers(case)).train(), here(in_transformers(case)).train()
    model.compile_blocks(backend="eager", fullgraph=True)
    RAN.clear()
    for lengths in ([[25, 15], [40]], [[7, 33], [20, 20]]):
        documents, states = Documents.from_rows(lengths), []
        for one in (model, plain):
            with torch.autocast("cpu", torch.bfloat16):
                states.append(one(random_ids(2, 40), documents, rows=torch.arange(0, 80, 3)))
            states[-1].square().sum().backward()
        torch.testing.assert_close(*states, rtol=0.05, atol=0.05)
    assert set(RAN) == {torch.bfloat16}
    assert as_on_a_card() <= 2 * len(model.blocks)
