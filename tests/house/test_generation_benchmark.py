"""The benchmark of generation runs with one command; what it counts, counted otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference import greedy, random_model
from tunesmith.models.gpt2 import GPTConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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


@pytest.mark.long
def test_quick_run_writes_a_result_with_the_same_tokens_and_the_machines_limit(tmp_path):
    pytest.importorskip("transformers")
    rivals = ["transformers, tuned", "transformers, tuned, static cache"]
    command = ["--quick", "--task", "batch", "--only", *rivals, "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "generation.py"), *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "transformers, tuned" in done.stdout
    (file,) = tmp_path.glob("generation-batch-small-*core.json")
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["summary"]] == ["tunesmith", *rivals]
    assert all(found["equal"] == found["rows"] == 3 for found in result["same_tokens"].values())
    assert result["limit"]["share_of_floor"] > 0
    assert result["limit"]["floor_tokens_per_s"] > 0
    assert all(run["tokens"] == 12 for runs in result["runs"].values() for run in runs)


def test_bytes_and_operations_of_a_run_are_those_of_the_model(benchmark, model, monkeypatch):
    """Answers of 3, 1 and 2 tokens, two prompts at a time: passes over 8, 4 tokens' keys, 1 prompt and 2 tokens."""
    from tunesmith.models import linear

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


@pytest.mark.long
def test_a_gpus_contestants_answer_alike_where_there_is_none(benchmark, tmp_path, monkeypatch):
    """Each in this process and on the processor: with recorded steps, without, and transformers' own three ways."""
    pytest.importorskip("transformers")
    from tunesmith.generation import token_graph

    monkeypatch.setattr(token_graph, "recorder", token_graph.recorder)  # one contestant takes it away
    monkeypatch.setattr(sys.modules["tunesmith.device"], "keep_freed_memory", lambda: False)  # as this process has it
    benchmark.save_weights(tmp_path, "small")
    prompts, found = [[1, 2, 3], [4, 5, 6, 7, 8]], {}
    assert benchmark.contestants("batch", "cuda") is benchmark.contestants("alone", "cuda")
    for name, (run, tuned) in benchmark.contestants("alone", "cuda").items():
        found[name] = run(tmp_path, prompts, 5, 1, tuned, "cpu")
    assert all(len(row) == 5 for row in found["tunesmith"]["rows"])
    assert all(result["rows"] == found["tunesmith"]["rows"] for result in found.values())
    assert token_graph.recorder(torch.device("cuda"), 1000) is None  # the one without
    assert found["tunesmith"]["read_gb_per_s"] > 0


def test_a_device_that_is_not_there_is_told_in_a_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(BENCHMARKS / "generation.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--device cuda is not available here" in done.stderr
    assert "Traceback" not in done.stderr
