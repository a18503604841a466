"""What only a GPU can show. The suite hides GPUs: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu*.py"""

import contextlib
import dataclasses
import statistics

import pytest
import torch

import tunesmith as ts
from interrupted_runs import interrupted
from reference import random_model
from stretches import gradients, laid_out, one_by_one
from test_gpu_answers import CPU, CUDA, HALF, SHAPE, decoded, needs_card
from tiny_runs import comparable, tiny_config
from tunesmith.data.datasets import open_dataset
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.files.names import SAMPLE
from tunesmith.generation.sampling import Sampling
from tunesmith.models.attention import Documents, attend_documents, attention_path, has_flash_kernel
from tunesmith.options.training import DataOptions, PairDataOptions
from tunesmith.train import prefetch
from tunesmith.train.optim import OneByOne, build_optimizer, set_learning_rate
from tunesmith.train.pair_loss import PreferenceLoss, dpo_loss_sum
from tunesmith.train.prefetch import made_ahead
from tunesmith.train.step import Unread, step_on_device
from tunesmith.train.step_graph import WARM_UP, RecordedStep, recorder
from tunesmith.train.token_loss import nll_sum

pytestmark = needs_card
NEAR = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def batches():
    store = tokenise(open_dataset(DataOptions(name="sample")), "train", Tokenizer.load(SAMPLE))
    options = {"batching": "packed", "block_size": 256, "batch_size": 2, "loss_on": "assistant", "fill_to": 64}
    return Batches(text_rows(store, range(len(store)), BatchLayout(**options)))


@pytest.fixture(scope="module")
def pairs():
    store = tokenise(open_dataset(PairDataOptions(name="sample")), "train", Tokenizer.load(SAMPLE), form="pairs")
    return Batches(PairRows(PairStore(store), range(60), BatchLayout("packed", 256, batch_size=2, fill_to=64)))


