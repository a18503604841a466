"""The benchmark of generation runs with one command; what it counts, counted otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference import greedy, random_model
from tunesmith.gpt import GPTConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=300, block_size=64)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    import generation

    return generation


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPE)


def test_quick_run_writes_a_result_with_the_same_tokens_and_the_machines_limit(tmp_path):
    pytest.importorskip("transformers")
    command = ["--quick", "--task", "batch", "--only", "transformers, tuned", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "generation.py"), *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "transformers, tuned" in done.stdout
    (file,) = tmp_path.glob("generation-batch-small-*core.json")
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["summary"]] == ["tunesmith", "transformers, tuned"]
    assert all(found["equal"] == found["rows"] == 3 for found in result["same_tokens"].values())
    assert result["limit"]["share_of_floor"] > 0
    assert result["limit"]["floor_tokens_per_s"] > 0
    assert all(run["tokens"] == 12 for runs in result["runs"].values() for run in runs)


def test_bytes_and_operations_of_a_run_are_those_of_the_model(benchmark, model, monkeypatch):
    """Answers of 3, 1 and 2 tokens, two prompts at a time: passes over 8, 4 tokens' keys, 1 prompt and 2 tokens."""
    from tunesmith import linear

    passes = benchmark.steps(SHAPE, PROMPTS, [[0] * 3, [0], [0] * 2], 2)
    linears = [m.weight.numel() for m in model.modules() if isinstance(m, linear.Linear)]
    held = 2 * SHAPE.n_layer * SHAPE.n_embd * 4
    assert [size for size, _ in passes] == [4 * sum(linears) + held * n for n in (0, 4, 5, 0, 2)]
    monkeypatch.setattr(linear, "_has_onednn", lambda: False)  # the counter knows torch's own product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.lm_head(model(torch.ones(1, 1, dtype=torch.int64)))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert passes[1][1] == products
    assert passes[0][1] == 8 * products - 6 * 2 * linears[-1]  # the head after 2 of 8 tokens only


def test_answers_that_differ_are_counted_with_their_distance(benchmark, model):
    ours = [greedy(model, p, 4, -1) for p in PROMPTS]
    changed = [row.copy() for row in ours]
    changed[1][2] = (ours[1][2] + 1) % 300
    logits = model.lm_head(model(torch.tensor([PROMPTS[1] + ours[1][:2]])))[0, -1].detach()
    gap = float(logits.max() - logits[changed[1][2]])
    found = {"tunesmith": [{"rows": ours}], "other": [{"rows": ours}, {"rows": changed}]}
    agreement = benchmark.same_tokens(model, PROMPTS, found)
    assert agreement["tunesmith"] == {"rows": 3, "equal": 3, "largest_gap": 0.0}
    assert agreement["other"] == {"rows": 3, "equal": 2, "largest_gap": pytest.approx(gap, rel=1e-4)}
    assert gap > 0
