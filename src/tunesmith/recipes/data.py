"""`tunesmith data`: what a data set holds, what was skipped and why, and which tokens carry loss."""

from __future__ import annotations

import dataclasses

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from tunesmith.batching import cut_rows, resolve_loss_on
from tunesmith.datasets import open_dataset
from tunesmith.errors import UserError
from tunesmith.losses import IGNORE_INDEX
from tunesmith.models import find_model
from tunesmith.options import DataCommand
from tunesmith.tokenizer import END_OF_TEXT, ByteRuns, Tokenizer
from tunesmith.tokenstore import TokenStore, tokenise


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a MODEL; GPT-2's own needs no download."""
    return Tokenizer.gpt2() if name == "gpt2" else Tokenizer.load(find_model(name))


def show_data(name: str, options: DataCommand) -> None:
    """Print the table, the notes and the first rows. Raises: UserError with `data.strict` if any row is bad or cut."""
    data = dataclasses.replace(options.data, name=name)
    tokenizer = load_tokenizer(options.tokenizer)
    source = open_dataset(data)
    stores = [
        tokenise(source, split, tokenizer, form="texts" if data.batching == "windows" else "dialogues")
        for split in source.files
    ]
    loss_on = resolve_loss_on(data.loss_on, data.batching)
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{name}, tokens of {options.tokenizer}", title_justify="left")
    table.add_column("")
    figures: dict[str, list[str]] = {}
    problems = []
    for store in stores:
        table.add_column(store.split, justify="right")
        for label, value in _figures(store, loss_on, data.block_size).items():
            figures.setdefault(label, []).append(value)
        cut = [
            line
            for t in cut_rows(store, range(len(store)), data.block_size, data.truncation)[1]
            for line in t.lines(data.block_size)
        ]
        problems += [f"{store.split}: {line}" for line in [*store.report.lines(), *cut]]
    for label, values in figures.items():
        table.add_row(label, *values)
    console.print(table)
    for line in [*source.notes, *(note for store in stores for note in store.report.notes), *problems]:
        console.print(f"note: {line}", markup=False)
    for index in range(min(options.show, len(stores[0]))):
        console.print(f"\n[bold]{stores[0].place(index)}[/bold]")
        console.print(coloured(stores[0], index, loss_on, tokenizer))
    if options.show:
        console.print(
            "\n[dim]context[/dim]  [black on green]carries loss[/black on green]  [white on red]end of answer, also a target[/white on red]"
        )
    if data.strict and problems:
        raise UserError(f"--data.strict: {'; '.join(problems)}")


def _figures(store: TokenStore, loss_on: str, block_size: int) -> dict[str, str]:
    lengths, report = store.lengths, store.report
    median, p95 = np.percentile(lengths, [50, 95])
    supervised = supervised_tokens(store, loss_on)
    return {
        "rows": f"{report.rows:,}",
        "rows used": f"{report.used:,}",
        "rows skipped": f"{report.rows - report.used:,}",
        "tokens": f"{len(store.tokens):,}",
        "tokens that carry loss": f"{supervised:,} ({supervised / len(store.tokens):.1%})",
        "tokens a row: mean": f"{lengths.mean():.1f}",
        "median": f"{median:,.0f}",
        "95 %": f"{p95:,.0f}",
        "longest": f"{lengths.max():,}",
        f"rows longer than {block_size:,}": f"{int((lengths > block_size).sum()):,}",
    }


def supervised_tokens(store: TokenStore, loss_on: str) -> int:
    """Targets in a split, before anything is cut."""
    if loss_on == "all":
        return len(store.tokens)
    return int(np.count_nonzero(store.flags & 1) + np.count_nonzero(store.flags & 2))


def coloured(store: TokenStore, index: int, loss_on: str, tokenizer: Tokenizer) -> RichText:
    """A row's text, each token in the colour of what it is for; the number of coloured tokens is the loss's denominator.

    A token is coloured where it is a *target*. The end of an answer is a target without being in the text.
    """
    tokens, targets = store.row(index, loss_on)
    text = RichText()
    decoder = ByteRuns(tokenizer)
    previous = IGNORE_INDEX
    for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        text.append(decoder(token), style="black on green" if previous == token else "dim")
        if target == store.end_of_text:
            text.append(END_OF_TEXT, style="white on red")
        previous = target
    return text
