"""The audit of a large set of pairs, first and second time, beside the Rust tokenizer's own time for the same texts.

    python benchmarks/audit.py --root DIR_OF_HH_RLHF [--pairs 43000] [--rounds 3] [--out benchmarks/results/audit-NAME.json]

The pairs are real ones, repeated with a number in front so that no two are equal; half as many again lie in a second set
for `--against`, a tenth of them the same. `first` tokenises, `second` finds the tokens in the cache; both start from a
fresh process and end with the table. `tokenizer` is `encode_batch_fast` on prompt + chosen and the rejected answer, rows
to Encoding objects, nothing else.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--pairs", type=int, default=43_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    with gzip.open(Path(args.root) / "harmless-base" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def numbered(i: int) -> dict[str, str]:
        row = rows[i % len(rows)]
        return {k: row[k].replace("Human: ", f"Human: {i}. ", 1) for k in ("chosen", "rejected")}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [numbered(i) for i in range(args.pairs)]
        others = [numbered(i) for i in range(args.pairs * 9 // 10, args.pairs * 14 // 10)]
        for file_name, content in (("pairs", pairs), ("others", others)):
            (folder / f"{file_name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        seconds: dict[str, list[float]] = {"first": [], "second": [], "tokenizer": []}
        for number in range(args.rounds):
            for which in ("first", "second"):
                seconds[which].append(audit(folder, folder / f"cache-{number}"))
            seconds["tokenizer"].append(tokenizer_alone(pairs))
        result = {"pairs": args.pairs, **{f"{k}_s": round(statistics.median(v), 2) for k, v in seconds.items()}}
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def audit(folder: Path, cache: Path) -> float:
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "data",
        str(folder / "pairs.jsonl"),
        "--audit",
        "--data.block_size",
        "256",
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--against", str(folder / "others.jsonl")], env={**os.environ, "TUNESMITH_CACHE": str(cache)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - start


def tokenizer_alone(pairs: list[dict[str, str]]) -> float:
    from tunesmith.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.gpt2()
    texts = [row["chosen"] for row in pairs] + [row["rejected"].rpartition("Assistant:")[2] for row in pairs]
    start = time.perf_counter()
    encoded = tokenizer._backend.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    del encoded
    return seconds


if __name__ == "__main__":
    main()
