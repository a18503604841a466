"""`tunesmith compare A B`: the same prompts to two models, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.device import keep_freed_memory
from tunesmith.generation import Answer, Sampling, generate_answers, prepare
from tunesmith.models import load
from tunesmith.options import CompareCommand, GenerateOptions
from tunesmith.prompts import Prompt, load_prompts


def answer_prompts(
    model_name: str, prompts: Sequence[Prompt], options: GenerateOptions, device: str = "auto"
) -> list[Answer]:
    """One answer a prompt. The streams of chance depend on prompt and seed only, so two models meet the same luck."""
    model, tokenizer = load(model_name, device=device)
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    conversations = [[{"role": "user", "content": p.text}] for p in prompts]
    return generate_answers(prepare(model), tokenizer, conversations, sampling, options.max_new_tokens)


def compare(a: str, b: str, options: CompareCommand) -> list[dict[str, Any]]:
    """Print the table; return (and with `out` write) one record a prompt."""
    keep_freed_memory()
    prompts = load_prompts(options.prompts, options.limit)
    answers = {name: answer_prompts(name, prompts, options.generate, options.device) for name in (a, b)}
    table = Table(show_lines=True)
    for heading in ("prompt", a, b):
        table.add_column(escape(heading), ratio=1, overflow="fold")
    records = []
    for i, prompt in enumerate(prompts):
        pair = {name: answers[name][i] for name in (a, b)}
        table.add_row(
            escape(prompt.text),
            *(escape(re.sub(r"\n\s*\n", "\n", pair[name].text.strip())) + _ending(pair[name]) for name in (a, b)),
        )
        record = {
            name: {"answer": x.text, "finish_reason": x.finish_reason, "tokens": x.tokens} for name, x in pair.items()
        }
        records.append({"prompt": prompt.text, "group": prompt.group, "answers": record})
    Console(highlight=False).print(table)
    if options.out:
        Path(options.out).write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
        )
    return records


def _ending(answer: Answer) -> str:
    return "" if answer.finish_reason == "stop" else " [dim](cut at the token limit)[/dim]"
