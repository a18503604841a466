"""`tunesmith evaluate`: loss and perplexity of a model on a data set, over the answers and over all tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunesmith.batching import Batches
from tunesmith.datasets import open_dataset
from tunesmith.device import keep_freed_memory, resolve_precision
from tunesmith.errors import UserError
from tunesmith.evaluate import estimate_loss
from tunesmith.models import load
from tunesmith.options import EvaluateCommand
from tunesmith.tokenstore import tokenise


def evaluate(model_name: str, dataset: str, options: EvaluateCommand) -> dict[str, Any]:
    """Print and return `{"response": {...}, "all": {...}}`: loss in nats a token, perplexity and token count of each."""
    keep_freed_memory()
    model, tokenizer = load(model_name, device=options.device)
    data = dataclasses.replace(options.data, name=dataset)
    source = open_dataset(data)
    split = options.split if options.split in source.files else "train"
    store = tokenise(source, split, tokenizer)
    precision = resolve_precision(options.precision, model.wte.weight.device, model.config.n_embd)
    result: dict[str, Any] = {"model": model_name, "dataset": dataset, "split": split, "rows": len(store)}
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{model_name} on {dataset} ({split}, {len(store):,} rows)", title_justify="left")
    for heading in ("tokens counted", "tokens", "loss (nats)", "perplexity"):
        table.add_column(heading, justify="left" if heading == "tokens counted" else "right")
    for label, loss_on in (("response", "assistant"), ("all", "all")):
        batches = Batches(
            store, range(len(store)), batching="packed", block_size=min(data.block_size, model.config.block_size),
            batch_size=options.batch_size, loss_on=loss_on, truncation=data.truncation, shuffle=False,
        )  # fmt: skip
        found = estimate_loss(model, batches.fixed(), precision)
        result[label] = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
        table.add_row(label, f"{found.tokens:,}", f"{found.loss:.4f}", f"{found.perplexity:,.2f}")
    console.print(table)
    cut = [line for t in batches.truncations for line in t.lines(batches.block_size)]
    problems = [*store.report.lines(), *cut]
    for line in [*source.notes, *store.report.notes, *problems]:
        console.print(f"note: {line}", markup=False)
    if data.strict and problems:
        raise UserError(f"--data.strict: {'; '.join(problems)}")
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
