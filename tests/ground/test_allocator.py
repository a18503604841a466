"""What a CPU's allocator does with freed memory: `--train.allocator`."""

import subprocess
import sys

import pytest
import torch

import tunesmith as ts
from tiny_runs import tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.device import keep_freed_memory, resident_memory
from tunesmith.errors import UsageError
from tunesmith.train import resolve

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")

KEPT_AFTER = """
import sys, torch
from tunesmith.device import keep_freed_memory, resident_memory, return_memory_at_once
for name in sys.argv[1:]:
    {"fast": keep_freed_memory, "lean": return_memory_at_once}[name]()
before = resident_memory()
several, small = [], []  # on a heap small ones lie between the others, whose places cannot just be cut off at its end
for _ in range(10):
    several.append(torch.ones(4_000_000))
    small.append(torch.ones(30_000))
held = resident_memory() - before
del several
print(held / 1e6, (resident_memory() - before) / 1e6)
"""


@linux
@pytest.mark.parametrize(
    ("asked", "kept"), [(["fast"], True), (["lean"], False), (["fast", "lean"], False), (["lean", "fast"], True)]
)
def test_what_is_freed_is_kept_or_goes_back_at_once(asked, kept):
    done = subprocess.run([sys.executable, "-c", KEPT_AFTER, *asked], capture_output=True, text=True, check=True)
    held, left = map(float, done.stdout.split())
    assert held > 155  # 10 x 16 MB
    assert left > 120 if kept else left < 10


def left_after_freeing():
    """Bytes that stay in memory when a tensor of 64 MB is gone."""
    before = resident_memory()
    torch.ones(16_000_000)
    return resident_memory() - before


@linux
def test_a_lean_training_is_the_fast_one_to_the_bit(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # which a lean training sets: undone when this test ends
    losses = []
    try:
        for allocator in ("fast", "lean"):
            config = tiny_config(tiny_directory, tmp_path / allocator, train__steps=3, train__allocator=allocator)
            losses.append(train_losses(ts.sft(config)))
        assert left_after_freeing() < 1e6
    finally:
        keep_freed_memory()  # for the tests after this one
    assert losses[0] == losses[1]


def test_where_the_allocator_stays_as_it_is_lean_is_refused(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_ALLOCATOR", "system")
    with pytest.raises(UsageError, match=r"--train\.allocator lean needs glibc.*TUNESMITH_ALLOCATOR"):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", train__allocator="lean"))
    assert not (tmp_path / "r").exists()


def test_there_a_plan_neither_takes_it_nor_offers_it(monkeypatch, capsys):
    monkeypatch.setenv("TUNESMITH_ALLOCATOR", "system")
    asked = ["plan", "--model.name", "gpt2", "--device", "cpu", "--train.precision", "fp32"]
    assert main([*asked, "--train.allocator", "lean"]) == 2
    assert "--train.allocator lean needs glibc" in capsys.readouterr().err
    assert main([*asked, "--fit", "1GB"]) == 1
    told = capsys.readouterr().err
    assert "nothing fits" in told
    assert "allocator" not in told


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_on_a_gpu_it_is_refused_with_the_reason(device, tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "resolve_device", lambda name: torch.device(device))
    with pytest.raises(UsageError, match=rf"--train\.allocator lean is for a CPU's memory.*{device}.*leave it out"):
        resolve.resolve_machine(tiny_config(tiny_directory, tmp_path, train__allocator="lean"), 48, 1e-4)


def test_so_it_is_in_a_plan_for_a_card(capsys):
    assert main(["plan", "--model.name", "sample", "--train.allocator", "lean", "--device", "h100"]) == 2
    assert "--train.allocator lean is for a CPU's memory, not for h100" in capsys.readouterr().err
