"""Tokenising against the Rust tokenizer's own batch rate, and how soon a second start reaches its first step.

    python benchmarks/data.py --root DIR_OF_HH_RLHF [--copies 20] [--out benchmarks/results/data-NAME.json]

The rows are real dialogues, repeated with a number in front so that no two are equal. The tokenizer's own rate is that
of `encode_batch_fast` on the whole texts, rows to Encoding objects, nothing else; ours reads and parses the JSON lines,
encodes, marks the targets and writes the memory-mapped cache (`whole`); `encoding` is `encode_rows` alone, from text
to arrays of ids and marks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECOND_START = """
import sys, time
import tunesmith as ts, tunesmith.commands.sft as recipe, tunesmith.train.loop as fit
from tunesmith.options.training import *
imported = time.perf_counter()
step = recipe.fit
def until_first_step(**arguments):
    first = arguments["micro_batch"]
    def micro_batch(i):
        print("FIRST", time.perf_counter() - imported, flush=True)
        raise SystemExit
    step(**{**arguments, "micro_batch": micro_batch})
recipe.fit = until_first_step
ts.sft(SFTConfig(model=ModelOptions(name="gpt2", init="random"), data=DataOptions(name=sys.argv[1]),
    train=TrainOptions(steps=1, precision="fp32"), eval=EvalOptions(at_start=False), out=sys.argv[2]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        texts = []
        for split in ("train", "test"):
            with gzip.open(Path(args.root) / "harmless-base" / f"{split}.jsonl.gz", "rt") as file:
                rows = [json.loads(line)["chosen"] for line in file]
            copies = [row.replace("Human: ", f"Human: {i}. ", 1) for i in range(args.copies) for row in rows]
            (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in copies))
            texts += copies if split == "train" else []
        result = {
            "tokenise": tokenise_rates(data, texts, args.rounds),
            "second_start": second_start(data, Path(folder)),
        }
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def tokenise_rates(data: Path, texts: list[str], rounds: int) -> dict[str, float]:
    from tunesmith.data.datasets import open_dataset
    from tunesmith.data.dialogue import parse_transcript
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.data.tokenstore import encode_rows, stored_rows, tokenise
    from tunesmith.options.training import DataOptions

    tokenizer, rust, rows_only, ours, tokens = Tokenizer.gpt2(), [], [], [], 0
    rows = [stored_rows(parse_transcript(text))[0] for text in texts]
    for _ in range(rounds):
        start = time.perf_counter()
        encoded = tokenizer._backend.encode_batch_fast(texts, add_special_tokens=False)
        rust.append(time.perf_counter() - start)
        del encoded
        start = time.perf_counter()
        encode_rows(rows, tokenizer)
        rows_only.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TUNESMITH_CACHE"] = cache
            start = time.perf_counter()
            store = tokenise(open_dataset(DataOptions(name=str(data))), "train", tokenizer)
            ours.append(time.perf_counter() - start)
            tokens = len(store.tokens)
    return {
        "tokens": tokens,
        "rust_tokens_per_s": round(tokens / statistics.median(rust)),
        "our_tokens_per_s": round(tokens / statistics.median(ours)),
        "encoding_time_ratio": round(statistics.median(a / b for a, b in zip(rows_only, rust, strict=True)), 3),
        "whole_time_ratio": round(statistics.median(a / b for a, b in zip(ours, rust, strict=True)), 3),
    }


def second_start(data: Path, folder: Path) -> dict[str, float]:
    """Seconds from the end of the imports to the first step of a 124 M run: first and second start."""
    seconds = []
    for number in (1, 2):
        command = [sys.executable, "-c", SECOND_START, str(data), str(folder / f"run{number}")]
        environment = {**os.environ, "TUNESMITH_CACHE": str(folder / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        line = next((x for x in done.stdout.splitlines() if x.startswith("FIRST")), None)
        if line is None:
            raise SystemExit(done.stderr[-2000:])
        seconds.append(float(line.split()[1]))
    return {"first_start_s": round(seconds[0], 2), "second_start_s": round(seconds[1], 2)}


if __name__ == "__main__":
    main()
