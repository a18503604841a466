"""What the comparisons share: contestants in processes of their own, in turn, their figures, and the result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

Figures = tuple[list[float], list[float]] | tuple[list[float], list[float], list[int]]
"""Seconds of each step after the warm-up, the losses of all steps, and the tokens of each timed step where it has its own rows."""
Run = Callable[[Path, int, int, bool], Figures]
"""A contestant: (work, steps, warmup, tuned) -> its figures."""

ALLOCATORS = {  # what a rival is given: True, tuned for speed; "lean", for memory: as our two settings of glibc's allocator
    True: {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)},
    "lean": {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17), "THP_MEM_ALLOC_ENABLE": "1"},
    False: {},
}
Tuned = bool | Literal["lean"]


def choose_kernel() -> None:
    """Give torch's float32 products on a CPU to oneDNN. With AVX512 they round as before; with AMX they would be bf16."""
    import torch

    torch.set_float32_matmul_precision("medium")  # "high" changed nothing


class Clock:
    """Seconds of each step, the first ones left out."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.marks = warmup, [time.perf_counter()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)][self.warmup :]


def child(run: Run, work: Path, steps: int, warmup: int, tuned: Tuned) -> None:
    """Run one contestant and print its figures as the last line."""
    if tuned:
        choose_kernel()
    seconds, losses, *tokens = run(work, steps, warmup, bool(tuned))
    found = {"seconds": seconds, "losses": [float(x) for x in losses], "peak_gb": peak_gb()}
    print("RESULT " + json.dumps(found | ({"tokens": tokens[0]} if tokens else {})))


def peak_gb() -> float:
    """This process's peak resident set. Not getrusage's: a new process inherits there the peak of the one it came from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


Found = dict[str, list[dict[str, Any]]]
"""The figures of each contestant, round by round."""
Rates = Callable[[dict[str, Any]], list[float]]
"""The figures of one contestant in one round -> its rates, tokens a second: one a step, or one for the whole round."""
ROW = 1024  # tokens of a packed row


def step_rates(run: dict[str, Any]) -> list[float]:
    """Of steps of one packed row, or of as many tokens as really went through the model."""
    tokens = run.get("tokens") or [ROW] * len(run["seconds"])
    return [n / s for n, s in zip(tokens, run["seconds"], strict=True)]


QUIET, TRIES = 0.1, 2  # the share of the cores that others may take; how often a contestant runs at most to see that


def busy_seconds() -> float:
    """Processor seconds of everybody on this machine so far, those that its host took away included."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def undisturbed(command: list[str], environment: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a process, again while others take part of the cores meanwhile: the least disturbed run, and the others' share."""
    runs = []
    while not runs or (min(share for _, share in runs) > QUIET and len(runs) < TRIES):
        began, busy, own = time.perf_counter(), busy_seconds(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        others = busy_seconds() - busy - (sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - own)
        runs.append((done, max(0.0, others) / (time.perf_counter() - began) / (os.cpu_count() or 1)))
    return min(runs, key=lambda run: run[1])


def measure(script: str, contestants: Mapping[str, Tuned], arguments: list[str], rounds: int, rates: Rates) -> Found:
    """All contestants in turn, `rounds` times, each as a new process of `script`. contestants: name -> tuned."""
    found: Found = {name: [] for name in contestants}
    for number in range(rounds):
        for name, tuned in contestants.items():
            environment = {**os.environ, **ALLOCATORS[tuned], "HF_HUB_OFFLINE": "1"}
            done, others = undisturbed([sys.executable, script, "--child", name, *arguments], environment)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            last = json.loads(line.removeprefix("RESULT ")) | {"others_share": round(others, 3)}
            found[name].append(last)
            rate = statistics.median(rates(last))
            print(
                f"round {number + 1}: {name:36} {rate:7.1f} tokens/s  {last['peak_gb']:.2f} GB  others {others:.0%}",
                flush=True,
            )
    return found


def summary(found: Found, rates: Rates) -> list[dict[str, Any]]:
    """A row a contestant: its median rate, its peak memory, and the first contestant's against it, paired by round."""
    first = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        all_rates = [rate for run in runs for rate in rates(run)]
        ratios = [
            statistics.median(rates(own)) / statistics.median(rates(theirs))
            for own, theirs in zip(first, runs, strict=True)
        ]
        memory = [own["peak_gb"] / theirs["peak_gb"] for own, theirs in zip(first, runs, strict=True)]
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(statistics.median(all_rates), 1),
                "slowest": round(min(all_rates), 1),
                "fastest": round(max(all_rates), 1),
                "peak_gb": round(statistics.median(r["peak_gb"] for r in runs), 3),
                "our_speed_ratio": round(statistics.median(ratios), 3),
                "our_memory_ratio": round(statistics.median(memory), 3),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The summary in the terminal."""
    print(f"\n{'':36} tokens/s (min-max)         GB   ours: speed x   memory x")
    for r in rows:
        spread = f"{r['tokens_per_s']:7.1f} ({r['slowest']:.0f}-{r['fastest']:.0f})"
        print(
            f"{r['name']:36} {spread:22} {r['peak_gb']:5.2f}  {r['our_speed_ratio']:10.2f}  {r['our_memory_ratio']:10.2f}"
        )


def processor() -> str:
    """Its maker's name for it, with family and model, which tell generations of one name apart."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name, *numbers = (about.get(key, "") for key in ("model name", "cpu family", "model"))
    return f"{name}, family {numbers[0]}, model {numbers[1]}" if name else platform.machine()


def write_result(
    path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], found: Found, device: str = "cpu", **more: Any
) -> None:
    """The JSON file: machine, versions, settings, summary, whatever else is given, and the runs."""
    import torch

    from tunesmith.device import describe

    machine = {"device": describe(torch.device(device)), "processor": processor()}
    tools = {name: version(name) for name in ("transformers", "trl", "peft")}
    versions = {"torch": torch.__version__, "python": platform.python_version(), **tools}
    result = {"machine": machine, "versions": versions, "settings": settings, "summary": rows, **more, "runs": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def options(about: str) -> argparse.ArgumentParser:
    """The options that the comparisons share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, ... or small (6 layers, width 384)")
    parser.add_argument("--root", help="HH-RLHF in the publisher's layout; default: the embedded sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


Tasks = dict[str, dict[str, tuple[Run, Tuned]]]
"""Task -> name of a contestant -> (function, tuned)."""


def run_tasks(
    parser: argparse.ArgumentParser, tasks: Tasks, compare: Callable[[str, argparse.Namespace], None]
) -> None:
    """The command line of a script with several tasks: `compare` for each that is asked for, or one contestant as a child."""
    names = {name: None for contestants in tasks.values() for name in contestants}
    parser.add_argument("--task", nargs="+", choices=tasks, default=list(tasks), help="default all")
    parser.add_argument("--only", nargs="+", choices=names, help="contestants; default all of each task")
    parser.add_argument("--out", type=Path, help="directory for the results, a JSON file a task")
    args = parser.parse_args()
    if args.child:
        run, tuned = tasks[args.task[0]][args.child]
        child(run, args.work, args.steps, args.warmup, tuned)
        return
    for task in args.task:
        compare(task, args)
