"""Answers to the embedded prompts, greedy: tunesmith's decoding beside transformers' `generate`, tokens/s and peak memory.

    python benchmarks/generation.py --rounds 3 --out benchmarks/results

Tasks (`--task`): `batch` answers forty prompts together (transformers: one left-padded batch), `alone` ten of them one after
the other. Same weights (GPT-2 shape, random, seed 0), same prompts as ids, fp32, 100 new tokens each. Everybody must say
the same: rows that differ are counted, and how far apart the two tokens were in the logits where a row first differs.
Contestants run in turn, each in its own process (A B C A B C ...).

`tunesmith` is what `tunesmith score` and `chat` run: weights packed for good. The rows below it take one thing away each: the
packing, then oneDNN's products. `tuned` and `stock` are as in sft.py; `static cache` is transformers' own, not compiled,
in place of the one that grows. Rates are new tokens by the time of the whole call, the reading of the prompts included, from
ids to ids; a short call comes before the clock. Memory is the process's peak resident set, imports included.

With `--device cuda` the row below `tunesmith` takes the recorded steps away, and `static cache` is compiled by transformers
itself, as it does on a GPU, its length the same for all calls. A call of full length comes before the clock, for
what is compiled and recorded; ours records in every call, so that is on the clock too. Memory is the allocator's peak.

The limit. Every step reads all weights and the keys and values so far, and multiplies; neither can be faster than this
machine reads (the sum of the embedding) and multiplies (an MLP's first layer at 1,024 tokens), both measured beside each of
our runs. The floor adds up, step by step, the longer of the two; the bytes that a run must read by the time it
took are its bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contest import Found, choose_kernel, measure, show, summary, write_result
from sft import rival_model, save_weights

Rows = list[list[int]]
Run = Callable[[Path, Rows, int, int, bool, str], dict[str, Any]]
"""A contestant: (work, prompts, new tokens, prompts at a time, tuned, device) -> {"seconds", "rows": the answers' ids, "peak_gb"}."""


# ---- contestants: each runs in its own process and prints one JSON line ----------------------------------------------


def timed(answer: Callable[[Rows, int], Rows], prompts: Rows, new: int, together: int, device: str) -> dict[str, Any]:
    """Run a contestant's `answer` once shortly (on a GPU in full), then on the clock. Answers are on the host: nothing is waited for."""
    import torch

    from tunesmith.device import peak_memory_gb

    groups = [prompts[i : i + together] for i in range(0, len(prompts), together)]
    answer(groups[0], 2 if device == "cpu" else new)
    start = time.perf_counter()
    rows = [row for group in groups for row in answer(group, new)]
    return {"seconds": time.perf_counter() - start, "rows": rows, "peak_gb": peak_memory_gb(torch.device(device))}


def run_ours(
    work: Path, prompts: Rows, new: int, together: int, tuned: bool, device: str,
    packed: bool = True, onednn: bool = True, recorded: bool = True,
) -> dict[str, Any]:  # fmt: skip
    from tunesmith.device import keep_freed_memory

    keep_freed_memory()  # as the commands do by themselves
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.files.weights import load_model
    from tunesmith.generation import token_graph as decoding
    from tunesmith.generation.engine import decode, prepare
    from tunesmith.generation.sampling import Sampling
    from tunesmith.models import linear

    if not onednn:
        linear._has_onednn = lambda: False
    if not recorded:
        decoding.recorder = lambda device, steps: None
    model, tokenizer = load_model(work / "model").to(device), Tokenizer.load(work / "model")
    pack_head = linear.packed_weights(model.lm_head)
    if packed:
        prepare(model)
        pack_head.__enter__()  # as `generate_answers` does for the time of a long call

    def answer(group: Rows, n: int) -> Rows:
        rows: Rows = [[] for _ in group]
        for row, token, _ in decode(model, tokenizer, group, Sampling(temperature=0), n):
            rows[row].append(token)
        return rows

    found = timed(answer, prompts, new, together, device)
    return found | machine_rates(model)


def run_transformers(
    work: Path, prompts: Rows, new: int, together: int, tuned: bool, device: str, static: bool = False
) -> dict[str, Any]:
    import torch

    model = rival_model(work, tuned).eval().to(device)
    end = model.config.eos_token_id
    more: dict[str, Any] = {}
    if static:  # of one length for all prompts: else each would be compiled for
        more = {"cache_implementation": "static", "max_cache_len": max(map(len, prompts)) + new}
        more["disable_compile"] = device == "cpu"

    def answer(group: Rows, n: int) -> Rows:
        width = max(map(len, group))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in group], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group], device=device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=end, **more)
        rows = out[:, width:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    return timed(answer, prompts, new, together, device)


TASKS: dict[str, dict[str, tuple[Run, bool]]] = {  # on a CPU; task: name: (function, tuned)
    "batch": {
        "tunesmith": (run_ours, False),
        "tunesmith, not packed": (partial(run_ours, packed=False), False),
        "tunesmith, torch's own products": (partial(run_ours, packed=False, onednn=False), False),
        "transformers, tuned": (run_transformers, True),
        "transformers, tuned, static cache": (partial(run_transformers, static=True), True),
        "transformers, stock": (run_transformers, False),
    },
    "alone": {
        "tunesmith": (run_ours, False),
        "tunesmith, not packed": (partial(run_ours, packed=False), False),
        "transformers, tuned": (run_transformers, True),
        "transformers, stock": (run_transformers, False),
    },
}
ON_A_GPU: dict[str, tuple[Run, bool]] = {  # in both tasks
    "tunesmith": (run_ours, False),
    "tunesmith, steps not recorded": (partial(run_ours, recorded=False), False),
    "transformers, tuned": (run_transformers, True),
    "transformers, tuned, static cache": (partial(run_transformers, static=True), True),
    "transformers, stock": (run_transformers, False),
}


def child(task: str, name: str, work: Path, device: str) -> None:
    """Run one contestant and print its figures as the last line."""
    given = json.loads((work / f"{task}.json").read_text())
    run, tuned = contestants(task, device)[name]
    if tuned and device == "cpu":
        choose_kernel()
    print("RESULT " + json.dumps(run(work, given["prompts"], given["new"], given["together"], tuned, device)))


def contestants(task: str, device: str) -> dict[str, tuple[Run, bool]]:
    """Who takes part on a device: name -> (function, tuned)."""
    return TASKS[task] if device == "cpu" else ON_A_GPU


# ---- the limit ------------------------------------------------------------------------------------------------------


def machine_rates(model: Any) -> dict[str, float]:
    """How fast this machine reads and multiplies at best, now: GB/s and GFLOP/s."""
    import torch

    table, layer = model.wte.weight, model.h[0].mlp.c_fc
    x = torch.randn(1024, layer.in_features, device=table.device)

    def wait() -> None:
        if table.is_cuda:
            torch.cuda.synchronize(table.device)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(8):
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    with torch.no_grad():
        reading, multiplying = best(table.sum), best(lambda: layer(x))
    operations = 2 * x.numel() * layer.out_features
    return {"read_gb_per_s": 4 * table.numel() / reading / 1e9, "gflop_per_s": operations / multiplying / 1e9}


def steps(config: Any, prompts: Rows, rows: Rows, together: int) -> list[tuple[float, float]]:
    """(bytes that must be read, operations) of every pass through the model, prompts first."""
    blocks = config.n_layer * 2 * config.n_embd * (2 * config.n_embd + (config.n_inner or 4 * config.n_embd))
    head, held = config.vocab_size * config.n_embd, 4 * 2 * config.n_layer * config.n_embd  # held: bytes a token
    found = []
    for start in range(0, len(prompts), together):
        lengths = [len(p) for p in prompts[start : start + together]]
        answers = [len(row) for row in rows[start : start + together]]
        found.append((4.0 * (blocks + head), 2.0 * (blocks * sum(lengths) + head * len(lengths))))
        for step in range(1, max(answers)):
            going = [n + step for n, answer in zip(lengths, answers, strict=True) if answer > step]
            found.append((4.0 * (blocks + head) + held * sum(going), 2.0 * (blocks + head) * len(going)))
    return found


def limits(config: Any, given: dict[str, Any], found: Found) -> dict[str, Any]:
    """The floor by the best rates that any of our runs saw, and how near everybody came to it."""
    own = found["tunesmith"]
    read, product = max(r["read_gb_per_s"] for r in own), max(r["gflop_per_s"] for r in own)
    passes = steps(config, given["prompts"], own[0]["rows"], given["together"])
    tokens = sum(map(len, own[0]["rows"]))
    floor = sum(max(size / read, operations / product) / 1e9 for size, operations in passes)
    bandwidth = {
        name: round(sum(size for size, _ in passes) / statistics.median(r["seconds"] for r in runs) / 1e9, 2)
        for name, runs in found.items()
    }
    seconds = statistics.median(r["seconds"] for r in own)
    return {
        "read_gb_per_s": round(read, 1), "gflop_per_s": round(product, 1), "gb_to_read": round(sum(s for s, _ in passes) / 1e9, 1),
        "tflop": round(sum(o for _, o in passes) / 1e12, 2), "floor_tokens_per_s": round(tokens / floor, 1),
        "share_of_floor": round(floor / seconds, 3), "achieved_gb_per_s": bandwidth,
    }  # fmt: skip


def same_tokens(model: Any, prompts: Rows, found: Found) -> dict[str, Any]:
    """For each contestant the rows that equal ours in all rounds, and the largest gap in the logits where one first differs."""
    import torch

    ours, agreement = found["tunesmith"][0]["rows"], {}
    for name, runs in found.items():
        differing, gaps = set(), [0.0]
        for run in runs:
            for i, (a, b) in enumerate(zip(ours, run["rows"], strict=True)):
                if a != b:
                    at = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                    differing.add(i)
                    if at < min(len(a), len(b)):
                        with torch.no_grad():
                            logits = model.lm_head(model(torch.tensor([prompts[i] + a[:at]])))[0, -1]
                        gaps.append(abs(float(logits[a[at]] - logits[b[at]])))
        agreement[name] = {"rows": len(ours), "equal": len(ours) - len(differing), "largest_gap": max(gaps)}
    return agreement


# ---- the comparison -------------------------------------------------------------------------------------------------


def given_prompts(count: int) -> Rows:
    """Ids of the embedded prompts, as every command encodes them."""
    from tunesmith.data.prompts import encode_prompt, load_prompts
    from tunesmith.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.gpt2()
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": p.text}]) for p in load_prompts()]
    return [prompts[i % len(prompts)] for i in range(count)]


def compare(task: str, args: argparse.Namespace) -> None:
    """One task: its contestants, its table, its file."""
    all_of_them = contestants(task, args.device)
    chosen = {n: tuned for n, (_, tuned) in all_of_them.items() if not args.only or n in (*args.only, "tunesmith")}
    count = args.prompts if task == "batch" else args.alone
    given = {"prompts": given_prompts(count), "new": args.new, "together": count if task == "batch" else 1}
    lengths = [len(p) for p in given["prompts"]]
    about = {
        "prompts": count, "prompts_together": given["together"], "new_tokens": args.new,
        "prompt_tokens": {"shortest": min(lengths), "mean": round(statistics.mean(lengths), 1), "longest": max(lengths)},
    }  # fmt: skip

    def rates(run: dict[str, Any]) -> list[float]:
        return [sum(map(len, run["rows"])) / run["seconds"]]

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        model = save_weights(Path(work), args.model)
        (Path(work) / f"{task}.json").write_text(json.dumps(given))
        print(f"\n{task}: {json.dumps(about)}", flush=True)
        found = measure(__file__, chosen, ["--task", task, "--work", work, "--device", args.device], args.rounds, rates)
    rows = summary(found, rates)
    show(rows)
    limit, agreement = limits(model.config, given, found), same_tokens(model, given["prompts"], found)
    print(
        f"the limit: {limit['floor_tokens_per_s']:.1f} tokens/s at {limit['read_gb_per_s']} GB/s read and "
        f"{limit['gflop_per_s']} GFLOP/s multiplied; tunesmith reaches {limit['share_of_floor']:.0%} of it"
    )
    for name, gb in limit["achieved_gb_per_s"].items():
        equal, gap = agreement[name]["equal"], agreement[name]["largest_gap"]
        said = f"{equal} of {count} answers have our tokens" + (
            f", the others by {gap:.1e} in the logits" if gap else ""
        )
        print(f"{name:36} {gb:6.2f} GB/s; {said}")
    print(f"{task} took {(time.perf_counter() - began) / 60:.1f} minutes")
    if args.out:
        for run in (run for runs in found.values() for run in runs):
            run["tokens"] = sum(map(len, run.pop("rows")))
        settings = {"task": task, "model": args.model, "rounds": args.rounds, "precision": "fp32", **about}
        settings["parameters"] = model.parameter_count()
        where = f"{os.cpu_count()}core" if args.device == "cpu" else args.device
        path = args.out / f"generation-{task}-{args.model}-{where}.json"
        about = {"limit": limit, "same_tokens": agreement}
        write_result(path, settings, rows, found, device=args.device, rates_of="round", **about)


def main() -> None:
    from tunesmith.device import resolve_device
    from tunesmith.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {name: None for contestants in (*TASKS.values(), ON_A_GPU) for name in contestants}
    parser.add_argument("--model", default="gpt2", help="gpt2, gpt2-medium, ... or small (6 layers, width 384)")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default all")
    parser.add_argument("--only", nargs="+", choices=names, help="contestants; default all of each task")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=40, help="prompts answered together")
    parser.add_argument("--alone", type=int, default=10, help="prompts answered one after the other")
    parser.add_argument("--new", type=int, default=100, help="new tokens a prompt")
    parser.add_argument(
        "--quick", action="store_true", help="whether it runs: small model, 3 prompts, 4 tokens, 1 round"
    )
    parser.add_argument("--out", type=Path, help="directory for the results, a JSON file a task")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.task[0], args.child, args.work, args.device)
        return
    try:
        resolve_device(args.device, "--device")
    except UserError as error:
        parser.error(str(error))
    if args.quick:
        args.model, args.prompts, args.alone, args.new, args.rounds = "small", 3, 2, 4, 1
    for task in args.task:
        compare(task, args)


if __name__ == "__main__":
    main()
