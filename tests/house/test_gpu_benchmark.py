"""The benchmark of a GPU, as far as a CPU can tell: that it runs, what it counts, and how it takes failures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference import random_model
from tunesmith.data.batch import Batch
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.train.token_loss import nll_sum

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=300, block_size=64)


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    import gpu

    return gpu


def window(tokens, targets):
    ids = torch.randint(0, 300, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.arange(targets), ids[0, :targets].clone())


@pytest.mark.long
def test_it_runs_on_a_cpu_and_its_result_makes_a_table(tmp_path):
    out = tmp_path / "gpu.json"
    command = ["--device", "cpu", "--tiny", "--minutes", "90", "--only"]
    command += ["matrix", "SFT packed, batch 1", "CUDA graph, not", "LoRA rank 1, bf16", "DPO, all"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *command, "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    graph = "paper's protocol as a CUDA graph, not compiled"
    names = [
        "matrix products",
        "SFT packed, batch 1",
        "DPO, all weights",
        "LoRA rank 1, bf16 base, checkpointing",
        graph,
    ]
    assert [row["part"] for row in result["parts"]] == names
    assert not [row for row in result["parts"] if "note" in row]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == result["parts"]
    _, packed, dpo, lora, recorded = result["parts"]
    assert 0 < packed["share_of_ceiling"] <= 1
    assert 0 < packed["supervised_share"] < 1
    assert recorded["supervised_share"] == lora["supervised_share"] == 1, "windows carry loss on every token"
    assert recorded["minutes"] > 0
    assert all(row["tokens_per_s"] > 0 and row["peak_gb"] > 0 for row in (packed, recorded, lora, dpo))
    assert dpo["first_loss"] == pytest.approx(0.693, abs=1e-3)
    made = subprocess.run(
        [sys.executable, str(BENCHMARKS / "table.py"), str(out)], capture_output=True, text=True, check=True
    )
    lines = made.stdout.splitlines()
    assert len(lines) == 2 + len(names)
    assert all(name in line for name, line in zip(names, lines[2:], strict=True))


def test_operations_are_those_that_torch_counts(benchmark, monkeypatch):
    from tunesmith.models import linear

    monkeypatch.setattr(linear, "_has_onednn", lambda: False)  # the counter knows torch's own products
    model = random_model(SHAPE).train()
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **_more: 2 * a[0] * a[1] * b[1]}  # which it leaves out
    for tokens, targets in ((24, 24), (24, 10)):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            nll_sum(model, window(tokens, targets)).backward()
        counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
        assert benchmark.products(SHAPE, tokens, targets) == counted
    own = benchmark.products(SHAPE, 24, 24, window=24) - benchmark.products(SHAPE, 24, 24)
    assert own == 3 * SHAPE.n_layer * 24 * (24 / 2) * 2 * 2 * SHAPE.n_embd, "each token meets half of the window, twice"


def test_targets_are_judged_and_shares_are_of_the_ceiling(benchmark):
    part = benchmark.Part("p", "sft", target=("peak_gb", "<=", 5))
    row = benchmark.judged(part, {"peak_gb": 5.1, "tflop_per_s": 300.0}, 600.0)
    assert (row["reached"], row["share_of_ceiling"], row["target"]) == (False, 0.5, "peak gb <= 5")
    part = benchmark.Part("p", "sft", target=("share_of_ceiling", ">=", 0.5))
    assert benchmark.judged(part, {"tflop_per_s": 300.0}, 600.0)["reached"] is True
    assert "reached" not in benchmark.judged(part, {"note": "failed"}, 600.0)


def test_a_part_that_fails_and_a_time_that_is_up_are_notes(benchmark, tmp_path):
    at = benchmark.Setting(tmp_path, "cpu", True)
    unknown = benchmark.Part("no such part", "sft", target=("peak_gb", "<=", 5))
    (failed,) = benchmark.run_all([unknown], at, 10.0)
    assert failed["note"].startswith("failed: StopIteration")
    (late,) = benchmark.run_all([unknown], at, 0.1)
    assert late == {"part": "no such part", "note": "not run: the time was up", "target": "peak gb <= 5"}
    assert "stopped after 0" in benchmark.measured(unknown, at, 0.01)["note"]


@pytest.fixture
def timed(benchmark, monkeypatch, tmp_path):
    """Runs all parts where each takes the seconds that `takes` says, cut at what it is given. (part, seconds given)."""

    def run(chosen, seconds, takes):
        now, given = [0.0], []

        def measured(part, at, limit):
            now[0] += min(takes(part), limit)
            given.append((part, limit))
            return {}

        monkeypatch.setattr(benchmark.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(benchmark, "measured", measured)
        rows = list(benchmark.run_all(chosen, benchmark.Setting(tmp_path, "cuda", False), seconds / 60))
        return given, rows, now[0]

    return run


def test_every_part_has_its_turn_though_all_before_it_hang(benchmark, timed):
    chosen, seconds = benchmark.parts(tiny=False), 60 * benchmark.MINUTES - 25  # for imports and the model
    given, rows, took = timed(chosen, seconds, lambda part: 10_000)
    assert [part for part, _ in given] == chosen
    assert all(limit >= part.share for part, limit in given)
    assert not any("note" in row for row in rows)
    assert took == pytest.approx(seconds)


def test_what_fast_parts_leave_goes_to_slow_ones_up_to_their_limit(benchmark, timed):
    chosen = [benchmark.Part(str(i), "sft", share=20, limit=60) for i in range(4)]
    given, rows, _ = timed(chosen, 100, lambda part: 5 if part.name in "01" else 90)
    assert [limit for _, limit in given] == [40, 55, 60, 30]
    given, rows, _ = timed(chosen, 70, lambda part: 90)
    assert [limit for _, limit in given] == [20, 20, 20]
    assert rows[-1]["note"] == "not run: the time was up"


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rival_is_measured(benchmark, tmp_path, rank):
    """Its steps are seen, and tokens are counted without padding."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    benchmark.save_model(tmp_path, tiny=True)
    found = benchmark.trl(benchmark.Setting(tmp_path, "cpu", True), rank=rank, batch_size=1)
    assert found["steps"] == 2
    assert 0 < found["tokens_per_s"] < 1e6


def test_a_reason_that_holds_a_bar_stays_in_its_cell(benchmark):
    import table

    row = {"part": "TRL", "note": "failed: a | b", "target": "peak gb <= 2"}
    assert table.gpu_table({"device": "card", "parts": [row]}).splitlines()[-1] == (
        r"| TRL | failed: a \| b | | | | peak gb <= 2 |"
    )


def test_every_target_of_the_issue_is_a_part(benchmark):
    wanted = {p.target for p in benchmark.parts(tiny=False) if p.target}
    memory = {("peak_gb", "<=", gb) for gb in (5, 2.5, 1.6, 6, 2)}
    assert wanted == memory | {("share_of_ceiling", ">=", 0.5), ("minutes", "<=", 16)}
    assert len({p.name for p in benchmark.parts(tiny=False)}) == len(benchmark.parts(tiny=False))
