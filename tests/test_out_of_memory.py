"""Memory that ends: the micro-batch is split, the step done again with the same result, the size remembered and told."""

import gc
import itertools
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import tunesmith as ts
from made_pairs import batches_of, read_back
from reference import batch_nll, pack_batch, random_model
from tiny_runs import as_argv, comparable, last_digest, tiny_config, train_losses
from tunesmith import evaluate, preferences
from tunesmith.__main__ import main
from tunesmith.batching import Batches
from tunesmith.errors import UserError
from tunesmith.evaluate import estimate_loss, nll_sum
from tunesmith.gpt import GPTConfig
from tunesmith.models import SAMPLE
from tunesmith.optim import OneByOne, build_optimizer
from tunesmith.options import DPOConfig, RewardConfig
from tunesmith.outofmemory import is_out_of_memory
from tunesmith.preferences import PreferenceLoss, dpo_loss_sum, estimate_dpo, estimate_reward, reward_loss_sum
from tunesmith.recipes import dpo, reward, sft
from tunesmith.reference import LogpStore, cached
from tunesmith.reward import RewardModel
from tunesmith.splitting import Splitting, split_to, step_in_memory
from tunesmith.step import optimizer_step
from tunesmith.tokenizer import Tokenizer
from tunesmith.training import load_splits
from tunesmith.weights import load_model

FLOAT64 = 1e-12
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.89 GiB\nmore lines"


def text_batches(batching, fill_to=1, batch_size=4):
    """The first two micro-batches of the sample data."""
    data = tiny_config(SAMPLE, Path("unused"), data__batching=batching).data
    splits = load_splits(data, Tokenizer.load(SAMPLE))
    batches = Batches(
        splits.train, splits.train_rows, batching=batching, block_size=256, batch_size=batch_size, loss_on="auto",
        seed=1, fill_to=fill_to,
    )  # fmt: skip
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


# Splitting


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
            longest = max(sum(batches.store.lengths[i]) for i in half.sources)
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


# The step


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
        table = torch.randn(len(batches), 2, dtype=torch.float64) - 30
        losses = PreferenceLoss(beta=0.3)
        return model, [batches[0], batches[1]], lambda b: dpo_loss_sum(model, b, table[list(b.pairs)], losses)
    scorer = RewardModel(model)
    scorer.init_score(0)
    return scorer, [batches[0], batches[1]], lambda batch: reward_loss_sum(scorer, batch)


def fail():
    raise torch.OutOfMemoryError(CUDA)


def trained(kind, *, room=None, where="forward", accumulate=2, steps=2):
    """Weights, stats, splits told and sizes that failed, after steps of which each sees the same micro-batches."""
    model, batches, plain = case(kind)
    optimizer = build_optimizer(model, "sgd", lr=0.1, weight_decay=0.0)
    splitting, told, failures = Splitting("tiny", "less", batch_size=4), [], []

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
        stats.append(step_in_memory(batches[:accumulate], step, optimizer, splitting, told.append, device))
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
    optimizer, splitting = build_optimizer(model, "adamw", lr=0.1), Splitting("tiny", "less", batch_size=4)
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
        step_in_memory(batches, step, optimizer, splitting, lambda split: None, torch.device("cpu"))
    finally:
        gc.enable()
    assert found == [(True, True, True)]
    assert not torch.equal(seen[1], seen[0])
    assert splitting.limit == batches[1].size // 2
    assert len(seen) == 2 + 4  # both micro-batches are of one size, so both are now in two


def test_other_errors_are_left_alone():
    model, batches, _ = case("packed")

    def step(parts):
        return optimizer_step(model, parts, lambda batch: [][1], optimizer)

    optimizer = build_optimizer(model, "sgd", lr=0.1)
    with pytest.raises(IndexError):
        step_in_memory(batches, step, optimizer, Splitting("", "", 4), lambda split: None, torch.device("cpu"))


