"""Memory over long runs: is what a process takes after its first twentieth what it takes at the end?

    python benchmarks/steady.py --out benchmarks/results             # 2,000 steps, 1,000 messages, 1,000 prompts: an hour or two
    python benchmarks/steady.py --steps 100 --messages 100 --only sft-fp32 chat

Every command runs as users run it, in a process of its own whose resident set is read from outside, on the embedded model.
Trainings are on its dialogues and pairs, packed, so that nearly every step has other shapes; the chat has a new length of
prompt with every message; `score` answers prompts of all lengths. `growth` is the highest resident set after the first twentieth
of the run, over the highest in the tenth that begins there (noise of the allocator is in both). `plan` is what tunesmith plan says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import write_result

PERIOD = 0.2  # seconds between two looks
SHOWN = 40  # points of a curve that are kept
TRAININGS = {"sft": [], "sft-lora": ["--lora.rank", "8"], "reward": [], "dpo": [], "pretrain": []}
BLOCK = "128"  # tokens a row, one row a step: 2,000 steps of a training take a few minutes
SHAPE = ["--model.n_layer", "4", "--model.n_head", "4", "--model.n_embd", "256", "--tokenizer.vocab_size", "2048"]


def jobs(args: argparse.Namespace, work: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> arguments of the command and what is typed into it."""
    found: dict[str, tuple[list[str], str]] = {}
    steps = ["--train.steps", str(args.steps), "--train.device", "cpu", "--eval.every", str(max(1, args.steps // 10))]
    for name, more in TRAININGS.items():
        for precision in ("fp32", "bf16"):
            command = name.partition("-")[0]
            model = (
                [*SHAPE, "--model.block_size", BLOCK]
                if command == "pretrain"
                else ["--model.name", "sample", "--data.block_size", BLOCK]
            )
            model += ["--train.batch_size", "1"]
            out = ["--data.name", "sample", "--eval.iters", "10", "--out", str(work / f"{name}-{precision}")]
            found[f"{name}-{precision}"] = ([command, *model, *more, *steps, "--train.precision", precision, *out], "")
    lengths = [n * 397 % 800 + 1 for n in range(args.messages)]  # long and short from the beginning
    told = "".join(f"/reset\n{'word ' * n}\n" for n in lengths)
    found["chat"] = (["chat", "sample", "--device", "cpu", "--generate.max_new_tokens", "16"], told)
    prompts = work / "prompts.txt"
    prompts.write_text("".join(f"{n}: {'word ' * (n * 397 % 700 + 1)}\n" for n in range(args.messages)))
    judge = [
        "--reward",
        str(work / "judge"),
        "--prompts",
        str(prompts),
        "--device",
        "cpu",
        "--out",
        str(work / "scores"),
    ]
    found["score"] = (["score", "sample", *judge], "")
    return found


def watched(argv: list[str], typed: str) -> list[float]:
    """Resident set of a command, MB of 10^6 bytes, at every look."""
    command = [sys.executable, "-m", "tunesmith", *argv]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as asked:
        asked.write(typed)
        asked.seek(0)
        process = subprocess.Popen(command, stdin=asked, stdout=said, stderr=subprocess.STDOUT, text=True)
        seen: list[float] = []
        while process.poll() is None:
            time.sleep(PERIOD)
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "VmRSS:" in status:  # a process that is ending has none
                seen.append(int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(argv[:3])} ended with {process.returncode}:\n{said.read()[-2000:]}")
    return seen


def row(seen: list[float]) -> dict[str, Any]:
    """The curve in a few points, and its growth."""
    loaded = next(i for i, mb in enumerate(seen) if mb > 0.6 * max(seen))  # imports and reading are behind it
    seen = seen[loaded:]
    start = len(seen) // 20
    early = max(seen[start : start + max(1, len(seen) // 10)])
    stride = max(1, len(seen) // SHOWN)
    return {
        "mb": [round(mb) for mb in seen[::stride]],
        "peak_mb": round(max(seen)),
        "growth": round(max(seen[start:]) / early, 4),
    }


def planned(argv: list[str], work: Path) -> float | None:
    """What tunesmith plan says of a training, MB; None for what it does not plan."""
    if argv[0] not in ("sft", "dpo", "reward", "pretrain"):
        return None
    out = work / "plan.json"
    left_out = ("--data.name", "--out")
    kept = [w for before, w in zip(["", *argv], argv, strict=False) if w not in left_out and before not in left_out]
    subprocess.run(
        [sys.executable, "-m", "tunesmith", "plan", *kept, "--out", str(out)], check=True, capture_output=True
    )
    found = json.loads(out.read_text())
    return round(found["memory"]["total"] / 1e6) if "total" in found.get("memory", {}) else None


def keep(path: Path, settings: dict[str, int], found: dict[str, dict[str, Any]]) -> None:
    """Write the rows; those of other jobs that were measured with the same settings stay."""
    before = json.loads(path.read_text()) if path.exists() else {"settings": None}
    kept = {row["name"]: row for row in before["summary"]} if before["settings"] == settings else {}
    write_result(
        path, settings, list((kept | {name: {"name": name, **row} for name, row in found.items()}).values()), {}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, found = Path(folder), {}
        for name, (argv, typed) in jobs(args, work).items():
            if args.only and name not in args.only:
                continue
            if argv[0] == "score":
                judge = [
                    "reward",
                    "--model",
                    "sample",
                    "--data",
                    "sample",
                    "--train.steps",
                    "5",
                    "--out",
                    str(work / "judge"),
                ]
                watched([*judge, "--data.block_size", "256", "--eval.iters", "2"], "")
            found[name] = row(watched(argv, typed)) | {"plan_mb": planned(argv, work)}
            print(
                f"{name:16} peak {found[name]['peak_mb']:5,} MB, plan {found[name]['plan_mb']}, growth {found[name]['growth']:.3f}",
                flush=True,
            )
            if args.out:
                keep(Path(args.out) / "steady-2core.json", {"steps": args.steps, "messages": args.messages}, found)


if __name__ == "__main__":
    main()
