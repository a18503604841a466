"""Ten steps of every training and greedy answers, as numbers that a refactoring must leave equal to the bit.

    python tools/trajectories.py before.json      # on the revision before
    python tools/trajectories.py after.json       # after the last commit, on the same machine
    cmp before.json after.json

Everything goes through the command line and `ts.generate`, so that the script runs unchanged on revisions whose modules lie elsewhere.
The embedded model and dialogues, a CPU, fp32, one thread. Floats are written by their shortest exact decimal, weights as their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SAMPLE = ["--model.name", "sample", "--data.name", "sample"]
SHORT = [
    "--train.steps",
    "10",
    "--train.batch_size",
    "2",
    "--data.block_size",
    "256",
    "--train.device",
    "cpu",
    "--train.precision",
    "fp32",
]
EVALUATE = ["--eval.every", "5", "--eval.iters", "4"]
SHAPE = [
    "--model.n_layer",
    "2",
    "--model.n_head",
    "2",
    "--model.n_embd",
    "64",
    "--model.block_size",
    "256",
    "--tokenizer.vocab_size",
    "512",
]
TRAININGS = {  # name: arguments
    "sft": ["sft", *SAMPLE, "--train.accumulate", "2"],
    "sft-windows": ["sft", *SAMPLE, "--data.batching", "windows", "--optimizer.name", "sgd-nesterov"],
    "sft-padded": ["sft", *SAMPLE, "--data.batching", "padded", "--train.activation_checkpointing", "selective"],
    "lora": ["sft", *SAMPLE, "--lora.rank", "8", "--lora.dropout", "0.1"],
    "reward": ["reward", *SAMPLE],
    "reward-lora": ["reward", *SAMPLE, "--lora.rank", "4"],
    "dpo": ["dpo", *SAMPLE],
    "dpo-lora": ["dpo", *SAMPLE, "--lora.rank", "8", "--dpo.loss", "ipo"],
    "pretrain": ["pretrain", "--data.name", "sample", *SHAPE],
}  # fmt: skip
MODELS = ("sample", "sft", "lora", "dpo")
TIMES = ("time", "tokens_per_s", "peak_memory_gb")  # what differs from run to run
ANSWER = """
import json, sys, tunesmith as ts
questions = ["Hello, who are you?", "How do I bake bread?", "What is the capital of France?", "Tell me a joke."]
prompts = [[{"role": "user", "content": q}] for q in questions]
answers = {}
for name, path in json.loads(sys.argv[1]).items():
    model, tokenizer = ts.load(path, device="cpu")
    answers[name] = [
        *ts.generate(model, tokenizer, prompts, max_new_tokens=40, temperature=0),
        *ts.generate(model, tokenizer, prompts[:2], max_new_tokens=40, seed=7),
    ]
print(json.dumps(answers))
"""


def command(*arguments: str, cache: Path) -> str:
    """Standard output of a Python process with one thread, whose cache holds nothing of earlier runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TUNESMITH_CACHE": str(cache)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:4])} ... failed:\n{done.stderr[-2000:]}")
    return done.stdout


def train(arguments: list[str], out: Path) -> dict[str, Any]:
    """Every number that a run logged but its times, and the hash of each weight file that it wrote."""
    command("-m", "tunesmith", *arguments, *SHORT, *EVALUATE, "--out", str(out), cache=out.parent / "cache")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    weights = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("checkpoints/*/**/*.safetensors"))
    }
    return {"events": events, "weights": weights}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"expected the file to write; usage:\n{__doc__}")
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        for name, arguments in TRAININGS.items():
            record[name] = train(arguments, runs / name)
            losses = [event["loss"] for event in record[name]["events"] if event["event"] == "train"]
            print(f"{name}: {' '.join(f'{loss:.6f}' for loss in losses)}", flush=True)
        cache = runs / "cache"
        paths = {name: name if name == "sample" else str(runs / name) for name in MODELS}
        record["answers"] = json.loads(command("-c", ANSWER, json.dumps(paths), cache=cache))
        scores = runs / "scores"
        models = ["sample", paths["sft"], "--reward", str(runs / "reward"), "--limit", "6", "--out", str(scores)]
        command("-m", "tunesmith", "score", *models, cache=cache)
        found = json.loads((scores / "scores.json").read_text(encoding="utf-8"))
        record["score"] = json.loads(json.dumps(found).replace(folder, "RUNS"))
        evaluated = command("-m", "tunesmith", "evaluate", paths["dpo"], "sample", cache=cache)
        record["evaluate"] = evaluated.replace(folder, "RUNS")
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
