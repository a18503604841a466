"""Memory that ends: the micro-batch is split, the step done again with the same result, the size remembered and told."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import pack_batch, random_model
from short_memory import CUDA, FLOAT64, case, fail, leaves
from tunesmith.errors import UserError
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.outofmemory import is_out_of_memory
from tunesmith.train.halving import Halving, split_to, step_in_memory
from tunesmith.train.optim import build_optimizer
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum

# The step


def trained(kind, *, room=None, where="forward", accumulate=2, steps=2):
    """Weights, stats, splits told and sizes that failed, after steps of which each sees the same micro-batches."""
    model, batches, plain = case(kind)
    optimizer = build_optimizer(model, "sgd", lr=0.1, weight_decay=0.0)
    halving, told, failures = Halving("tiny", "less", batch_size=4), [], []

    def loss_sum(batch):
        short = room is not None and batch.size > room
        failures.extend([batch.size] * short)
        if short and where == "forward":
            fail()
        sums = plain(batch)
        if short:
            sums.register_hook(lambda gradient: fail())
        return sums

    def step(parts):
        return optimizer_step(model, parts, loss_sum, optimizer, max_norm=1.0)

    device, stats = torch.device("cpu"), []
    for _ in range(steps):
        stats.append(step_in_memory(batches[:accumulate], step, optimizer, halving, told.append, device))
    return [p.detach() for p in model.parameters()], stats, told, failures


KINDS = ["packed", "packed steady", "padded", "windows", "dpo", "reward"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "accumulate"), [("forward", 2), ("backward", 2), ("backward", 1)])
def test_a_step_that_ran_out_of_memory_gives_the_weights_of_one_that_did_not(kind, where, accumulate):
    """To the rounding of float64, down to a document or pair at a time; what failed is not tried twice."""
    room = max(leaf.size for batch in case(kind)[1] for leaf in leaves(batch))
    weights, stats, told, failures = trained(kind, room=room, where=where, accumulate=accumulate)
    plain, expected, nothing, _ = trained(kind, accumulate=accumulate)
    assert not nothing
    for mine, other in zip(stats, expected, strict=True):
        assert (mine.count, mine.updated) == (other.count, True)
        assert (mine.loss, mine.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=FLOAT64)
        assert mine.observed == pytest.approx(other.observed, rel=1e-10)
    for mine, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=FLOAT64)
    start = [p.detach() for p in case(kind)[0].parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(weights, start, strict=True)) > 1e-3  # they did move
    assert [split.failed for split in told] == failures
    assert failures == sorted(set(failures), reverse=True)
    assert len(failures) >= 2


def test_a_failed_try_leaves_no_gradient_no_graph_and_the_random_state_of_before():
    model, batches, _ = case("packed")
    optimizer, halving = build_optimizer(model, "adamw", lr=0.1), Halving("tiny", "less", batch_size=4)
    seen, kept, found = [], [], []

    def loss_sum(batch):
        number = len(seen)
        state = torch.get_rng_state()
        seen.append(state)
        if number == 2:  # the first of the second try
            found.append(
                (all(p.grad is None for p in model.parameters()), kept[0]() is None, torch.equal(state, seen[0]))
            )
        torch.rand(3)
        loss = nll_sum(model, batch)
        if number == 1:
            large = torch.ones(1000, requires_grad=True)
            kept.append(weakref.ref(large))
            loss = loss + 0 * large.exp().sum()
            assert any(p.grad is not None for p in model.parameters())
            fail()
        return loss

    def step(parts):
        return optimizer_step(model, parts, loss_sum, optimizer)

    gc.disable()
    try:
        step_in_memory(batches, step, optimizer, halving, lambda split: None, torch.device("cpu"))
    finally:
        gc.enable()
    assert found == [(True, True, True)]
    assert not torch.equal(seen[1], seen[0])
    assert halving.limit == batches[1].size // 2
    assert len(seen) == 2 + 4  # both micro-batches are of one size, so both are now in two


def test_other_errors_are_left_alone():
    model, batches, _ = case("packed")

    def step(parts):
        return optimizer_step(model, parts, lambda batch: [][1], optimizer)

    optimizer = build_optimizer(model, "sgd", lr=0.1)
    with pytest.raises(IndexError):
        step_in_memory(batches, step, optimizer, Halving("", "", 4), lambda split: None, torch.device("cpu"))


def one_step(loss_sum, micro_batches, model, optimizer, **options):
    def step(parts):
        return optimizer_step(model, parts, loss_sum, optimizer)

    halving = Halving("tiny, fp32 on a card", "--train.smaller", 4, **options)
    return step_in_memory(micro_batches, step, optimizer, halving, lambda split: None, torch.device("cpu"))


def test_one_document_that_does_not_fit_is_told_with_what_would_help():
    model, batches, _ = case("padded")
    with pytest.raises(UserError) as caught:
        one_step(lambda batch: fail(), batches, model, build_optimizer(model, "sgd", lr=0.1))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("out of memory with 1 row x ")
    told = [
        "tiny, fp32 on a card",
        "Tried to allocate 2.00 GiB",
        "cannot be split further",
        "--train.smaller",
        "plan --fit",
    ]
    assert all(part in line for part in told)


def test_a_step_that_cannot_be_repeated_is_not():
    model, batches, plain = case("packed")
    optimizer, calls = build_optimizer(model, "sgd", lr=0.1), []

    def loss_sum(batch):
        calls.append(batch.size)
        return fail() if len(calls) == 1 else plain(batch)

    with pytest.raises(
        UserError, match=r"4 rows x 256 tokens.*inside backward cannot be repeated.*--train\.batch_size"
    ):
        one_step(loss_sum, batches, model, optimizer, repeatable=False)
    assert len(calls) == 1
    with pytest.raises(UserError):  # nor is it split before: its updates would be made twice
        one_step(lambda batch: fail(), batches, model, optimizer, repeatable=False, limit=10)


def test_an_update_that_does_not_fit_is_not_repeated(monkeypatch):
    model, batches, plain = case("packed")
    optimizer, calls = build_optimizer(model, "adamw", lr=0.1), []
    monkeypatch.setattr(optimizer, "step", fail)
    with pytest.raises(UserError, match=r"in the update of the weights.*2\.00 GiB.*--optimizer\.name") as caught:
        one_step(lambda batch: calls.append(1) or plain(batch), batches, model, optimizer)
    assert len(str(caught.value).splitlines()) == 1
    assert len(calls) == 2


# What running out of memory looks like


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 8.88 GB, other allocations: 1.00 MB, max allowed: 9.07 GB)."
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to ..."
        ),
    ],
    ids=lambda error: str(error)[:30],
)
def test_the_texts_of_every_device_are_known(error):
    assert is_out_of_memory(error)


def test_what_torch_and_numpy_say_on_this_machine_is_known():
    for ask in (lambda: torch.empty(2**50), lambda: np.zeros(2**57)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(OSError(28, "No space left on device"))


REAL = """
import copy, resource, sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from reference import pack_batch, random_model
from tunesmith.train.token_loss import nll_sum
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.optim import OneByOne, build_optimizer
from tunesmith.train.halving import Halving, step_in_memory
from tunesmith.train.step import optimizer_step

