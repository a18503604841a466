"""What one GPU does, beside the targets for an H100: speed, memory, and TRL on the same dialogues.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json     # on a machine with a GPU, under 9 minutes
    python benchmarks/gpu.py --device cpu --tiny                   # whether the script runs

Each part is a process of its own, so that one failure does not end the rest; results are printed and written as they
come. The most important come first, and the time that each later part needs is kept for it: a slow part takes what
faster ones have left over. A part that fails, ours or a rival's, is a missing figure with its reason. Most parts are
our own commands (`tunesmith sft`, `tunesmith dpo`) on GPT-2 medium with random weights and the embedded dialogues: what
is measured is what a user gets, log, prefetch and all. Rates are over the second half of the steps, from the log's own
times; `peak_gb` is the allocator's peak at the last training step.

`share_of_ceiling` is the floating-point operations of the products that a step needs (forward and backward, the head
and the last block's MLP only where a token carries loss, recomputation not counted, attention only for windows) over
the best rate that this card multiplied large matrices at, in the same precision, a moment before.

The paper's own protocol is batch 1 x 1,024 tokens of random windows with AdamW; `minutes` is the time for its 80,000
iterations: kernel by kernel, and with the whole step recorded as a CUDA graph and replayed (`--train.cuda_graphs`; on a
CPU nothing is recorded).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_rival import synchronise, trl

PAPER_ITERATIONS = 80_000
LEAN = {"train.activation_checkpointing": True, "train.optimizer_in_backward": True, "train.grad_clip": 0}
WINDOWS = {"data.batching": "windows", "train.batch_size": 1}
MINUTES = 8.5  # by themselves all shares fit into this, and the making of the model that all parts load


@dataclass(frozen=True)
class Part:
    """One measurement. run: `sft` or `dpo`, our commands, or a function of this file; target: (figure, "<=" or ">=", value).

    share: seconds kept for it, its start of ten and more included; limit: seconds at most, where earlier parts left some.
    """

    name: str
    run: str
    options: dict[str, Any] = field(default_factory=dict)
    share: int = 22
    limit: int = 60
    target: tuple[str, str, float] | None = None


def parts(tiny: bool) -> list[Part]:
    """Everything, the most important first."""
    steps = {"train.steps": 4 if tiny else 40}
    few = {"train.steps": 2 if tiny else 6, "train.compile": False, "train.cuda_graphs": False}
    paper = {**WINDOWS, "train.steps": 4 if tiny else 200}
    recorded = {**paper, "train.cuda_graphs": "auto" if tiny else True}  # on a CPU true is refused
    minutes, sizes = ("minutes", "<=", 16), (1,) if tiny else (8, 16, 1, 4, 2)
    lean_lora = {"train.weights": "bf16", "train.activation_checkpointing": True}
    lean_adamw = {**few, **WINDOWS, **LEAN, "optimizer.name": "adamw8bit", "train.weights": "bf16"}

    def packed(rows: int, share: int) -> Part:
        options = {**steps, "train.batch_size": rows}
        return Part(f"SFT packed, batch {rows}", "sft", options, share, 90, ("share_of_ceiling", ">=", 0.5))

    return [
        Part("matrix products", "ceiling", share=20),
        *(packed(n, 38) for n in sizes[:2]),
        Part("paper's protocol as a CUDA graph", "sft", recorded, 32, 90, minutes),
        Part("DPO, all weights", "dpo", {**few, **LEAN}, target=("peak_gb", "<=", 6)),
        Part("DPO, LoRA rank 8", "dpo", {**few, **lean_lora, "lora.rank": 8}, target=("peak_gb", "<=", 2)),
        Part("full AdamW, lean and exact", "sft", {**few, **WINDOWS, **LEAN}, target=("peak_gb", "<=", 5)),
        Part("full AdamW, 8-bit state and bf16 weights", "sft", lean_adamw, 28, 90, ("peak_gb", "<=", 2.5)),
        Part(
            "LoRA rank 1, bf16 base, checkpointing", "sft", {**few, **WINDOWS, **lean_lora, "lora.rank": 1},
            target=("peak_gb", "<=", 1.6),
        ),
        Part("TRL SFT packed, batch 8", "trl", {"rank": 0, "batch_size": 8}, 38, 80),
        Part("full AdamW, plain", "sft", {**few, **WINDOWS}),
        Part("LoRA rank 1", "sft", {**few, **WINDOWS, "lora.rank": 1}),
        Part("TRL + PEFT, LoRA rank 1", "trl", {"rank": 1, "batch_size": 1}, 32),
        Part("paper's protocol as a CUDA graph, not compiled", "sft", {**recorded, "train.compile": False}, target=minutes),
        Part("paper's protocol, kernel by kernel", "sft", {**paper, "train.cuda_graphs": False}, 24, 90, minutes),
        *(packed(n, 22) for n in sizes[2:]),
    ]  # fmt: skip


# ---- what is measured: each in its own process ----------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What every part is given."""

    work: Path
    device: str
    tiny: bool

    @property
    def precision(self) -> str:
        return "fp32" if self.tiny else "bf16"

    @property
    def block_size(self) -> int:
        return 128 if self.tiny else 1024


