"""The reference of DPO: computed once and kept, adapters off, or a second model; all the same, and never twice."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import tunesmith as ts
from made_pairs import PAIRS, batches_of
from reference import random_model
from tiny_runs import comparable, tiny_config
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import load_model, save_model
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.lora import apply_lora, disabled, lora_layers
from tunesmith.options.training import DPOConfig
from tunesmith.train import reference
from tunesmith.train.pair_loss import answer_logps
from tunesmith.train.reference import LogpStore, adapter_off, cached, second_model

CURVE = 1e-6  # how far metrics of runs with different references may lie apart
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=501, block_size=64)


@pytest.fixture
def calls(monkeypatch):
    """The batches for which a reference is computed, of any kind."""
    seen = []

    def counted(model, batch, *args):
        seen.append(batch)
        return answer_logps(model, batch, *args)

    monkeypatch.setattr(reference, "answer_logps", counted)
    return seen


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that only this test has."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(model, out, **options):
    """Four steps on forty pairs, at a rate at which the policy moves."""
    small = {
        "data__max_rows": 40, "data__block_size": 192, "train__steps": 4, "train__batch_size": 3, "optimizer__lr": 1e-2,
        "train__diverge_after": 0,
        "eval__every": 4, "checkpoint__every": 4,
    }  # fmt: skip
    return ts.dpo(tiny_config(model, out, DPOConfig, **(small | options)))


def told(run):
    (line,) = run.metrics("reference")
    return line


# ---- all three are the same ----------------------------------------------------------------------------------------


def assert_same_curves(runs):
    first, *others = ([line for line in comparable(r) if line.pop("event") in ("train", "eval")] for r in runs)
    assert max(abs(line.get("validation_margin", 0.0)) for line in first) > 1e3 * CURVE, "the policy moved"
    for other in others:
        assert len(other) == len(first) == 6
        for line, expected in zip(other, first, strict=True):
            assert line == pytest.approx(expected, rel=CURVE, abs=CURVE)


def test_cached_adapter_and_model_give_the_same_curves_with_lora(tiny_directory, tmp_path):
    lora = {"lora__rank": 4, "lora__dropout": 0.1, "model__dropout": 0.1}
    modes = ("cached", "adapter", "model")
    runs = [run(tiny_directory, tmp_path / mode, dpo__reference=mode, **lora) for mode in modes]
    assert tuple(told(r)["mode"] for r in runs) == modes
    assert_same_curves(runs)


def test_cached_and_model_and_a_model_on_a_device_of_its_own_give_the_same_curves_for_all_weights(
    tiny_directory, tmp_path
):
    ways = [{}, {"dpo__reference": "model"}, {"dpo__reference_device": "cpu"}]
    runs = [run(tiny_directory, tmp_path / str(i), **way) for i, way in enumerate(ways)]
    assert [told(r)["mode"] for r in runs] == ["cached", "model", "model"]
    assert told(runs[2])["device"] == runs[2].config["dpo"]["reference_device"] == "cpu"
    assert_same_curves(runs)


def policy(dropout=0.3):
    """A policy in training mode, with adapters that have moved."""
    model = random_model(GPTConfig(**(vars(SHAPE) | {"dropout": dropout})))
    apply_lora(model, "all-linear,lm_head", rank=2, alpha=4.0, dropout=dropout)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()
    return model.train()


def test_the_policy_without_its_adapters_is_the_base_and_is_left_as_it_was():
    model, batch = policy(), batches_of()[0]
    got = adapter_off(model, "fp32")(batch)
    torch.testing.assert_close(got, answer_logps(random_model(SHAPE), batch))
    assert not got.requires_grad
    assert all(module.training for module in model.modules())
    assert all(layer.enabled for layer in lora_layers(model).values())
    with disabled(model):
        adapter_off(model, "fp32")(batch)
        assert not any(layer.enabled for layer in lora_layers(model).values())


def test_a_second_model_stays_as_it_was_made_and_without_dropout():
    model, batch = policy(), batches_of()[0]
    frozen = second_model(model, torch.device("cpu"), "fp32")
    with torch.no_grad():
        before = answer_logps(model.eval(), batch)
        for p in model.train().parameters():
            p.add_(1.0)
    assert torch.equal(frozen(batch), before)
    assert torch.equal(frozen(batch), before), "without dropout"
    assert all(p.requires_grad for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))


# ---- kept by content -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tiny_directory, tmp_path_factory):
    """A first run, after which the reference of its pairs is known."""
    path = tmp_path_factory.mktemp("known")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(path / "cache"))
        yield run(tiny_directory, path / "first", eval__iters=99)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"dpo__beta": 0.5}, {"dpo__loss": "ipo"}, {"dpo__loss": "robust"}, {"lora__rank": 2}, {"lora__rank": 4},
        {"optimizer__name": "sgd"}, {"train__batch_size": 1, "train__accumulate": 3}, {"data__batching": "padded", "train__batch_size": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_second_run_over_the_same_pairs_makes_no_reference_pass(tiny_directory, tmp_path, known, calls, options):
    second = run(tiny_directory, tmp_path / "second", **options)
    assert told(second)["mode"] == "cached"
    assert told(second)["computed"] == 0
    assert not calls
    assert told(known)["computed"] == told(known)["pairs"]


def test_the_adapter_and_the_second_model_do_make_passes(tiny_directory, tmp_path, known, calls):
    """Else the count of none above would mean nothing."""
    for options in ({"dpo__reference": "adapter", "lora__rank": 2}, {"dpo__reference": "model"}):
        calls.clear()
        run(tiny_directory, tmp_path / options["dpo__reference"], **options)
        assert len(calls) > 4


def test_other_weights_or_another_precision_compute_everything_anew(tiny_directory, tmp_path, known, calls):
    other = load_model(tiny_directory)
    with torch.no_grad():
        other.h[1].mlp.c_fc.bias[3] += 1e-3
    save_model(other, Tokenizer.load(SAMPLE), tmp_path / "other")
    for i, (model, options) in enumerate([(tmp_path / "other", {}), (tiny_directory, {"train__precision": "bf16"})]):
        calls.clear()
        anew = told(run(model, tmp_path / str(i), **options))
        assert anew["computed"] == anew["pairs"] == sum(batch.count for batch in calls) > 20


def test_one_changed_byte_in_a_row_computes_just_that_row_anew(tiny_directory, tmp_path, calls, cache):
    rows = (SAMPLE.parent / "train.jsonl").read_bytes().splitlines(keepends=True)[:12]
    folder = tmp_path / "pairs"
    folder.mkdir()

    def computed(name):
        """Train on all the rows; the rows for which the reference was computed."""
        calls.clear()
        (folder / "train.jsonl").write_bytes(b"".join(rows))
        (folder / "test.jsonl").write_bytes(b"".join(rows[:3]))
        counts = told(run(tiny_directory, tmp_path / name, data__name=str(folder), train__steps=12))
        assert counts["pairs"] == 12 + 3
        assert counts["computed"] == sum(batch.count for batch in calls)
        return sorted(row for batch in calls for row in batch.sources)

    assert computed("first") == list(range(12)), "the test rows are training rows, so known by then"
    assert computed("second") == []
    at = rows[7].index(b'"rejected": [{"role": "assistant", "content": "') + 60
    rows[7] = rows[7][:at] + (b"x" if rows[7][at : at + 1] != b"x" else b"y") + rows[7][at + 1 :]
    assert computed("changed") == [7]
    rows[7], rows[8] = rows[8], rows[7]
    assert computed("moved") == [], "a pair's place does not matter"


# ---- the file ------------------------------------------------------------------------------------------------------


class Computing:
    """Stands for the model: the log-probabilities of a pair are made of its number, and calls are counted."""

    def __init__(self, until=None):
        self.pairs, self.until = [], until

    def __call__(self, batch):
        if self.until is not None and len(self.pairs) >= self.until:
            raise KeyboardInterrupt
        self.pairs += batch.pairs
        return -torch.tensor([[i + 0.25, i + 0.5] for i in batch.pairs])


def expected(numbers):
    return -torch.tensor([[i + 0.25, i + 0.5] for i in numbers])


def test_the_reference_of_a_batch_is_what_was_computed_for_its_pairs(tmp_path):
    batches, compute = batches_of(), Computing()
    got, fill = cached(batches.rows, range(len(PAIRS)), LogpStore(tmp_path / "kept.npy"), compute)
    assert (fill.pairs, fill.computed, sorted(compute.pairs)) == (60, 60, list(range(60)))
    for batch in batches.fixed():
        assert torch.equal(got(batch), expected(batch.pairs))
        assert got(batch).dtype == torch.float32
    again, compute = batches_of(batching="padded", seed=5), Computing()
    got, fill = cached(again.rows, [4, 9], LogpStore(tmp_path / "kept.npy"), compute)
    assert (fill.pairs, fill.computed, compute.pairs) == (2, 0, [])
    assert torch.equal(got(again.rows.assemble([9, 4])), expected([9, 4]))
    assert got(again.rows.assemble([5])).isnan().all(), (
        "a pair that was not asked for has no number that could be taken for one"
    )


def test_an_interrupted_pass_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SAVE_EVERY", 5)
    path, broken = tmp_path / "kept.npy", Computing(until=30)
    with pytest.raises(KeyboardInterrupt):
        cached(batches_of().rows, range(60), LogpStore(path), broken)
    kept = len(LogpStore(path).known)
    assert 30 <= kept == len(broken.pairs) < 60
    rest = Computing()
    got, fill = cached(batches_of().rows, range(60), LogpStore(path), rest)
    assert fill.computed == len(rest.pairs) == 60 - kept
    assert not set(rest.pairs) & set(broken.pairs)
    assert torch.equal(got(batches_of().rows.assemble(range(60))), expected(range(60)))


def test_two_writers_of_one_file_both_add_to_it(tmp_path):
    path, batches = tmp_path / "kept.npy", batches_of()
    one, other = LogpStore(path), LogpStore(path)
    cached(batches.rows, range(20), one, Computing())
    cached(batches.rows, range(10, 40), other, Computing())
    assert len(LogpStore(path).known) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npy"], "nothing half-written stays"


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


DAMAGE = {
    "empty": lambda whole: b"",
    "cut in its header": lambda whole: whole[:40],
    "cut in its records": lambda whole: whole[:-7],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"no such thing\n" * 99,
    "an archive": lambda whole: b"PK\x03\x04" + whole,
    "another array": lambda whole: saved(np.arange(9.0)),
    "objects": lambda whole: saved(np.array([{}, []], dtype=object), allow_pickle=True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_made_anew(tmp_path, kind):
    path, batches = tmp_path / "kept.npy", batches_of()
    cached(batches.rows, range(60), LogpStore(path), Computing())
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[kind](whole))
    got, fill = cached(batches.rows, range(60), LogpStore(path), Computing())
    assert fill.computed == 60
    assert torch.equal(got(batches.rows.assemble(range(60))), expected(range(60)))
    assert len(LogpStore(path).known) == 60


def test_no_byte_of_the_header_can_be_changed_so_that_reading_fails(tmp_path):
    path, chance = tmp_path / "kept.npy", random.Random(0)
    cached(batches_of().rows, range(3), LogpStore(path), Computing())
    whole = path.read_bytes()
    for at in range(128):
        for byte in (whole[at] ^ 1, whole[at] ^ 32, ord("("), ord("'"), 0, chance.randrange(256)):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            assert len(LogpStore(path).known) <= 3


def test_a_cache_that_cannot_be_written_is_no_error(tiny_directory, tmp_path, monkeypatch, calls):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    for name in ("first", "second"):
        done = run(tiny_directory, tmp_path / name)
        assert done.status["state"] == "finished"
        assert told(done)["computed"] == told(done)["pairs"]
    assert (tmp_path / "file").read_text() == "not a directory"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, batches = tmp_path / "kept.npy", batches_of()
    cached(batches.rows, range(20), LogpStore(path), Computing())
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    got, fill = cached(batches.rows, range(60), LogpStore(path), Computing())
    assert fill.computed == 40
    assert torch.equal(got(batches.rows.assemble(range(60))), expected(range(60)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["kept.npy"]
