"""SFT step time and peak memory: tunesmith beside the plain loop, transformers' Trainer and TRL's SFTTrainer.

    python benchmarks/sft.py --root DIR_OF_HH_RLHF --rounds 3 --steps 4 --out benchmarks/results/sft-NAME.json

Same weights (GPT-2 shape, random, seed 0), same packed rows of real dialogues, loss on the assistant's tokens, fp32,
one row of 1,024 tokens a step. Every contestant runs in its own process, in turn, `--rounds` times (A B C A B C ...),
so that a drift of the machine meets all of them. `tuned` gives the rivals every setting that we found to help: glibc's
allocator thresholds, the one-kernel tanh GELU, fused AdamW, no activation checkpointing; `stock` is as shipped.
Rates count tokens through the model; memory is the process's peak resident set, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
TRAINER: dict[str, Any] = {  # what both of transformers' trainers are given
    "per_device_train_batch_size": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_grad_norm": 0,
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    "dataloader_pin_memory": False, "seed": 0,
}  # fmt: skip
CONTESTANTS = {  # name: (function, tuned)
    "tunesmith": ("run_ours", False),
    "Trainer, tuned": ("run_trainer", True),
    "TRL, tuned": ("run_trl", True),
    "loop, tuned": ("run_loop", True),
    "tunesmith (allocator off)": ("run_ours_system_allocator", False),
    "Trainer, stock": ("run_trainer", False),
    "TRL, stock": ("run_trl", False),
    "loop, stock": ("run_loop", False),
}


# ---- the work that all share: weights and rows, made once -----------------------------------------------------------


def prepare(work: Path, model: str, root: str | None, rows: int, block_size: int) -> dict[str, Any]:
    """Save the weights and `rows` packed rows; returns what the data is."""
    import torch

    from tunesmith.batching import Batches
    from tunesmith.datasets import open_dataset
    from tunesmith.gpt import GPT, SIZES, GPTConfig
    from tunesmith.options import DataOptions
    from tunesmith.tokenizer import Tokenizer
    from tunesmith.tokenstore import tokenise
    from tunesmith.weights import save_model

    small = GPTConfig(n_layer=6, n_head=6, n_embd=384)
    gpt = GPT(small if model == "small" else SIZES[model])
    gpt.init_weights(torch.Generator().manual_seed(0))
    save_model(gpt, Tokenizer.gpt2(), work / "model")
    name = "hh:harmless-base" if root else "sample"
    store = tokenise(open_dataset(DataOptions(name=name, root=root)), "train", Tokenizer.gpt2())
    batches = Batches(
        store, range(len(store)), batching="packed", block_size=block_size, batch_size=1, loss_on="assistant"
    )
    torch.save([batches[i] for i in range(rows)], work / "rows.pt")
    used = [batches[i] for i in range(rows)]
    share = sum(b.count for b in used) / sum(b.tokens for b in used)
    return {"data": name, "rows": rows, "supervised_share": share, "parameters": gpt.parameter_count()}


# ---- contestants: each runs in its own process and prints one JSON line ----------------------------------------------


class Clock:
    """Seconds of each step, the first ones left out."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.marks = warmup, [time.perf_counter()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)][self.warmup :]


def run_ours(work: Path, steps: int, warmup: int, tuned: bool) -> tuple[list[float], list[float]]:
    from tunesmith.device import keep_freed_memory

    keep_freed_memory()  # as `tunesmith sft` does by itself
    import torch

    from tunesmith.evaluate import nll_sum
    from tunesmith.optim import build_optimizer
    from tunesmith.step import optimizer_step
    from tunesmith.weights import load_model

    batches = torch.load(work / "rows.pt", weights_only=False)
    model = load_model(work / "model").train()
    optimizer = build_optimizer(model, "adamw", lr=1e-4)
    clock, losses = Clock(warmup), []
    for i in range(warmup + steps):
        stats = optimizer_step(model, [batches[i % len(batches)]], lambda b: nll_sum(model, b), optimizer)
        losses.append(stats.loss)
        clock.mark()
    return clock.seconds(), losses


def run_ours_system_allocator(work: Path, steps: int, warmup: int, tuned: bool) -> tuple[list[float], list[float]]:
    os.environ["TUNESMITH_ALLOCATOR"] = "system"
    return run_ours(work, steps, warmup, tuned)


def rival_model(work: Path, tuned: bool) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"activation_function": "gelu_pytorch_tanh"} if tuned else {}
    return transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32", **options).train()


def labelled_rows(work: Path) -> list[dict[str, list[int]]]:
    """The same rows as plain input_ids and labels (unshifted, as transformers wants them)."""
    import torch

    rows = []
    for batch in torch.load(work / "rows.pt", weights_only=False):
        ids = batch.input_ids[0]
        labels = torch.full_like(ids, -100)
        inside = batch.rows + 1 < len(ids)  # the last token's target lies outside of an unshifted row
        follows = batch.rows[inside]
        same = ids[follows + 1] == batch.targets[inside]  # not the end-of-text targets, which are no inputs here
        labels[follows[same] + 1] = batch.targets[inside][same]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def run_loop(work: Path, steps: int, warmup: int, tuned: bool) -> tuple[list[float], list[float]]:
    """What most people write: full logits, cross_entropy, AdamW."""
    import torch
    import torch.nn.functional as F

    model = rival_model(work, tuned)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=tuned or None)
    rows = labelled_rows(work)
    clock, losses = Clock(warmup), []
    for i in range(warmup + steps):
        row = rows[i % len(rows)]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        clock.mark()
    return clock.seconds(), losses