def ceiling(at: Setting) -> dict[str, Any]:
    """The best rate of a few large matrix products."""
    import torch

    dtype = torch.float32 if at.tiny else torch.bfloat16
    best = {}
    for m, k, n in [(256, 256, 256)] if at.tiny else [(8192, 8192, 8192), (16384, 4096, 4096), (16384, 1024, 4096)]:
        a, b = torch.randn(m, k, device=at.device, dtype=dtype), torch.randn(k, n, device=at.device, dtype=dtype)
        seconds = []
        for _ in range(2 if at.tiny else 12):
            synchronise(at.device)
            start = time.perf_counter()
            for _ in range(10):
                a @ b
            synchronise(at.device)
            seconds.append((time.perf_counter() - start) / 10)
        best[f"{m}x{k}x{n}"] = round(2 * m * k * n / min(seconds) / 1e12, 3)
    return {"tflop_per_s": max(best.values()), "by_shape": best}


def train(at: Setting, command: str, options: dict[str, Any]) -> dict[str, Any]:
    """One of our commands, and what its log says."""
    from tunesmith.__main__ import main
    from tunesmith.files.run import Run

    out = at.work / f"run-{os.getpid()}"  # new for each part: one that was stopped leaves its own behind
    shared = {
        "model.name": at.work / "model", "data.name": "sample", "data.block_size": at.block_size,
        "train.device": at.device, "train.precision": at.precision, "eval.at_start": False, "eval.iters": 1,
        "eval.every": 10**6, "checkpoint.every": 10**6, "train.diverge_after": 0, "out": out,
    }  # fmt: skip
    argv = [command]
    for name, value in {**shared, **options}.items():
        argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    if code := main(argv):
        raise SystemExit(code)  # the command has said why
    lines = Run(out).metrics("train")
    shutil.rmtree(out)  # a checkpoint of gigabytes
    return from_log(lines, at, options)


