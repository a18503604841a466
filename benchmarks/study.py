"""The smoke study of the paper: how long it takes, and what the scheduling adds to the sum of its runs.

    python benchmarks/study.py [--jobs N] [--out benchmarks/results/study-NAME.json]

Limits (issue 5): all experiments within 12 minutes on two cores; scheduling below 2 % of the sum of the runs. The sum is of the
times from a process's start to its end as progress.json has them; with one job at a time, what is left of the whole is the
study's own: reading the file, importing torch for its checks, preparing directories, noticing that a process has ended.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            sys.executable,
            "-m",
            "tunesmith",
            "study",
            "paper",
            "--scale",
            "smoke",
            "--out",
            folder,
            "--jobs",
            str(args.jobs),
        ]
        began = time.perf_counter()
        subprocess.run(argv, check=True)
        whole = time.perf_counter() - began
        again = time.perf_counter()
        subprocess.run(argv, check=True)
        nothing = time.perf_counter() - again
        runs = json.loads((Path(folder) / "progress.json").read_text())["runs"]
    total = sum(run["seconds"] for run in runs.values())
    result = {
        "machine": platform.processor() or platform.machine(), "jobs": args.jobs, "runs": len(runs), "whole_s": round(whole, 1),
        "sum_of_runs_s": round(total, 1), "again_with_nothing_to_do_s": round(nothing, 2),
        "scheduling_share": round(whole * args.jobs / total - 1, 4) if args.jobs == 1 else None,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
