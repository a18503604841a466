"""A benchmark's JSON as the Markdown table that README.md and docs/performance.md show.

python benchmarks/table.py benchmarks/results/sft-gpt2-2core.json             # the contestants of one comparison
python benchmarks/table.py benchmarks/results/{sft,dpo}-gpt2-2core.json       # of several, a row each: the fastest rival
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """One row a contestant: tokens/s (lowest and highest), peak memory, tunesmith's speed and memory against it."""
    if "plan" in result:
        return plan_table(result["plan"])
    if result.get("ladder"):
        return ladder(result["summary"])
    unit = result.get("rates_of", "step")
    lines = [
        f"| | tokens/s (slowest to fastest {unit}) | peak GB | tunesmith is faster by | with this share of its memory |",
        "|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        own = row["name"] == "tunesmith"
        spread = f"{row['tokens_per_s']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f})"
        ratios = ("", "") if own else (f"{row['our_speed_ratio']:.2f} x", f"{row['our_memory_ratio']:.2f}")
        name = f"**{row['name']}**" if own else row["name"]
        lines.append(f"| {name} | {spread} | {row['peak_gb']:.2f} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def overview(results: list[dict[str, Any]]) -> str:
    """One row a comparison: tunesmith beside the fastest of the others that do the same work."""
    lines = [
        "| | tunesmith, tokens/s | the fastest other | its tokens/s | tunesmith is faster by | with this share of its memory | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        own, *others = (row for row in result["summary"] if "reference cached" not in row["name"])
        best = min((row for row in others if "tunesmith" not in row["name"]), key=lambda row: row["our_speed_ratio"])
        ratios = f"{best['our_speed_ratio']:.2f} x | {best['our_memory_ratio']:.2f} | {result['settings']['rounds']}"
        rates = f"{own['tokens_per_s']:.0f} | {best['name']} | {best['tokens_per_s']:.0f}"
        lines.append(f"| {comparison(result['settings'])} | {rates} | {ratios} |")
    return "\n".join(lines)


def comparison(settings: dict[str, Any]) -> str:
    """What was compared, in words."""
    task = settings.get("task", "sft")
    words = {
        "sft": "SFT", "dpo": "DPO", "dpo-lora": "DPO, LoRA rank 8", "lora-sft": "SFT, LoRA rank 8",
        "batch": "answers to forty prompts together", "alone": "answers one by one",
    }  # fmt: skip
    return words[task] + (", bf16" if settings["precision"] == "bf16" else "")


def ladder(rows: list[dict[str, Any]]) -> str:
    """One row a way to train: its rate and peak memory, both against the first row, and how far its losses are off."""
    lines = ["| | tokens/s | peak GB | speed | memory | result |", "|---|---|---|---|---|---|"]
    for row in rows:
        off = row["difference"]
        result = "" if off is None else "exact" if off == 0 else f"loss within {off:.1e}"
        name = f"**{row['name']}**" if row["name"] == "tunesmith" else row["name"]
        figures = f"{row['tokens_per_s']:.0f} | {row['peak_gb']:.2f} | {row['speed']:.2f} x | {row['memory']:.2f}"
        lines.append(f"| {name} | {figures} | {result} |")
    return "\n".join(lines)


def gpu_table(result: dict[str, Any]) -> str:
    """One row a part of gpu.py: rate, memory, share of the measured ceiling, and the target with whether it was reached."""
    lines = [
        f"| {result['device']} | tokens/s | peak GB | share of the product ceiling | minutes for 80,000 iterations | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["parts"]:
        if "note" in row:
            note = row["note"].replace("|", "\\|")
            lines.append(f"| {row['part']} | {note} | | | | {row.get('target', '')} |")
            continue
        if "by_shape" in row:
            lines.append(f"| {row['part']} | {row['tflop_per_s']:.0f} TFLOP/s | | 1.00 | | |")
            continue
        rate, peak, share = row.get("tokens_per_s"), row.get("peak_gb"), row.get("share_of_ceiling")
        cells = [f"{rate:,.0f}", "" if peak is None else f"{peak:.2f}", "" if share is None else f"{share:.2f}"]
        minutes = f"{row['minutes']:.0f}" if "protocol" in row["part"] else ""
        target = f"{row['target']}: {'yes' if row['reached'] else 'no'}" if "reached" in row else ""
        lines.append(f"| {row['part']} | {' | '.join(cells)} | {minutes} | {target} |")
    return "\n".join(lines)


def plan_table(rows: list[dict[str, Any]]) -> str:
    """One row a configuration: its peak as planned and measured, with each allocator, and seconds a step; the plan's errors."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["allocator"]] = row
    lines = [
        "| | planned GB | measured | error | lean: planned GB | measured | error | planned s a step | measured | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kinds in by_name.items():
        cells = []
        for row in (kinds.get("fast"), kinds.get("lean")):
            cells += [""] * 3 if row is None else [*_pair(row, "peak_gb"), f"{row['memory_error']:+.1%}"]
        first = next(iter(kinds.values()))
        cells += [*_pair(first, "seconds"), f"{first['time_error']:+.1%}"] if "time_error" in first else [""] * 3
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(row: dict[str, Any], figure: str) -> list[str]:
    return [f"{row[kind][figure]:.3f}" for kind in ("predicted", "measured")]


if __name__ == "__main__":
    found = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    print(overview(found) if len(found) > 1 else gpu_table(found[0]) if "parts" in found[0] else table(found[0]))