def run_trainer(work: Path, steps: int, warmup: int, tuned: bool) -> tuple[list[float], list[float]]:
    import torch
    import transformers

    rows = [{k: torch.tensor(v) for k, v in row.items()} for row in labelled_rows(work)]
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "out"),
        max_steps=warmup + steps,
        **TRAINER,
        optim="adamw_torch_fused",
    )
    return drive(transformers.Trainer(rival_model(work, tuned), arguments, train_dataset=rows), warmup)


def run_trl(work: Path, steps: int, warmup: int, tuned: bool) -> tuple[list[float], list[float]]:
    """TRL packs the dialogues itself (best fit), loss on the completion tokens."""
    import datasets
    import torch
    import trl
    from transformers import AutoTokenizer

    dialogues = []
    for batch in torch.load(work / "rows.pt", weights_only=False):
        supervised = torch.zeros(batch.input_ids.numel(), dtype=torch.int64)
        supervised[(batch.rows + 1).clamp(max=len(supervised) - 1)] = 1
        start = 0
        for length in batch.documents.lengths:
            stretch = slice(start, start + length)
            ids, mask = batch.input_ids[0, stretch].tolist(), supervised[stretch].tolist()
            if sum(mask):
                dialogues.append({"input_ids": ids, "completion_mask": mask})
            start += length
    settings: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False} if tuned else {"bf16": False}
    arguments = trl.SFTConfig(
        output_dir=str(work / "out"),
        max_steps=warmup + steps,
        **TRAINER,
        packing=True,
        max_length=1024,
        **settings,
    )
    trainer = trl.SFTTrainer(
        rival_model(work, tuned),
        arguments,
        train_dataset=datasets.Dataset.from_list(dialogues * 3),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
    )
    return drive(trainer, warmup)


def drive(trainer: Any, warmup: int) -> tuple[list[float], list[float]]:
    """Run a transformers Trainer and read the clock at the end of each step."""
    import transformers

    clock = Clock(warmup)

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            clock.mark()

    trainer.add_callback(Marks())
    trainer.train()
    return clock.seconds(), [r["loss"] for r in trainer.state.log_history if "loss" in r]


# ---- the comparison -------------------------------------------------------------------------------------------------


def child(name: str, work: Path, steps: int, warmup: int) -> None:
    """Run one contestant and print its figures as the last line."""
    import resource

    function, tuned = CONTESTANTS[name]
    run: Callable[..., tuple[list[float], list[float]]] = globals()[function]
    seconds, losses = run(work, steps, warmup, tuned)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("RESULT " + json.dumps({"seconds": seconds, "losses": [float(x) for x in losses], "peak_gb": peak}))


def measure(names: list[str], work: Path, rounds: int, steps: int, warmup: int) -> dict[str, list[dict[str, Any]]]:
    """All contestants in turn, `rounds` times."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            tuned = CONTESTANTS[name][1]
            command = [sys.executable, __file__, "--child", name, "--work", str(work), "--steps", str(steps)]
            environment = {**os.environ, **(ALLOCATOR if tuned else {}), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [*command, "--warmup", str(warmup)], env=environment, capture_output=True, text=True, check=False
            )
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name].append(json.loads(line.removeprefix("RESULT ")))
            last = found[name][-1]
            rate = 1024 / statistics.median(last["seconds"])
            print(f"round {number + 1}: {name:28} {rate:7.1f} tokens/s  {last['peak_gb']:.2f} GB", flush=True)
    return found


def summary(found: dict[str, list[dict[str, Any]]], tokens: int) -> list[dict[str, Any]]:
    """A row a contestant: median rate over all steps, peak memory, and ours against it, paired by round."""
    ours = found["tunesmith"]
    rows = []
    for name, runs in found.items():
        rates = [tokens / s for run in runs for s in run["seconds"]]
        ratios = [
            statistics.median(theirs["seconds"]) / statistics.median(own["seconds"])
            for own, theirs in zip(ours, runs, strict=True)
        ]
        memory = [own["peak_gb"] / theirs["peak_gb"] for own, theirs in zip(ours, runs, strict=True)]
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(statistics.median(rates), 1),
                "slowest": round(min(rates), 1),
                "fastest": round(max(rates), 1),
                "peak_gb": round(statistics.median(r["peak_gb"] for r in runs), 3),
                "our_speed_ratio": round(statistics.median(ratios), 3),
                "our_memory_ratio": round(statistics.median(memory), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, ... or small (6 layers, width 384)")
    parser.add_argument("--root", help="HH-RLHF in the publisher's layout; default: the embedded sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, Path(args.work), args.steps, args.warmup)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        about = prepare(work, args.model, args.root, args.warmup + args.steps, 1024)
        names = [n for n in CONTESTANTS if not args.only or n in args.only or n == "tunesmith"]
        found = measure(names, work, args.rounds, args.steps, args.warmup)
    import torch

    from tunesmith.device import describe

    rows = summary(found, 1024)
    print(f"\n{'':28} tokens/s (min-max)         GB   ours: speed x   memory x")
    for r in rows:
        spread = f"{r['tokens_per_s']:7.1f} ({r['slowest']:.0f}-{r['fastest']:.0f})"
        print(
            f"{r['name']:28} {spread:22} {r['peak_gb']:5.2f}  {r['our_speed_ratio']:10.2f}  {r['our_memory_ratio']:10.2f}"
        )
    if args.out:
        machine = {"device": describe(torch.device("cpu")), "processor": platform.processor() or platform.machine()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        settings = {"model": args.model, "rounds": args.rounds, "steps": args.steps, "precision": "fp32", **about}
        result = {"machine": machine, "versions": versions, "settings": settings, "summary": rows, "runs": found}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
