"""Recording work as a CUDA graph: what `capture` asks of torch, with a stand-in for the card; tests/test_gpu.py has a real one."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

import taped
from tunesmith import capture as module
from tunesmith.capture import capture, reason_of

CARD, POOL = torch.device("cuda:1"), (0, 7)


class Card:
    """What `capture` calls of torch, noted. fails: where it breaks off, in the work, at the beginning of the recording or
    at the end of it; or `always` at its end, also where nothing is recorded."""

    def __init__(self, monkeypatch, fails=""):
        self.calls, self.fails, whole = [], fails, fails in ("", "work")

        def pool():
            if not whole:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

        own = SimpleNamespace(wait_stream=lambda other: self.calls.append("own after the current"))
        current = SimpleNamespace(wait_stream=lambda other: self.calls.append("the current after own"))
        graph_of = lambda: SimpleNamespace(replay=lambda: self.calls.append("replay"), pool=pool)  # noqa: E731

        @contextlib.contextmanager
        def recording(graph, pool, stream, capture_error_mode):
            assert (stream, capture_error_mode) == (own, "thread_local")
            assert pool in (POOL, None)
            self.calls.append("begin" if pool else "begin with nothing")
            if fails == "begin" and pool:
                raise RuntimeError("operation not permitted")
            try:
                yield
            finally:
                self.calls.append("end")
                if fails == "always" or (fails == "end" and pool):
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                if not pool:
                    warnings.warn("The CUDA Graph is empty.", stacklevel=1)

        fakes = {
            "Stream": lambda device: own, "CUDAGraph": graph_of, "graph": recording,
            "device": lambda device: contextlib.nullcontext(), "current_stream": lambda device: current,
            "stream": self.stream, "current_device": lambda: 1,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("endAllocateToPool", "releasePool"):
            note = lambda device, pool, name=name: self.calls.append((name, device, pool))  # noqa: E731
            monkeypatch.setattr(torch._C, f"_cuda_{name}", note, raising=False)

    @contextlib.contextmanager
    def stream(self, stream):
        try:
            yield
        finally:
            self.calls.append("back to where it was")

    def work(self):
        self.calls.append("work")
        if self.fails:
            raise RuntimeError("operation not permitted")
        return "seen"


@pytest.fixture(autouse=True)
def _no_stream_is_remembered():
    module._stream.cache_clear()
    yield
    module._stream.cache_clear()


@pytest.mark.parametrize("rehearse", [False, True])
def test_on_a_card_work_is_recorded_once_and_replayed_without_python(monkeypatch, rehearse):
    card = Card(monkeypatch)
    replay = capture(card.work, CARD, POOL, rehearse=rehearse)
    assert [replay(), replay()] == ["seen", "seen"]
    before = ["own after the current", *["work"] * rehearse]
    after = ["the current after own", "back to where it was"]
    assert card.calls == [*before, "begin", "work", "end", *after, "replay", "replay"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fails", ["work", "begin", "end", "always"])
def test_a_recording_that_breaks_off_gives_its_memory_back_once_and_then_the_generator(monkeypatch, fails):
    """By one that holds nothing, about which torch's remark is not the user's concern."""
    card = Card(monkeypatch, fails)
    with pytest.raises(RuntimeError) as caught:
        capture(card.work, CARD, POOL, rehearse=False)
    memory = [("endAllocateToPool", 1, POOL), ("releasePool", 1, POOL)]
    left = [] if fails == "work" else [*memory, "begin with nothing", "end"]
    tried = ["begin"] if fails == "begin" else ["begin", "work", "end"]
    after = ["the current after own", "back to where it was"]
    assert card.calls == ["own after the current", *tried, *left, *after]
    assert reason_of(caught.value) == "operation not permitted", "what the user is told"


def test_work_that_fails_before_it_is_recorded_leaves_the_pool_to_other_recordings(monkeypatch):
    card = Card(monkeypatch, "end")
    with pytest.raises(RuntimeError, match="operation not permitted"):
        capture(card.work, CARD, POOL, rehearse=True)
    assert card.calls == ["own after the current", "work", "the current after own", "back to where it was"]


def waits():
    torch.rand(3).sum().item()


def test_after_a_recording_that_waited_numbers_are_drawn_as_if_it_had_never_begun(monkeypatch):
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    with taped.Card(monkeypatch) as card:
        with pytest.raises(RuntimeError, match="previous error during capture") as caught:
            card.record(waits)
        assert torch.equal(torch.rand(2), expected)
    assert reason_of(caught.value) == "operation not permitted when stream is capturing"


def test_a_recording_from_before_one_that_waited_can_still_be_replayed(monkeypatch):
    with taped.Card(monkeypatch) as card:
        replay = card.record(lambda: torch.rand(2))
        with pytest.raises(RuntimeError):
            card.record(waits)
        torch.manual_seed(4)
        drawn = replay().clone()
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(2))