torch.set_num_threads(1)
rows = [[torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(i)).tolist()] * 2 for i in range(64)]
whole, single = pack_batch(rows, lambda d, t: True), [pack_batch([row], lambda d, t: True) for row in rows]
model = random_model(GPTConfig(n_layer=4, n_head=2, n_embd=64, vocab_size=100, block_size=64)).train()
twin = copy.deepcopy(model)

def step_of(model):
    optimizer = build_optimizer(model, "sgd", lr=0.1)
    return optimizer, lambda parts: optimizer_step(model, parts, lambda b: nll_sum(model, b), optimizer)

step_of(twin)[1](single)
held = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + 64 * 2**20,) * 2)
optimizer, step = step_of(model)
told = []
stats = step_in_memory([whole], step, optimizer, Halving("tiny", "less", 64), told.append, torch.device("cpu"))
far = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters()))
print(len(told), told[0].failed, told[-1].limit, stats.count, far)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, as Linux does")
def test_a_process_with_too_little_memory_makes_the_same_step():
    """A real limit: some 130 MB of activations and 64 MB of room. float32: equal to 1e-6.

    How far it must be split depends on the C library, which does not give address space back; single rows, which the
    other model has trained on, always fit.
    """
    code = REAL.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    splits, failed, limit, count, far = done.stdout.split()
    assert 1 <= int(splits) <= 6
    assert (int(failed), int(count)) == (64 * 128, 64 * 126)
    assert int(limit) == int(failed) // 2 ** int(splits)
    assert float(far) < 1e-6


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card; where one is: CUDA_VISIBLE_DEVICES=0 pytest ..."
)
def test_a_card_with_too_little_memory_makes_the_same_step():
    """Some 600 MB of activations and 256 MB of room. float32: equal to 1e-5."""
    card = torch.device("cuda")
    rows = [[torch.randint(0, 100, (64,)).tolist()] * 2 for _ in range(64)]
    whole = pack_batch(rows, lambda d, t: True).to(card)
    shape = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=100, block_size=64)
    models = [random_model(shape).train().to(card) for _ in range(2)]

    def step_of(model):
        optimizer = build_optimizer(model, "sgd", lr=0.1)
        return optimizer, lambda parts: optimizer_step(model, parts, lambda b: nll_sum(model, b), optimizer)

    step_of(models[0])[1](split_to([whole], 128))
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 256 * 2**20
    told = []
    optimizer, step = step_of(models[1])
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(card).total_memory)
    try:
        step_in_memory([whole], step, optimizer, Halving("", "", 64), told.append, card)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= len(told) <= 5
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