def from_log(lines: list[dict[str, Any]], at: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """Rate, memory and operations of the second half of a run's steps."""
    first, last = lines[len(lines) // 2 - 1], lines[-1]
    steps, seconds = last["step"] - first["step"], last["time"] - first["time"]
    tokens = last["tokens"] - first["tokens"]
    found = {
        "tokens_per_s": round(tokens / seconds, 1), "peak_gb": last["peak_memory_gb"], "steps": steps,
        "iterations_per_s": round(steps / seconds, 3), "minutes": round(PAPER_ITERATIONS * seconds / steps / 60, 1),
        "first_loss": lines[0]["loss"], "last_loss": last["loss"],
    }  # fmt: skip
    if "target_tokens" in last:
        targets = last["target_tokens"] - first["target_tokens"]
        window = at.block_size if options.get("data.batching") == "windows" else 0
        operations = products(model_shape(at.work), tokens, targets, window)
        found |= {
            "supervised_share": round(targets / tokens, 3),
            "tflop_per_s": float(f"{operations / seconds / 1e12:.4g}"),
        }
    return found


def model_shape(work: Path) -> Any:
    """The configuration of the model that everybody trains."""
    from tunesmith.files.weights import config_from_hf, read_json

    return config_from_hf(read_json(work / "model" / "config.json"))


def products(shape: Any, tokens: int, targets: int, window: int = 0) -> float:
    """Floating-point operations of the matrix products that a full training step needs.

    window: tokens of one causal window; 0 leaves attention's own products out (packed dialogues: about 1 %).
    """
    d, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    qkv, rest = 3 * d * d, d * d + 2 * d * inner
    everywhere = shape.n_layer * qkv + (shape.n_layer - 1) * rest
    attention = shape.n_layer * d * window
    return 6.0 * (tokens * (everywhere + attention) + targets * (rest + shape.vocab_size * d))


def child(part: Part, at: Setting) -> None:
    """Measure one part and print its figures as the last line."""
    functions: dict[str, Callable[..., dict[str, Any]]] = {"ceiling": ceiling, "trl": trl}
    found = functions[part.run](at, **part.options) if part.run in functions else train(at, part.run, part.options)
    print("RESULT " + json.dumps(found))


# ---- all of them ----------------------------------------------------------------------------------------------------


def measured(part: Part, at: Setting, seconds: float) -> dict[str, Any]:
    """The figures of a part, or a note that says why there are none."""
    command = [sys.executable, __file__, "--child", part.name, "--work", str(at.work), "--device", at.device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TUNESMITH_CACHE": str(at.work / "cache")}
    process = subprocess.Popen(
        command + ["--tiny"] * at.tiny, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
        process.communicate()
        return {"note": f"stopped after {seconds:.0f} s"}
    line = next((x for x in reversed(out.splitlines()) if x.startswith("RESULT ")), None)
    if line is None:
        said = [x for x in errors.splitlines() if x.strip()]
        return {"note": f"failed: {said[-1][:300] if said else f'exit code {process.returncode}'}"}
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def judged(part: Part, found: dict[str, Any], best_rate: float | None) -> dict[str, Any]:
    """A part's row: its figures, its share of the ceiling, its target and whether that was reached."""
    row = {"part": part.name, **found}
    if best_rate and "tflop_per_s" in found and part.run != "ceiling":
        row["share_of_ceiling"] = float(f"{found['tflop_per_s'] / best_rate:.3g}")
    if part.target:
        figure, sign, value = part.target
        row["target"] = f"{figure.replace('_', ' ')} {sign} {value:g}"
        if figure in row:
            row["reached"] = row[figure] <= value if sign == "<=" else row[figure] >= value
    return row


def run_all(chosen: list[Part], at: Setting, minutes: float) -> Iterator[dict[str, Any]]:
    """The rows one after the other, until the time is up."""
    deadline, best_rate = time.monotonic() + 60 * minutes, None
    for number, part in enumerate(chosen):
        left = deadline - time.monotonic()
        if left < part.share:
            yield judged(part, {"note": "not run: the time was up"}, best_rate)
            continue
        kept = sum(later.share for later in chosen[number + 1 :])
        seconds = 600 if at.tiny else min(part.limit, max(part.share, left - kept))  # a busy processor is no failure
        found = measured(part, at, min(seconds, left))
        best_rate = found.get("tflop_per_s", best_rate) if part.run == "ceiling" else best_rate
        yield judged(part, found, best_rate)


def save_model(work: Path, tiny: bool) -> None:
    """Random weights of GPT-2 medium, or of a tiny model with the sample's tokenizer."""
    import torch

    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.files import weights
    from tunesmith.files.names import SAMPLE
    from tunesmith.models.gpt2 import GPT, GPTConfig
    from tunesmith.models.known import SIZES

    tokenizer = Tokenizer.load(SAMPLE) if tiny else Tokenizer.gpt2()
    small = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, block_size=128)
    model = GPT(small if tiny else SIZES["gpt2-medium"])
    model.init_weights(torch.Generator().manual_seed(0))
    weights.save_model(model, tokenizer, work / "model")


def about(device: str) -> dict[str, Any]:
    """Device and versions."""
    import torch

    from tunesmith.device import describe

    tools: dict[str, str] = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("triton", "torchao", "transformers", "trl", "peft"):
        try:
            tools[name] = version(name)
        except PackageNotFoundError:
            tools[name] = "not installed"
    return {"device": describe(torch.device(device)), "cuda": torch.version.cuda, "versions": tools}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="whether it runs: a tiny model in fp32, a few steps")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="parts whose name holds one of these words; default all"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="parts for which that is too short are left out")
    parser.add_argument("--out", type=Path, help="JSON file, written after each part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(next(p for p in parts(args.tiny) if p.name == args.child), Setting(args.work, args.device, args.tiny))
        return
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here. --device cpu --tiny shows whether the script runs")
    began, rows = time.monotonic(), []
    chosen = [p for p in parts(args.tiny) if not args.only or any(word in p.name for word in args.only)]
    if not chosen:
        raise SystemExit(f"no part is called so; there are: {', '.join(p.name for p in parts(args.tiny))}")
    result = about(args.device) | {"settings": {"model": "tiny" if args.tiny else "gpt2-medium"}, "parts": rows}
    print(f"{result['device']}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        save_model(Path(work), args.tiny)
        minutes = args.minutes - (time.monotonic() - began) / 60
        for row in run_all(chosen, Setting(Path(work), args.device, args.tiny), minutes):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
