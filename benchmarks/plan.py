"""The plan against what happened: peak memory and seconds a step, predicted and measured, over a grid of configurations.

    python benchmarks/plan.py --out benchmarks/results/plan-2core.json

Every configuration, with each allocator, has two processes of its own: one makes the plan (memory counted, time from the probe
of one and of four blocks), the other trains some steps of the whole model and reads its own peak resident set over what it had
after imports. Random weights and tokens, texts of even length, half of the tokens with loss. Seconds are the median without the
first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
MEDIUM = {"n_layer": 24, "n_head": 16, "n_embd": 1024}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384}
SAMPLE = {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 6144}
LORA = {"lora.rank": 8}
EARLY = {"train.optimizer_in_backward": True, "train.grad_clip": 0.0}
SELECTIVE, RECOMPUTE = ({"train.activation_checkpointing": mode} for mode in ("selective", True))
BF16 = {"train.weights": "bf16"}


ALLOCATORS = ["fast", "lean"]


def _rows(batch: int, block: int) -> dict[str, Any]:
    return {"train.batch_size": batch, "data.block_size": block}


CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {  # name: (command, shape, options)
    "sample 6 x 256": ("sft", SAMPLE, _rows(4, 512)),
    "sample 6 x 256, long": ("sft", SAMPLE, _rows(4, 1024)),
    "sample 6 x 256, SGD": ("sft", SAMPLE, _rows(2, 1024) | {"optimizer.name": "sgd"}),
    "sample 6 x 256, LoRA": ("sft", SAMPLE, _rows(4, 1024) | LORA),
    "sample 6 x 256, DPO": ("dpo", SAMPLE, _rows(4, 1024)),
    "sample 6 x 256, reward model": ("reward", SAMPLE, _rows(4, 1024)),
    "sample 6 x 256, windows": ("sft", SAMPLE, _rows(4, 1024) | {"data.batching": "windows"}),
    "6 x 384": ("sft", SMALL, _rows(1, 1024)),
    "6 x 384, batch 4": ("sft", SMALL, _rows(4, 1024)),
    "6 x 384, batch 2 x 2": ("sft", SMALL, _rows(2, 1024) | {"train.accumulate": 2}),
    "6 x 384, SGD with momentum": ("sft", SMALL, _rows(2, 512) | {"optimizer.name": "sgd-momentum"}),
    "6 x 384, LoRA, batch 4": ("sft", SMALL, _rows(4, 1024) | LORA),
    "6 x 384, selective": ("sft", SMALL, _rows(4, 1024) | SELECTIVE),
    "6 x 384, recomputed": ("sft", SMALL, _rows(4, 1024) | RECOMPUTE),
    "6 x 384, DPO": ("dpo", SMALL, _rows(4, 1024)),
    "gpt2": ("sft", GPT2, _rows(1, 1024)),
    "gpt2, block 256": ("sft", GPT2, _rows(1, 256)),
    "gpt2, batch 2": ("sft", GPT2, _rows(2, 1024)),
    "gpt2, SGD": ("sft", GPT2, _rows(1, 1024) | {"optimizer.name": "sgd"}),
    "gpt2, 8-bit AdamW": ("sft", GPT2, _rows(1, 512) | {"optimizer.name": "adamw8bit"}),
    "gpt2, selective": ("sft", GPT2, _rows(1, 1024) | SELECTIVE),
    "gpt2, recomputed": ("sft", GPT2, _rows(1, 1024) | RECOMPUTE),
    "gpt2, update in backward": ("sft", GPT2, _rows(1, 1024) | EARLY),
    "gpt2, update in backward, recomputed": ("sft", GPT2, _rows(1, 1024) | EARLY | RECOMPUTE),
    "gpt2, bf16 weights": ("sft", GPT2, _rows(1, 512) | BF16),
    "gpt2, LoRA": ("sft", GPT2, _rows(1, 1024) | LORA),
    "gpt2, LoRA over bf16": ("sft", GPT2, _rows(1, 1024) | LORA | BF16),
    "gpt2, DPO": ("dpo", GPT2, _rows(1, 1024)),
    "gpt2, LoRA DPO, second model": ("dpo", GPT2, _rows(1, 1024) | LORA | {"dpo.reference": "model"}),
    "gpt2-medium, LoRA": ("sft", MEDIUM, _rows(1, 512) | LORA),
}


def setting_of(name: str, allocator: Any) -> Any:
    """The case as the planner has it."""
    from tunesmith.models.gpt2 import GPTConfig
    from tunesmith.options.parse import from_settings
    from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
    from tunesmith.plan.planning import find_place, make_setting
    from tunesmith.plan.workload import Rows

    command, shape, options = CASES[name]
    kinds: dict[str, Any] = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}
    config = from_settings(kinds[command], {"train.precision": "fp32", "train.allocator": allocator, **options}, name)
    text = 170 if command == "sft" else 250
    return make_setting(config, GPTConfig(**shape), Rows(text, 0.5), find_place("cpu"), {})


def predict(name: str, allocator: Any, with_time: bool) -> dict[str, Any]:
    """What the plan says."""
    from tunesmith.device import set_allocator
    from tunesmith.plan.probe import probe_step

    set_allocator(allocator)
    s, began = setting_of(name, allocator), time.perf_counter()
    seconds = probe_step(s.config, s.shape, s.rows).step(s.config.train.accumulate) if with_time else None
    found = {"counted_gb": s.memory.peak / 1e9, "moment": s.memory.moment, "peak_gb": s.peak / 1e9}
    return found | {"seconds": seconds, "probe_seconds": time.perf_counter() - began}


def measure(name: str, allocator: Any, steps: int) -> dict[str, Any]:
    """What a training of the whole model takes."""
    from tunesmith.device import peak_memory_gb, resident_memory, set_allocator

    set_allocator(allocator)
    import torch
    import torch._dynamo  # torch's optimizers load it with their first use

    from tunesmith.plan.probe import make_step

    s = setting_of(name, allocator)
    base = resident_memory() / 1e9
    step = make_step(s.config, s.shape, s.rows, s.config.train.accumulate)
    times = [step() for _ in range(steps)]
    middle = (statistics.median(getattr(t, part) for t in times[1:]) for part in ("micro_batch", "update"))
    micro_batch, update = middle
    peak = peak_memory_gb(torch.device("cpu")) - base
    return {"peak_gb": peak, "base_gb": base, "seconds": s.config.train.accumulate * micro_batch + update}


def child(mode: str, name: str, *more: str) -> dict[str, Any]:
    """A process of its own; returns the figures that it prints."""
    command = [sys.executable, __file__, "--child", mode, "--only", name, *more]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(line.removeprefix("RESULT ")))


def error(predicted: float, measured: float) -> float:
    """Of the prediction, as a share of what was measured."""
    return predicted / measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, help="configurations; default all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--allocator", nargs="+", choices=ALLOCATORS, default=ALLOCATORS, help="as --train.allocator; default both"
    )
    parser.add_argument(
        "--memory_only", action="store_true", help="no probe, two steps: where the machine is not quiet"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--child", choices=["predict", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = 3 if args.memory_only else args.steps
    if args.child:
        name = args.only[0]
        how = name, args.allocator[0]
        found = measure(*how, steps) if args.child == "measure" else predict(*how, not args.memory_only)
        print("RESULT " + json.dumps(found))
        return
    flags = ["--steps", str(steps), *(["--memory_only"] if args.memory_only else [])]
    rows = []
    for name, allocator in itertools.product(args.only or CASES, args.allocator):
        how = [*flags, "--allocator", allocator]
        predicted, measured = child("predict", name, *how), child("measure", name, *how)
        row = {"name": name, "allocator": allocator, "predicted": predicted, "measured": measured}
        row["memory_error"] = error(predicted["peak_gb"], measured["peak_gb"])
        told = ""
        if predicted["seconds"] is not None:
            row["time_error"] = error(predicted["seconds"], measured["seconds"])
            told = f"  {predicted['seconds']:7.3f} {measured['seconds']:7.3f} s {row['time_error']:+6.1%}"
        rows.append(row)
        sizes = f"{predicted['counted_gb']:6.3f} {predicted['peak_gb']:6.3f} {measured['peak_gb']:6.3f} GB"
        print(f"{name:40} {allocator} {sizes} {row['memory_error']:+6.1%}{told}", flush=True)
    summary = {}
    for allocator, kind in itertools.product(args.allocator, ("memory_error", "time_error")):
        sizes = sorted(abs(row[kind]) for row in rows if kind in row and row["allocator"] == allocator)
        if sizes:
            figures = {
                "median": statistics.median(sizes), "worst": sizes[-1], "of": len(sizes),
                "within_5": sum(s <= 0.05 for s in sizes), "within_10": sum(s <= 0.1 for s in sizes),
            }  # fmt: skip
            summary[f"{allocator}_{kind}"] = figures
            print(f"{allocator}, {kind.replace('_', ' ')}: {figures}")
    if args.out:
        write(args.out, rows, summary, steps)


def write(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any], steps: int) -> None:
    """The JSON file: machine, versions, settings, summary and rows."""
    import torch

    from tunesmith.device import environment

    about = environment(torch.device("cpu"))
    machine = {"device": about.pop("device"), "threads": about.pop("threads"), "system": about.pop("system")}
    result = {"machine": machine, "versions": about, "settings": {"steps": steps}, "summary": summary, "plan": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
