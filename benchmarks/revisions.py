"""Is this revision as fast as another one? Both do the same steps in turn, one waiting while the other computes.

    git worktree add ../before REVISION
    python benchmarks/revisions.py ../before . --out benchmarks/results

Each tree runs in a process of its own and is let go for one training step (or one batch of answers) at a time, so that
whatever else the machine does falls on both alike; which of the two begins changes from pair to pair. Where a process happens
to lie in memory makes it some percent faster or slower for as long as it lives, so every round starts two new ones. Printed
are the ratio of the times, before over after (above 1: faster now), as the mean over the rounds with a 95 % interval, and
whether the losses and answers are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import write_result
from tunesmith.stats import t_interval

WORKER = """
import json, sys, time
from tunesmith.files.run import RunLog

def turn(result):
    print("TURN " + json.dumps(result), flush=True)
    if not sys.stdin.readline():
        sys.exit()
    return time.perf_counter()

began = None
def record(self, event, step, **values):
    global began
    if event == "train":
        began = turn([time.perf_counter() - began if began else 0.0, values["loss"]])
    return plain(self, event, step, **values)

plain, RunLog.record = RunLog.record, record
job, out = json.loads(sys.argv[1]), sys.argv[2]
if job[0] == "answers":
    import tunesmith as ts
    model, tokenizer = ts.load("sample")
    prompts = [[{"role": "user", "content": "why " * n}] for n in range(1, 17)]
    began = turn([0.0, ""])
    while True:
        answers = ts.generate(model, tokenizer, prompts, max_new_tokens=24, seed=1)
        began = turn([time.perf_counter() - began, str(answers)])
from tunesmith.__main__ import main
sys.exit(main([*job, "--out", out]))
"""
SMALL = ["--model.name", "sample", "--data.name", "sample", "--data.block_size", "512", "--train.precision", "fp32"]
STEPS_ONLY = (
    "--eval.at_start false --eval.every 100000 --eval.iters 1 --checkpoint.every 100000 --train.diverge_after 0"
)
ALONE = STEPS_ONLY.split()
JOBS = {
    "sft": ["sft", *SMALL, *ALONE],
    "sft-lora": ["sft", *SMALL, *ALONE, "--lora.rank", "8"],
    "sft-gpt2": ["sft", "--model.name", "gpt2", "--model.init", "random", *SMALL[2:], *ALONE],
    "reward": ["reward", *SMALL, *ALONE],
    "dpo": ["dpo", *SMALL, *ALONE, "--data.max_rows", "300"],
    "answers": ["answers"],
}


class Tree:
    """A source tree's process, which waits until it is let go for one step."""

    def __init__(self, tree: Path, job: list[str], out: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src")}
        command = [sys.executable, "-c", WORKER, json.dumps(job), str(out)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.waits()

    def waits(self) -> tuple[float, Any]:
        """Seconds of the step that ends now, and its loss or answers."""
        assert self.process.stdout
        assert self.process.stderr
        for line in self.process.stdout:
            if line.startswith("TURN "):
                seconds, result = json.loads(line[5:])
                return seconds, result
        raise SystemExit(self.process.stderr.read()[-3000:])

    def step(self) -> tuple[float, Any]:
        """Let it go for one step."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.waits()


def compared(job: list[str], trees: tuple[Path, Path], pairs: int, warmup: int) -> tuple[float, bool]:
    """The ratio of the times of one round's pairs of steps, and whether the results were equal."""
    steps = [] if job == ["answers"] else ["--train.steps", str(pairs + warmup + 2), "--train.device", "cpu"]
    with tempfile.TemporaryDirectory() as work:
        before, after = (Tree(tree, [*job, *steps], Path(work) / str(i)) for i, tree in enumerate(trees))
        seconds: dict[Tree, list[float]] = {before: [], after: []}
        equal = True
        for pair in range(pairs + warmup):
            results = {tree: tree.step() for tree in ((before, after) if pair % 2 else (after, before))}
            equal &= results[before][1] == results[after][1]
            for tree, (time_taken, _) in results.items():
                seconds[tree].append(time_taken)
        for tree in (before, after):
            tree.process.kill()
            tree.process.wait()
    return sum(seconds[before][warmup:]) / sum(seconds[after][warmup:]), equal


def summarised(rounds: list[tuple[float, bool]]) -> dict[str, Any]:
    """Mean ratio of the rounds, its 95 % interval, and whether every result was equal."""
    ratios = [ratio for ratio, _ in rounds]
    interval = t_interval(ratios)
    return {
        "ratio": round(sum(ratios) / len(ratios), 4),
        "low": None if interval.low is None else round(interval.low, 4),
        "high": None if interval.high is None else round(interval.high, 4),
        "equal": all(equal for _, equal in rounds),
        "rounds": [round(ratio, 4) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=6, help="of steps in a round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=JOBS, default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.only or JOBS:
        began = time.perf_counter()
        trees = (args.before, args.after)
        row = summarised([compared(JOBS[name], trees, args.pairs, args.warmup) for _ in range(args.rounds)])
        rows.append({"name": name, **row})
        print(
            f"{name:10} before / after {row['ratio']:.3f} ({row['low']} to {row['high']}), results "
            f"{'equal' if row['equal'] else 'DIFFER'}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if args.out:
        write_result(
            args.out / "revisions-2core.json",
            {"rounds": args.rounds, "pairs": args.pairs, "warmup": args.warmup},
            rows,
            {},
        )


if __name__ == "__main__":
    main()
