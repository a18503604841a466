"""The memory ladder: what each way to train in less memory saves and costs, one change a row.

    python benchmarks/memory.py --root DIR_OF_HH_RLHF --rounds 2 --steps 3 --out benchmarks/results

Two tasks, in the setting of sft.py (the same weights and packed rows of 1,024 tokens, fp32, one row a step): `full` trains all
weights beside `Trainer`, tuned for speed and for memory (checkpointing, and a head for the tokens with loss only), `lora`
adapters of rank 8 beside TRL with PEFT. Memory is the process's peak resident set, imports included. `exact`: the losses of
all steps are those of the plain row, to the bit; the script compares them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import sft
from contest import Found, Tasks, measure, options, run_tasks, step_rates, summary, write_result
from preferences import RANK, run_trl_sft

ours, lora = sft.run_ours, partial(sft.run_ours, rank=RANK)
early, recomputed = partial(ours, in_backward=True), partial(ours, in_backward=True, checkpointing=True)
leanest = partial(recomputed, allocator="lean")
TASKS: Tasks = {
    "full": {
        "Trainer, tuned": (sft.run_trainer, True),
        "Trainer, tuned for memory": (partial(sft.run_trainer, checkpointing=True, keep=True), "lean"),
        "tunesmith": (ours, False),
        "selective activations": (partial(ours, checkpointing="selective"), False),
        "blocks computed again": (partial(ours, checkpointing=True), False),
        "update in backward": (early, False),
        "update in backward, selective": (partial(early, checkpointing="selective"), False),
        "update in backward, blocks again": (recomputed, False),
        "lean allocator": (partial(ours, allocator="lean"), False),
        "lean, update in backward, blocks again": (leanest, False),
        "the same, 8-bit state": (partial(leanest, name="adamw8bit"), False),
        "the same, bf16 weights": (partial(leanest, bf16=True), False),
        "the same, both": (partial(leanest, bf16=True, name="adamw8bit"), False),
    },
    "lora": {
        "TRL + PEFT, tuned": (run_trl_sft, True),
        "tunesmith": (lora, False),
        "selective activations": (partial(lora, checkpointing="selective"), False),
        "blocks computed again": (partial(lora, checkpointing=True), False),
        "lean allocator": (partial(lora, allocator="lean"), False),
        "lean, blocks again": (partial(lora, allocator="lean", checkpointing=True), False),
        "the same, bf16 base": (partial(lora, allocator="lean", checkpointing=True, bf16=True), False),
    },
}
RIVALS = ("Trainer", "TRL")


def exactness(found: Found) -> dict[str, float | None]:
    """Largest relative difference of any loss from the plain row's; None for rivals, which sum in another order."""
    plain = found["tunesmith"]
    differences: dict[str, float | None] = {}
    for name, runs in found.items():
        losses = [
            (a, b) for x, y in zip(runs, plain, strict=True) for a, b in zip(x["losses"], y["losses"], strict=False)
        ]
        differences[name] = None if name.startswith(RIVALS) else max(abs(a / b - 1) for a, b in losses)
    return differences


def compare(task: str, args: argparse.Namespace) -> None:
    """One task: its rows, its table, its file."""
    contestants = {n: tuned for n, (_, tuned) in TASKS[task].items() if not args.only or n in (*args.only, "tunesmith")}
    with tempfile.TemporaryDirectory() as work:
        about = sft.prepare(Path(work), args.model, args.root, args.warmup + args.steps)
        arguments = ["--task", task, "--work", work, "--steps", str(args.steps), "--warmup", str(args.warmup)]
        found = measure(__file__, contestants, arguments, args.rounds, step_rates)
    rows, differences = summary(found, step_rates), exactness(found)
    for row in rows:
        row |= {"speed": round(1 / row.pop("our_speed_ratio"), 3), "memory": round(1 / row.pop("our_memory_ratio"), 3)}
        row["difference"] = differences[row["name"]]
        print(f"{row['name']:36} {row['tokens_per_s']:7.1f} tokens/s {row['peak_gb']:6.2f} GB", end="")
        print(f"  {row['speed']:.2f} x  {row['memory']:.2f}  {row['difference']}")
    if args.out:
        settings = {
            "task": task,
            "model": args.model,
            "rounds": args.rounds,
            "steps": args.steps,
            "precision": "fp32",
            **about,
        }
        path = args.out / f"memory-{task}-{args.model}-{os.cpu_count()}core.json"
        write_result(path, settings, rows, found, ladder=True)


if __name__ == "__main__":
    run_tasks(options(__doc__ or ""), TASKS, compare)