def one_step(loss_sum, micro_batches, model, optimizer, **options):
    def step(parts):
        return optimizer_step(model, parts, loss_sum, optimizer)

    splitting = Splitting("tiny, fp32 on a card", "--train.smaller", 4, **options)
    return step_in_memory(micro_batches, step, optimizer, splitting, lambda split: None, torch.device("cpu"))


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
        UserError, match=r"4 rows x 256 tokens.*inside backward cannot be done again.*--train\.batch_size"
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
from tunesmith.evaluate import nll_sum
from tunesmith.gpt import GPTConfig
from tunesmith.optim import OneByOne, build_optimizer
from tunesmith.splitting import Splitting, step_in_memory
from tunesmith.step import optimizer_step

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
stats = step_in_memory([whole], step, optimizer, Splitting("tiny", "less", 64), told.append, torch.device("cpu"))
far = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters()))
print(len(told), told[0].failed, told[-1].limit, stats.count, far)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, as Linux does")
def test_a_process_with_too_little_memory_makes_the_same_step():
    """A real limit: some 130 MB of activations and 64 MB of room. float32: equal to 1e-6.

    How far it must be split depends on the C library, which does not give address space back; single rows, which the
    other model has trained on, always fit.
    """
    code = REAL.format(tests=str(Path(__file__).parent))
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
        step_in_memory([whole], step, optimizer, Splitting("", "", 64), told.append, card)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= len(told) <= 5
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


# Estimates


def short_of(monkeypatch, module, name, room):
    """`module.name`, whose second argument is a batch, fails above `room` tokens; the sizes that did."""
    plain, failures = getattr(module, name), []

    def limited(model, batch, *args, **more):
        if batch.size > room:
            failures.append(batch.size)
            fail()
        return plain(model, batch, *args, **more)

    monkeypatch.setattr(module, name, limited)
    return failures


def test_a_loss_estimate_in_pieces_is_the_same_batch_by_batch(monkeypatch):
    model, batches, _ = case("packed")
    expected = estimate_loss(model, batches)
    failures = short_of(monkeypatch, evaluate, "nll_sum", 256)
    found = estimate_loss(model, batches)
    assert failures == [1024, 512]
    assert (found.loss, found.tokens) == (pytest.approx(expected.loss, rel=FLOAT64), expected.tokens)
    assert [n for _, n in found.parts] == [n for _, n in expected.parts]
    assert [x for x, _ in found.parts] == pytest.approx([x for x, _ in expected.parts], rel=FLOAT64)
    short_of(monkeypatch, evaluate, "nll_sum", 10)
    with pytest.raises(UserError, match=r"out of memory in a forward pass over 1 row x .*--data\.block_size"):
        estimate_loss(model, batches)


def test_preference_estimates_and_the_kept_reference_in_pieces_are_the_same(monkeypatch, tmp_path):
    model, batches, _ = case("dpo")
    scorer = case("reward")[0]
    table = torch.randn(60, 2, dtype=torch.float64) - 30

    def reference(batch):
        return table[list(batch.pairs)]

    def kept(name):
        made = batches_of(batch_size=4)
        store = LogpStore(tmp_path / name)
        known, fill = cached(made, range(40), store, lambda batch: preferences.answer_logps(model, batch))
        assert fill.computed == 40
        return known(made.assemble(range(40)))

    def found(name):
        dpo_means, dpo_parts = estimate_dpo(model, batches, reference, PreferenceLoss())
        reward_means, reward_parts = estimate_reward(scorer, batches)
        numbers = [
            *dpo_means.values(),
            *(x for x, _ in dpo_parts),
            *reward_means.values(),
            *(x for x, _ in reward_parts),
        ]
        return numbers, kept(name)

    expected, expected_logps = found("a")
    failures = [short_of(monkeypatch, preferences, name, 70) for name in ("answer_logps", "pair_scores")]
    numbers, logps = found("b")
    assert all(failures)
    assert numbers == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(logps, expected_logps)


# Whole runs


RUNS = {"sft": (ts.sft, sft, "nll_sum", {}), "dpo": (ts.dpo, dpo, "dpo_loss_sum", {"kind": DPOConfig}),
        "reward": (ts.train_reward_model, reward, "reward_loss_sum", {"kind": RewardConfig})}  # fmt: skip
PLAIN = {"optimizer__name": "sgd", "optimizer__lr": 0.1, "train__accumulate": 2}


