"""Micro-batches made ahead: the same ones, errors with their place, and a thread that always ends."""

import os
import signal
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

import tunesmith as ts
from tiny_runs import comparable, last_digest, tiny_config
from tunesmith.data.epochs import Batches
from tunesmith.models.attention import Documents
from tunesmith.options.training import DPOConfig
from tunesmith.train import launch, prefetch
from tunesmith.train.prefetch import AHEAD, Prefetch, made_ahead, tensors_of

CPU = torch.device("cpu")


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("tunesmith-prefetch")]


@pytest.fixture
def forced(monkeypatch):
    """Runs on the CPU make their batches ahead, as those on a GPU do; afterwards no thread is left."""
    monkeypatch.setattr(prefetch, "AHEAD_ON", ("cpu",))
    yield
    assert not threads()


def test_numbers_give_their_own_batch_in_any_order_and_none_is_made_twice_in_a_row_of_them():
    made = []
    with_thread = Prefetch(lambda i: made.append(i) or 10 * i, CPU)
    asked = [0, 1, 2, 3, 7, 8, 2, 2, 3]
    assert [with_thread(i) for i in asked] == [10 * i for i in asked]
    with_thread.close()
    assert made[:4] == [0, 1, 2, 3]
    assert {7, 8, 2} <= set(made[4:])


def test_the_next_ones_are_made_while_nobody_asks():
    made, enough = [], threading.Event()

    def make(i):
        made.append((i, threading.current_thread().name))
        if i == 5 + AHEAD:
            enough.set()
        return i

    with_thread = Prefetch(make, CPU)
    assert with_thread(5) == 5
    assert enough.wait(10)
    with_thread.close()
    assert [i for i, _ in made] == [5 + i for i in range(AHEAD + 1)], "so many and no more"
    assert all(name.startswith("tunesmith-prefetch") for _, name in made)


def test_an_error_comes_out_where_its_number_is_asked_for_with_the_place_it_came_from():
    def reads_a_broken_row(i):
        if i == 2:
            raise ValueError("row 2 is broken")
        return i

    with_thread = Prefetch(reads_a_broken_row, CPU)
    assert [with_thread(0), with_thread(1)] == [0, 1]
    with pytest.raises(ValueError, match="row 2 is broken") as caught:
        with_thread(2)
    assert "reads_a_broken_row" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert with_thread(3) == 3
    with_thread.close()
    assert not threads()


def test_a_block_left_by_ctrl_c_waits_for_the_batch_at_hand_and_makes_no_other(forced):
    begun, made = threading.Event(), []

    def slow(i):
        begun.set()
        time.sleep(0.2)
        made.append(i)

    def leave():
        with made_ahead(slow, CPU) as batch:
            batch._order(0)
            batch._order(1)
            assert begun.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert made == [0]
    assert not threads()


def test_on_a_cpu_batches_are_made_in_line():
    make = SimpleNamespace  # anything that can be called
    with made_ahead(make, CPU) as batch:
        assert batch is make
        assert not threads()


def test_every_tensor_of_a_batch_is_found():
    documents = Documents.from_rows([[3, 1, 2]], parents=[-1, 0, 0])
    batch = SimpleNamespace(input_ids=torch.zeros(1, 6), documents=documents, tokens=6, sources=(1, 2), nothing=None)
    found = {id(t) for t in tensors_of(batch)}
    own = (documents.positions, documents.cu_seqlens, documents.key_index, documents.cu_keys)
    assert found == {id(t) for t in (batch.input_ids, *own)}


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"data__batching": "windows", "train__accumulate": 3}, {"kind": DPOConfig}], ids=str
)
def test_a_run_with_batches_made_ahead_is_the_same_run(tiny_directory, tmp_path, monkeypatch, options):
    command = ts.dpo if "kind" in options else ts.sft
    plain = command(tiny_config(tiny_directory, tmp_path / "plain", **options))
    monkeypatch.setattr(prefetch, "AHEAD_ON", ("cpu",))
    ahead = command(tiny_config(tiny_directory, tmp_path / "ahead", **options))
    told = [[line for line in comparable(run) if line["event"] != "reference"] for run in (ahead, plain)]
    assert told[0] == told[1]  # (the second run finds the reference of the first)
    assert last_digest(ahead) == last_digest(plain)
    assert not threads()


def test_a_resumed_run_goes_on_at_its_own_batch(tiny_directory, tmp_path, forced):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole"))
    ts.sft(tiny_config(tiny_directory, tmp_path / "parts", train__steps=3))
    parts = ts.sft(tiny_config(tiny_directory, tmp_path / "parts", resume=True))
    assert last_digest(parts) == last_digest(whole)
    assert comparable(parts)[-1] == comparable(whole)[-1]


def test_a_signal_stops_the_run_and_its_thread(tiny_directory, tmp_path, forced, monkeypatch):
    step, calls = launch.optimizer_step, []

    def stepping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(launch, "optimizer_step", stepping)
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r"))
    assert (run.status["state"], run.status["step"]) == ("stopped", 2)


def test_an_error_in_the_thread_ends_the_run_as_failed(tiny_directory, tmp_path, forced, monkeypatch):
    assemble = Batches.__getitem__

    def broken(self, index):
        if index == 3:
            raise RuntimeError("this pair cannot be read")
        return assemble(self, index)

    monkeypatch.setattr(Batches, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="cannot be read"):
        ts.dpo(tiny_config(tiny_directory, tmp_path / "r", DPOConfig))
    status = ts.Run(tmp_path / "r").status
    assert (status["state"], status["step"]) == ("failed", 3)
    assert "cannot be read" in status["reason"]
