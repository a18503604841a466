"""Tokenising against the Rust tokenizer's own batch rate, and how soon a second start reaches its first step.

    python benchmarks/data.py --root DIR_OF_HH_RLHF [--copies 20] [--out benchmarks/results/data-NAME.json]
    python benchmarks/data.py --rows 1000000 [--out benchmarks/results/data-rows-NAME.json]

The rows are real dialogues, repeated with a number in front so that no two are equal. The tokenizer's own rate is that
of `encode_batch_fast` on the whole texts, rows to Encoding objects, nothing else; ours reads and parses the JSON lines,
encodes, marks the targets and writes the memory-mapped cache (`whole`); `encoding` is `encode_rows` alone, from text
to arrays of ids and marks.

With `--rows` a file of so many short dialogues is made (seeded, about 393 bytes a row), and a process with GPT-2's
tokenizer and no model goes as far as its first batch, twice: seconds of the whole process and from the end of its
imports, and the most memory that it ever had (VmHWM: the stored tokens count where they were read through their map).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECOND_START = """
import sys, time
import tunesmith as ts, tunesmith.commands.training, tunesmith.train.session as session
from tunesmith.options.training import *
imported = time.perf_counter()
def until_first_step(log, task, *_, **__):
    task.micro_batch(0)
    print("FIRST", time.perf_counter() - imported, flush=True)
    raise SystemExit
session.fit = until_first_step
ts.sft(SFTConfig(model=ModelOptions(name="gpt2", init="random"), data=DataOptions(name=sys.argv[1]),
    train=TrainOptions(steps=1, precision="fp32"), eval=EvalOptions(at_start=False), out=sys.argv[2]))
"""

FIRST_BATCH = """
import sys, time
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.options.training import DataOptions, SFTConfig, TrainOptions
from tunesmith.train.splits import in_batches, load_splits
imported = time.perf_counter()
config = SFTConfig(data=DataOptions(name=sys.argv[1]), train=TrainOptions(precision="fp32"))
train = in_batches(load_splits(config.data, Tokenizer.gpt2()), config).train
train[0]
seconds = time.perf_counter() - imported
(peak,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seconds, peak * 1024 / 1e9)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--root")
    what.add_argument("--rows", type=int)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = first_batch(args.rows, Path(folder)) if args.rows else hh_dialogues(args, Path(folder))
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def hh_dialogues(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    data = folder / "data"
    data.mkdir()
    texts = []
    for split in ("train", "test"):
        with gzip.open(Path(args.root) / "harmless-base" / f"{split}.jsonl.gz", "rt") as file:
            rows = [json.loads(line)["chosen"] for line in file]
        copies = [row.replace("Human: ", f"Human: {i}. ", 1) for i in range(args.copies) for row in rows]
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in copies))
        texts += copies if split == "train" else []
    return {
        "tokenise": tokenise_rates(data, texts, args.rounds),
        "second_start": second_start(data, folder),
    }


def tokenise_rates(data: Path, texts: list[str], rounds: int) -> dict[str, float]:
    from tunesmith.data.datasets import open_dataset
    from tunesmith.data.encoding import encode_rows
    from tunesmith.data.hh_template import HH, parse_transcript
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.data.tokenstore import stored_rows, tokenise
    from tunesmith.options.training import DataOptions

    tokenizer, rust, rows_only, ours, tokens = Tokenizer.gpt2(), [], [], [], 0
    rows = [stored_rows(parse_transcript(text), HH)[0] for text in texts]
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


def write_dialogues(path: Path, rows: int) -> None:
    """A JSONL file of dialogues with `messages`, one exchange each, about 393 bytes a row, all different.

    The words are the sample data's; every tenth row has letters beyond ASCII.
    """
    import tunesmith

    rng, words = random.Random(1), []
    with (Path(tunesmith.__file__).parent / "sample" / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            words += [word for turn in row["prompt"] + row["chosen"] for word in turn["content"].split()]
    starts = [rng.randrange(len(words) - 50) for _ in range(20_000)]
    sentences = [" ".join(words[a : a + rng.randint(10, 46)]) for a in starts]
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            question, answer = (rng.choice(sentences) for _ in range(2))
            answer += " It\u2019s a caf\u00e9." if i % 10 == 0 else ""
            turns = [{"role": "user", "content": f"{i}: {question}"}, {"role": "assistant", "content": f"{answer} {i}"}]
            file.write(json.dumps({"messages": turns}) + "\n")


def first_batch(rows: int, folder: Path) -> dict[str, float]:
    """Seconds and GB to the first batch of so many rows: first and second start."""
    data = folder / "rows.jsonl"
    write_dialogues(data, rows)
    result: dict[str, float] = {"rows": rows, "file_mb": round(data.stat().st_size / 1e6, 1)}
    for name in ("first_start", "second_start"):
        start = time.perf_counter()
        environment = {**os.environ, "TUNESMITH_CACHE": str(folder / "cache")}
        command = [sys.executable, "-c", FIRST_BATCH, str(data)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        whole, (seconds, peak) = time.perf_counter() - start, map(float, done.stdout.split())
        result |= {
            f"{name}_s": round(whole, 2),
            f"{name}_after_imports_s": round(seconds, 2),
            f"{name}_peak_gb": round(peak, 3),
        }
    return result


if __name__ == "__main__":
    main()