def halves():
    """The half precisions whose packed attention is the flash kernel's here."""
    return [t for t in HALF if attention_path(has_flash_kernel(CUDA), t, 32) == "varlen"]


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_variable_length_kernel_gives_what_torch_gives_for_each_joined_text(dtype, window):
    """With stretches that continue others, and the empty ones at the end of the borders; forward and backward."""
    if dtype not in halves():
        pytest.skip(f"this card has no flash kernel for {dtype}")
    lengths, parents = laid_out([[(50, 30, 41), (20, 10, 5)], [(60,), (16, 7, 70)], [(156,)]])
    documents = Documents.from_rows(lengths, CUDA, parents)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(3, 156, 2, 32, generator=generator).to(CUDA, dtype) for _ in range(4))
    found = []
    for kind in (dtype, torch.float32):
        inputs = [z.detach().to(kind).requires_grad_() for z in (q, k, v)]
        y = (
            attend_documents(*inputs, documents, window=window).flatten(0, 1)
            if kind is dtype
            else one_by_one(*inputs, lengths, parents, window)
        )
        found.append([y, *torch.autograd.grad((y * weight.to(kind).flatten(0, 1)).sum(), inputs)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize("window", [None, 3])
def test_stretch_by_stretch_attention_is_exact_on_the_card_too(window):
    rows = [[(5, 3, 4), (2, 1, 5)], [(6,), (1, 7, 2)], [(20,)]]
    lengths, parents = laid_out(rows)
    documents = Documents.from_rows(lengths, CUDA, parents)
    on_card = gradients(lambda *z: attend_documents(*(t.to(CUDA) for t in z), documents, window=window).cpu(), rows)
    right = gradients(lambda *z: one_by_one(*z, lengths, parents, window), rows)
    for ours, theirs in zip(on_card, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("fp16", 3e-3), ("bf16", 2e-2)])
def test_losses_on_the_card_are_near_those_of_the_processor(batches, pairs, precision, near):
    model = random_model(SHAPE).train()
    loss, reference = PreferenceLoss(beta=1.0), torch.zeros(2, 2)

    def losses(device, precision):
        model.to(device)
        batch, pair = batches[0].to(device), pairs[0].to(device)
        held = reference.new_zeros(pair.count, 2).to(device)
        found = (
            nll_sum(model, batch, precision) / batch.count,
            dpo_loss_sum(model, pair, held, loss, precision)[0] / pair.count,
        )
        return [x.item() for x in found]

    assert losses(CUDA, precision) == pytest.approx(losses(CPU, "fp32"), rel=near)


def train(model, batch_number, steps, precision="bf16"):
    """Losses of a few steps."""
    optimizer = build_optimizer(model, "adamw", lr=1e-3)
    losses = []
    for i in range(steps):
        batch = batch_number(i)
        loss = nll_sum(model, batch, precision) / batch.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def test_batches_made_ahead_on_a_stream_of_their_own_train_the_same(batches):
    """The copies must be over when the step reads them, and their memory must not be given away before the step is over."""
    found = []
    for ahead in (True, False):
        model = random_model(SHAPE).to(CUDA).train()
        make = lambda i: batches[i].to(CUDA)  # noqa: E731
        with made_ahead(make, CUDA) if ahead else contextlib.nullcontext(make) as batch_number:
            assert isinstance(batch_number, prefetch.Prefetch) is ahead
            found.append(train(model, batch_number, 40, "fp32"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_step_decided_on_the_card_never_waits_for_it(batches, pairs):
    """From forward to update and the copy of its numbers; reading them is the one wait of a step."""
    if not halves():
        pytest.skip("an older card goes stretch by stretch; what waits there is not promised")
    model = random_model(SHAPE).to(CUDA).train()
    optimizer, held = build_optimizer(model, "adamw", lr=1e-3), torch.zeros(pairs[0].count, 2, device=CUDA)
    on_texts, on_pairs = [batches[i].to(CUDA) for i in (0, 1)], [pairs[0].to(CUDA)]
    halted = torch.zeros((), device=CUDA)
    more = {"optimizer": optimizer, "max_norm": 1.0, "halted": halted}

    def steps():
        loss = PreferenceLoss()
        text = step_on_device(model, on_texts, lambda b: nll_sum(model, b, "bf16"), **more)
        pair = step_on_device(model, on_pairs, lambda b: dpo_loss_sum(model, b, held, loss, "bf16")[0], **more)
        return [Unread(seen) for seen in (text, pair)]

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unread = steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < seen.read().grad_norm < float("inf") for seen in unread)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov"])
def test_after_a_loss_that_is_no_number_the_card_moves_nothing_any_more(batches, name):
    model = random_model(SHAPE).to(CUDA).train()
    optimizer, halted = build_optimizer(model, name, lr=1e-2), torch.zeros((), device=CUDA)
    OneByOne(optimizer, in_backward=False).allocate_state()
    seen, kept = [], []
    for factor in (1.0, float("nan"), 1.0):
        loss_sum = lambda b, f=factor: f * nll_sum(model, b)  # noqa: E731
        more = {"optimizer": optimizer, "max_norm": 1.0, "halted": halted}
        seen.append(Unread(step_on_device(model, [batches[0].to(CUDA)], loss_sum, **more)))
        state = [v.clone() for s in optimizer.state.values() for v in s.values()]
        kept.append([p.detach().clone() for p in model.parameters()] + state)
    assert [s.read().updated for s in seen] == [True, False, False]
    for after in kept[1:]:
        assert all(torch.equal(p, q) for p, q in zip(kept[0], after, strict=True))


def test_compiled_blocks_give_the_eager_losses_and_are_compiled_once(batches):
    plain, compiled = (random_model(SHAPE).to(CUDA).train() for _ in range(2))
    torch._dynamo.reset()
    compiled.compile_blocks()
    batch_number = lambda i: batches[i].to(CUDA)  # noqa: E731
    expected = train(plain, batch_number, 12)
    torch._dynamo.utils.counters.clear()
    first = train(compiled, batch_number, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.utils.counters.clear()
    later = train(compiled, lambda i: batch_number(i + 4), 8)
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0
    assert first == pytest.approx(expected[:4], rel=2e-2)
    assert len(later) == 8


def test_a_second_model_of_another_width_or_dropout_is_compiled_too(batches):
    """In one process, as a study has them: what the first took as numbers are symbols to the second."""
    for change in ({"n_embd": 128}, {"n_embd": 64}, {"dropout": 0.1}, {"dropout": 0.2}, {}):
        shape = dataclasses.replace(SHAPE, **change)
        plain, compiled = (random_model(shape).to(CUDA).train() for _ in range(2))
        compiled.compile_blocks()
        batch_number = lambda i: batches[i].to(CUDA)  # noqa: E731
        near = 0.2 if "dropout" in change else 2e-2  # other masks
        assert train(compiled, batch_number, 3) == pytest.approx(train(plain, batch_number, 3), rel=near)


def test_every_line_of_the_log_gives_a_rate_that_the_card_has(tmp_path):
    """Those before an estimate and the end too, which are read when they have long been over."""
    options = {"train__device": "cuda", "train__precision": "bf16", "train__compile": False, "train__steps": 12}
    rates = [line["tokens_per_s"] for line in ts.sft(tiny_config(SAMPLE, tmp_path / "run", **options)).metrics("train")]
    assert 0 < max(rates) < 5 * statistics.median(rates), rates


# ---- steps recorded as CUDA graphs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windows():
    store = tokenise(open_dataset(DataOptions(name="sample")), "train", Tokenizer.load(SAMPLE), form="texts")
    return Batches(text_rows(store, range(len(store)), BatchLayout("windows", block_size=256, batch_size=1)))


def stepped(
    windows,
    recorded,
    *,
    name="adamw",
    precision="bf16",
    dropout=0.0,
    lr=2.0**-10,
    same=False,
    loss=nll_sum,
    compiled=False,
):
    """Losses of 20 steps of two micro-batches, recorded or plain, the weights, how often was replayed, and what was said."""
    torch.manual_seed(5)
    model = random_model(dataclasses.replace(SHAPE, dropout=dropout)).to(CUDA).train()
    if compiled:
        model.compile_blocks()
    optimizer, said, replays = build_optimizer(model, name, lr=lr), [], []
    OneByOne(optimizer, in_backward=False).allocate_state()
    more = {"loss_sum": lambda b: loss(model, b, precision), "optimizer": optimizer, "max_norm": 1.0}
    halted = torch.zeros((), device=CUDA)
    step = lambda batches: step_on_device(model, batches, halted=halted, **more)  # noqa: E731

    on_card = recorder(CUDA)

    def record(work):
        replay = on_card(work)
        return lambda: replays.append(1) or replay()

    taken = RecordedStep(step, optimizer, record, CUDA, said.append) if recorded else step
    seen = []
    for number in range(20):
        set_learning_rate(optimizer, lr / (1 + number % 4))
        seen.append(Unread(taken([windows[0 if same else 2 * number + i].to(CUDA) for i in range(2)])))
    return [s.read().loss for s in seen], [p.detach() for p in model.parameters()], len(replays), said


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd-momentum"])
def test_20_recorded_steps_are_the_plain_ones(windows, name, compiled):
    torch._dynamo.reset()
    plain, expected, _, _ = stepped(windows, False, name=name, precision="fp32", compiled=compiled)
    losses, weights, replays, said = stepped(windows, True, name=name, precision="fp32", compiled=compiled)
    assert (replays, said) == (20 - WARM_UP, [])
    assert losses == pytest.approx(plain, rel=1e-4)
    for p, q in zip(weights, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_a_recorded_step_draws_the_masks_of_the_plain_one(windows):
    """The same batch at rate 0: what differs is the masks, and they come from the generator in the same order."""
    recorded, plain = (stepped(windows, on, dropout=0.3, lr=0.0, same=True)[0] for on in (True, False))
    assert len(set(recorded)) == 20
    assert recorded == pytest.approx(plain, rel=1e-3)


def test_a_step_that_waits_cannot_be_recorded_and_is_taken_plainly(windows):
    """Dropout and later allocations work afterwards: nothing is left of the recording that broke off."""

    def waits(model, batch, precision):
        loss = nll_sum(model, batch, precision)
        assert loss.item() > 0
        return loss

    losses, _, replays, said = stepped(windows, True, dropout=0.1, loss=waits)
    assert (replays, len(said)) == (0, 1)
    assert "not recorded as a CUDA graph" in said[0]
    assert losses == pytest.approx(stepped(windows, False, dropout=0.1)[0], rel=1e-2)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert stepped(windows, True)[2] == 20 - WARM_UP, "and another one can be recorded"


def test_a_recorded_run_is_the_plain_run_and_can_be_resumed(tmp_path, capsys):
    options = {
        "data__batching": "windows", "train__device": "cuda", "train__precision": "fp32", "train__compile": False,
        "train__steps": 16, "eval__every": 8, "checkpoint__every": 8, "optimizer__schedule": "cosine",
    }  # fmt: skip
    runs = [
        ts.sft(tiny_config(SAMPLE, tmp_path / str(asked), **options, train__cuda_graphs=asked))
        for asked in (True, False)
    ]
    assert "not recorded" not in capsys.readouterr().out
    losses = [[line["loss"] for line in run.metrics("train")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    resumed = interrupted(runs[0], tmp_path / "cut", 8)
    ts.sft(tiny_config(SAMPLE, resumed.path, **options, train__cuda_graphs=True, resume=True))
    assert [line["loss"] for line in resumed.metrics("train")] == pytest.approx(losses[0], rel=1e-4)


def test_where_a_step_cannot_be_recorded_plain_ones_give_the_same_and_training_goes_on(batches):
    """Reading a number on the host is what a recording cannot do."""
    model = random_model(SHAPE).to(CUDA)
    expected, sampling = decoded(model, Sampling(temperature=0), 40), Sampling(temperature=0)
    hook = model.ln_f.register_forward_hook(lambda _, __, out: (out.sum().item(), None)[1])
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        assert decoded(model, sampling, 40) == expected
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device=CUDA).isfinite().all(), "the generator is free"
    hook.remove()
    assert decoded(model, sampling, 40) == expected
    losses = train(model.train(), lambda i: batches[i].to(CUDA), 3)
    assert losses == pytest.approx(
        train(random_model(SHAPE).to(CUDA).train(), lambda i: batches[i].to(CUDA), 3), rel=1e-2
    )


LEAN = {"train__activation_checkpointing": True, "train__optimizer_in_backward": True, "train__grad_clip": 0}
MODES = {
    "plain": {},
    "selective": {"train__activation_checkpointing": "selective"},
    "checkpointing": {"train__activation_checkpointing": True},
    "lean": LEAN,
    "bf16 weights": {**LEAN, "train__weights": "bf16"},
}


def test_each_memory_mode_takes_less_than_the_plain_step(tmp_path):
    """One command after the other in this process, the meter set back before each.

    By the plan 0.86, 0.79, 0.68, 0.57 and 0.49 GB. At half of this width and depth the head's loss is the peak of the
    lean modes, for the plan too, and they differ by less than the libraries' workspaces take.
    """
    from tunesmith.files.weights import save_model

    tokenizer = Tokenizer.load(SAMPLE)
    shape = dataclasses.replace(SHAPE, n_layer=12, n_embd=512, n_head=8)
    save_model(random_model(shape), tokenizer, tmp_path / "model")
    shared = {"train__device": "cuda", "train__precision": "bf16", "train__compile": False, "eval__at_start": False}
    peaks, losses = {}, {}
    for name, options in MODES.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        size = {"data__block_size": 256, "train__batch_size": 4}
        run = ts.sft(tiny_config(tmp_path / "model", tmp_path / name, **size, **shared, **options))
        peaks[name] = run.metrics("train")[-1]["peak_memory_gb"]
        losses[name] = [line["loss"] for line in comparable(run) if line["event"] == "train"]
    assert all(peaks[name] < peaks["plain"] for name in MODES if name != "plain"), peaks
    assert peaks["bf16 weights"] < peaks["lean"] < peaks["checkpointing"], peaks
    for name in ("selective", "checkpointing"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4)