def pairs_file(path):
    turns = [(f"What is {i}?", f"It is {i * 7} and no more.", f"{i} or so") for i in range(40)]
    rows = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__name": str(path)}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_ran_out_of_memory_ends_as_one_that_did_not(tiny_directory, tmp_path, monkeypatch, capsys, kind):
    """float32 sums in another order: weights equal to 1e-6 after six steps. It fails once, and says so once."""
    train, module, loss, named = RUNS[kind]
    options = PLAIN | named | (pairs_file(tmp_path / "pairs.jsonl") if kind != "sft" else {})
    whole = train(tiny_config(tiny_directory, tmp_path / "whole", **options))
    failures = short_of(monkeypatch, module, loss, 150)
    capsys.readouterr()
    run = train(tiny_config(tiny_directory, tmp_path / "split", **options))
    printed = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    (event,) = run.metrics("split")
    assert [event["tokens"]] == failures
    assert (event["step"], event["limit"]) == (1, run.status["split_limit"])
    assert event["limit"] < event["tokens"]
    (line,) = printed
    assert line.startswith("step 1: out of memory with ")
    assert f"at most {event['limit']} tokens" in line
    assert "fp32 on CPU" in line
    assert "--train.batch_size 1 --train.accumulate 4" in line
    assert train_losses(run) == pytest.approx(train_losses(whole), rel=1e-6)
    assert [m["tokens"] for m in run.metrics("train")] == [m["tokens"] for m in whole.metrics("train")]
    assert "split_limit" not in whole.status
    if kind == "sft":
        after = load_model(whole.checkpoints()[-1][1]).state_dict()
        for name, value in load_model(run.checkpoints()[-1][1]).state_dict().items():
            torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6, msg=name)


def test_a_resumed_run_goes_on_with_the_size_that_fits(tiny_directory, tmp_path, monkeypatch):
    """Bit for bit, and without a second failure; with another need of memory the limit is found anew."""
    options = {**PLAIN, "model__dropout": 0.2}
    failures = short_of(monkeypatch, sft, "nll_sum", 150)
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    assert len(failures) == 1
    for name, more, again in (("same", {}, 1), ("other", {"train__activation_checkpointing": True}, 2)):
        run = ts.Run(tmp_path / name)
        shutil.copytree(whole.path, run.path)
        shutil.rmtree(run.checkpoints()[-1][1])
        assert run.checkpoints()[-1][0] == 3
        ts.sft(tiny_config(tiny_directory, run.path, **options, **more, resume=True))
        assert len(failures) == again
        assert len(run.metrics("split")) == again
        if name == "same":
            assert comparable(run) == comparable(whole)
            assert last_digest(run) == last_digest(whole)
            assert run.status == whole.status


def test_a_run_that_updates_inside_backward_ends_at_once(tiny_directory, tmp_path, monkeypatch):
    options = {"train__optimizer_in_backward": True, "train__grad_clip": 0.0, "eval__at_start": False}
    failures = short_of(monkeypatch, sft, "nll_sum", 150)
    with pytest.raises(
        UserError, match=r"2 rows x 128 tokens.*--train\.batch_size, --train\.optimizer_in_backward false"
    ):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    assert failures == [256]


def test_the_command_ends_with_one_line_where_a_document_does_not_fit(tiny_directory, tmp_path, monkeypatch, capsys):
    failures = short_of(monkeypatch, sft, "nll_sum", 5)
    config = tiny_config(tiny_directory, tmp_path / "r", eval__at_start=False)
    assert main(as_argv(config)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tunesmith: out of memory with 1 row x ")
    told = [
        "fp32 on CPU",
        "--train.activation_checkpointing true",
        "--data.block_size below 128",
        "--lora.rank",
        "Tried to",
    ]
    assert all(part in line for part in told)
    assert len(failures) >= 2
    assert ts.Run(tmp_path / "r").status["state"] == "failed"
    assert "out of memory" in ts.Run(tmp_path / "r").status["reason"]
    assert not ts.Run(tmp_path / "r").checkpoints()


def test_optimizer_state_that_does_not_fit_ends_the_command_with_one_line(
    monkeypatch, tiny_directory, tmp_path, capsys
):
    def fail(_self):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(OneByOne, "allocate_state", fail)
    assert main(as_argv(tiny_config(tiny_directory, tmp_path / "run"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("tunesmith: out of memory making the state of adamw for")
    assert len(told.splitlines()) == 1
