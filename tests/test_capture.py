"""Recording work as a CUDA graph: what `capture` asks of torch, with a stand-in for the card; tests/test_gpu.py has a real one."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tunesmith import capture as module
from tunesmith.capture import capture, reason_of

CARD, POOL = torch.device("cuda:1"), (0, 7)


class Card:
    """What `capture` calls of torch, noted. fails: where it breaks off, in the work or at the end of the recording."""

    def __init__(self, monkeypatch, fails=""):
        self.calls, self.fails, whole = [], fails, fails != "end"

        def pool():
            if not whole:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

        own = SimpleNamespace(wait_stream=lambda other: self.calls.append("own after the current"))
        current = SimpleNamespace(wait_stream=lambda other: self.calls.append("the current after own"))
        graph_of = lambda: SimpleNamespace(replay=lambda: self.calls.append("replay"), pool=pool)  # noqa: E731

        @contextlib.contextmanager
        def recording(graph, pool, stream, capture_error_mode):
            assert (pool, stream, capture_error_mode) == (POOL, own, "thread_local")
            self.calls.append("begin")
            try:
                yield
            finally:
                self.calls.append("end")
                if not whole:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

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


@pytest.mark.parametrize("fails", ["work", "end"])
def test_a_recording_that_breaks_off_gives_its_memory_back_once(monkeypatch, fails):
    card = Card(monkeypatch, fails)
    with pytest.raises(RuntimeError) as caught:
        capture(card.work, CARD, POOL, rehearse=False)
    left = [("endAllocateToPool", 1, POOL), ("releasePool", 1, POOL)] if fails == "end" else []
    after = ["the current after own", "back to where it was"]
    assert card.calls == ["own after the current", "begin", "work", "end", *left, *after]
    assert reason_of(caught.value) == "operation not permitted", "what the user is told"


def test_work_that_fails_before_it_is_recorded_leaves_the_pool_to_other_recordings(monkeypatch):
    card = Card(monkeypatch, "end")
    with pytest.raises(RuntimeError, match="operation not permitted"):
        capture(card.work, CARD, POOL, rehearse=True)
    assert card.calls == ["own after the current", "work", "the current after own", "back to where it was"]
