"""`tunesmith data`: what a data set holds, what was skipped and why, and which tokens carry loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from tunesmith.data.audit.cuts import END_CUT, OWN, SHARED, Cut
from tunesmith.data.audit.rows import DIALOGUES, PAIRS, TEXTS
from tunesmith.data.audit.survey import Audit, SplitAudit, audit
from tunesmith.data.chosen_template import chat_template
from tunesmith.data.cutting import USUAL_BLOCK, block_size_of, cut_rows, resolve_block_size
from tunesmith.data.datasets import Source, beside, open_dataset
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.data.texts import resolve_loss_on
from tunesmith.data.token_bytes import ByteRuns, special_text
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import TokenStore, tokenise
from tunesmith.errors import UsageError, UserError
from tunesmith.files.answers import ANSWER_END
from tunesmith.files.names import known_shape, load_tokenizer
from tunesmith.options.commands import DataCommand
from tunesmith.options.training import DataOptions
from tunesmith.stats import Interval


def show_data(name: str, options: DataCommand) -> None:
    """Print the table, the notes and the first rows. Raises: UserError with `data.strict` if any row is bad or cut."""
    data = one_name(name, options.data)
    if not options.audit and (options.against or options.out):
        raise UsageError(f"--{'against' if options.against else 'out'} is for an audit; add --audit true")
    with chat_template(options.chat.template):
        tokenizer = load_tokenizer(options.tokenizer)
    shape = known_shape(options.tokenizer)
    positions = shape.longest if shape else None
    if data.block_size == "auto":  # a size of one's own is held against no model: whose tokenizer it is does not matter
        data = dataclasses.replace(data, block_size=resolve_block_size("auto", positions or USUAL_BLOCK, ""))
    source = open_dataset(data)
    console = Console(highlight=False, soft_wrap=True)
    if options.audit:
        problems = _show_audit(source, data, tokenizer, positions, options, console)
    else:
        problems = _show_figures(source, data, tokenizer, options, console)
    if options.show:
        _show_rows(source, data, tokenizer, options.show, console)
    if data.strict and problems:
        raise UserError(f"--data.strict: {'; '.join(problems)}")


def one_name(name: str, data: DataOptions) -> DataOptions:
    """The options for the data set that a command names. Raises: UsageError if --data.name gives another."""
    if data.name not in (type(data)().name, name):
        raise UsageError(f"two data sets: {name} and --data.name {data.name}; give one")
    return dataclasses.replace(data, name=name)


def _show_figures(
    source: Source, data: DataOptions, tokenizer: Tokenizer, options: DataCommand, console: Console
) -> list[str]:
    stores = [_stored(source, split, data, tokenizer) for split in source.files]
    _show_form(console, {store.split: store.report.form for store in stores})
    loss_on, block_size = resolve_loss_on(data.loss_on, data.batching), block_size_of(data)
    table = Table(title=f"{source.name}, tokens of {options.tokenizer}", title_justify="left")
    table.add_column("")
    figures: dict[str, list[str]] = {}
    problems = []
    for store in stores:
        table.add_column(store.split, justify="right")
        for label, value in _figures(store, loss_on, block_size).items():
            figures.setdefault(label, []).append(value)
        cuts = cut_rows(store, np.arange(len(store)), block_size, data.truncation)[1]
        lines = [*store.report.lines(), *(line for cut in cuts for line in cut.lines(block_size))]
        problems += [f"{store.split}: {line}" for line in lines]
    for label, values in figures.items():
        table.add_row(label, *values)
    console.print(table)
    _show_notes(console, [*source.notes, *(note for store in stores for note in store.report.notes), *problems])
    return problems


def _show_form(console: Console, forms: Mapping[str, Sequence[str]]) -> None:
    """Which form was recognised in each split; what all of them say stands there once."""
    for line in dict.fromkeys(line for lines in forms.values() for line in lines):
        own = [split for split, lines in forms.items() if line in lines]
        console.print(line if len(own) == len(forms) else f"{', '.join(own)}: {line}", markup=False)


def _stored(source: Source, split: str, data: DataOptions, tokenizer: Tokenizer) -> TokenStore:
    return tokenise(source, split, tokenizer, form="texts" if data.batching == "windows" else "dialogues")


def _show_notes(console: Console, lines: Sequence[str]) -> None:
    for line in dict.fromkeys(lines):
        console.print(f"note: {line}", markup=False)


def _show_rows(source: Source, data: DataOptions, tokenizer: Tokenizer, count: int, console: Console) -> None:
    store = _stored(source, next(iter(source.files)), data, tokenizer)
    loss_on = resolve_loss_on(data.loss_on, data.batching)
    for index in range(min(count, len(store))):
        console.print(f"\n[bold]{store.place(index)}[/bold]")
        row = coloured(store, index, loss_on, tokenizer)
        console.print(row if _has_colour(console) else bracketed(row), markup=False, soft_wrap=True)
    if _has_colour(console):
        end = "[white on red]end of answer, also a target[/white on red]"
        console.print(f"\n[dim]context[/dim]  [black on green]carries loss[/black on green]  {end}")
    else:
        end = special_text(tokenizer, store.end_of_answer) or ANSWER_END
        console.print(f"\n[...] carries loss; {end}: end of an answer, also a target", markup=False)


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _figures(store: TokenStore, loss_on: str, block_size: int) -> dict[str, str]:
    lengths, report = store.lengths, store.report
    median, p95 = np.percentile(lengths, [50, 95])
    supervised = len(store.tokens) if loss_on == "all" else int(store.taught.sum())  # before anything is cut
    return {
        "rows": f"{report.rows:,}",
        "rows used": f"{report.used:,}",
        "rows skipped": f"{report.rows - report.used:,}",
        "tokens": f"{len(store.tokens):,}",
        "tokens that carry loss": f"{supervised:,} ({supervised / len(store.tokens):.1%})",
        "tokens per row: mean": f"{lengths.mean():.1f}",
        "median": f"{median:,.0f}",
        "95 %": f"{p95:,.0f}",
        "longest": f"{lengths.max():,}",
        f"rows longer than {block_size:,}": f"{int((lengths > block_size).sum()):,}",
    }


# ---- audit ---------------------------------------------------------------------------------------------------------


def _show_audit(
    source: Source,
    data: DataOptions,
    tokenizer: Tokenizer,
    positions: int | None,
    options: DataCommand,
    console: Console,
) -> list[str]:
    others = [_other(name, data) for name in dict.fromkeys(options.against)]
    survey = audit(
        source,
        tokenizer,
        block_size=block_size_of(data),
        truncation=None if data.batching == "windows" else data.truncation,
        loss_on=resolve_loss_on(data.loss_on, data.batching),
        holdout=data.holdout,
        seed=data.rows_seed,
        against=others,
        positions=positions,
    )
    _show_form(console, {split.split: split.form for split in survey.splits})
    console.print(audit_table(survey, options.tokenizer))
    problems = survey.problems()
    _show_notes(console, [*source.notes, *problems, *survey.remarks()])
    if options.out:
        record = {"tokenizer": options.tokenizer, **dataclasses.asdict(survey), "problems": problems}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    return problems


def _other(name: str, data: DataOptions) -> Source:
    """A set to compare with, whole: `data.max_rows` is for the audited one."""
    try:
        return open_dataset(beside(data, name))
    except UserError as error:
        raise type(error)(f"--against {name}: {error}") from None


def audit_table(survey: Audit, tokenizer: str) -> Table:
    """What was found, a column a split; counts with their share. Checks and losses of which there are none are counted."""
    audited = f"audited at {survey.block_size:,} tokens of {tokenizer} (--data.truncation {survey.truncation})"
    table = Table(title=f"{survey.name}, {audited}", title_justify="left")
    table.add_column("")
    sections: dict[str, dict[str, dict[str, str]]] = {}
    for split in survey.splits:
        table.add_column(split.split, justify="right")
        for section, lines in _audit_lines(split, survey).items():
            labels = sections.setdefault(section, {})
            for label, text in lines.items():
                labels.setdefault(label, {})[split.split] = text
    for section, labels in ((k, v) for k, v in sections.items() if v):
        table.add_row(RichText(section, style="bold"))
        shown = {k: v for k, v in labels.items() if section in ALWAYS or k == LONGER or set(v.values()) != {"0"}}
        if section == DEFECTS:
            shown["of all other kinds" if shown else "of any kind"] = {s.split: "0" for s in survey.splits}
        for label, texts in shown.items():
            table.add_row(RichText(f"  {label}"), *(texts.get(s.split, "") for s in survey.splits))
    return table


ROWS, DEFECTS, OVERLAP, TOKENS, LENGTH = ("rows", "defects", "overlap", "tokens, mean (max)", "chosen by length")
ALWAYS, LONGER = (ROWS, OVERLAP, TOKENS, LENGTH), "longer than that"


def _audit_lines(split: SplitAudit, survey: Audit) -> dict[str, dict[str, str]]:
    """Section -> label -> figure; sections are in the same order for every split."""
    rows = {"all": f"{split.rows:,}", **{form: f"{n:,}" for form, n in split.forms.items()}}
    rows["usable"] = _count(split.usable, split.rows)
    if set(split.forms) - {TEXTS}:
        rows["prompt repeats an earlier row's"] = _count(split.repeated_prompts, split.rows)
    sections = {ROWS: rows, DEFECTS: {f.what: _count(f.rows, split.rows) for f in split.findings}}
    for cut in split.cuts:
        sections[_rule_name(cut, survey)] = _cut_lines(cut)
    sections |= {OVERLAP: {}, TOKENS: {k: f"{v.mean:,.1f} ({v.longest:,})" for k, v in split.lengths.items()}}
    for o in split.overlaps:
        whose = f" of {o.rows:,} held out" if o.whose else ""
        sections[OVERLAP][f"prompts{whose} in {o.other}"] = _count(o.prompts, o.rows)
        sections[OVERLAP][f"whole texts{whose} in {o.other}"] = _count(o.texts, o.rows)
    if split.bias:
        sections[LENGTH] = {
            "longer than rejected": _share(split.bias.longer),
            "equally long": _share(split.bias.equal),
            "`longer is better` is right": _share(split.bias.rule),
        }
    return sections


def _rule_name(cut: Cut, survey: Audit) -> str:
    here = survey.truncation if survey.truncation != "auto" else "split" if cut.form == TEXTS else "keep_end"
    rule = {END_CUT: "end cut off", SHARED: "in proportion", OWN: f"here: {here}"}[cut.rule]
    return f"{cut.form} at {survey.block_size:,}, {rule}"


def _cut_lines(cut: Cut) -> dict[str, str]:
    """What can happen under the rule, also where it did not."""
    kinds = {LONGER: cut.cut}
    if cut.rule == OWN:
        kinds |= {"left out": cut.left_out}
    if cut.form != TEXTS:
        kinds |= {"became identical" if cut.form == PAIRS else "nothing left to learn": cut.no_signal}
    what = {PAIRS: "chosen answer", DIALOGUES: "last answer", TEXTS: "text"}[cut.form]
    kinds |= {f"{what} without its end": cut.end_lost}
    if cut.form != TEXTS:
        kinds |= {"end of the prompt lost": cut.prompt_end_lost}
        if cut.rule == OWN:
            kinds |= {"beginning of the prompt lost": cut.prompt_start_lost}
    return {label: _count(n, cut.rows) for label, n in kinds.items()}


def _count(n: int, of: int) -> str:
    return f"{n:,} ({n / of:.1%})" if n and n != of else f"{n:,}"


def _share(share: Interval) -> str:
    return f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"


# ---- rows in colour ------------------------------------------------------------------------------------------------


def coloured(store: TokenStore, index: int, loss_on: str, tokenizer: Tokenizer) -> RichText:
    """A row's text, each token in the colour of what it is for; the number of coloured tokens is the loss's denominator.

    A token is coloured where it is a *target*. Special tokens are written out. The end of an answer is one of the row's tokens,
    or a target that no row holds: then it is written where it would stand.
    """
    tokens, targets = (column.tolist() for column in store.row(index, loss_on))
    text, ends = RichText(), (store.end_of_text, store.end_of_answer)
    decoder = ByteRuns(tokenizer)
    for token, learned, target, following in zip(
        tokens, [IGNORE_INDEX, *targets], targets, [*tokens[1:], IGNORE_INDEX], strict=False
    ):
        style = "dim" if learned != token else "white on red" if token in ends else "black on green"
        text.append(special_text(tokenizer, token) or decoder(token), style=style)
        if target in ends and target != following:
            text.append(special_text(tokenizer, target) or ANSWER_END, style="white on red")
    return text


def bracketed(row: RichText) -> str:
    """A row of `coloured` without colours: what carries loss stands in brackets, each stretch in its own."""
    parts: list[tuple[str, bool]] = []
    for span in row.spans:
        text, loss = row.plain[span.start : span.end], span.style != "dim"
        if parts and parts[-1][1] == loss:
            parts[-1] = parts[-1][0] + text, loss
        else:
            parts.append((text, loss))
    return "".join(f"[{text}]" if loss else text for text, loss in parts)
