"""How long a study's report takes: rendering of a made-up study of the smoke size or larger, best of some rounds.

    python benchmarks/report.py --seeds 2 --steps 48 --rounds 3

The study is that of the tests (tests/frozen_study.py): 19 runs a seed, all experiments. Each round is a process of its own, start
and imports included, as a user waits for it. The aim is under 10 seconds for the smoke study.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    from frozen_study import write_study

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 2), ("steps", 48), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write_study(Path(folder) / "study", seeds=options.seeds, steps=options.steps)
        runs, seconds = len(list((root / "runs").iterdir())), []
        for _ in range(options.rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "tunesmith", "report", str(root)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        size = (root / "report" / "index.html").stat().st_size / 1e6
    print(
        f"{runs} runs of {options.steps} steps: {min(seconds):.1f} s (of {', '.join(f'{s:.1f}' for s in seconds)}), page {size:.1f} MB"
    )


if __name__ == "__main__":
    main()
