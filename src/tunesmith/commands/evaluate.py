"""`tunesmith evaluate MODEL DATASET`: loss and perplexity of a model, by turn and by length; on pairs, what it prefers.

A reward model, ours or any sequence classifier, is measured on pairs by its scores; a language model by the
log-probabilities of the two answers, held against a reference where there is one. Everything has its 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.commands.data import one_name
from tunesmith.data.chosen_template import chat_template
from tunesmith.data.cutting import resolve_block_size
from tunesmith.data.datasets import Source, open_dataset
from tunesmith.data.dialogue import Preference
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.readers import Report
from tunesmith.data.texts import TextRows
from tunesmith.data.token_bytes import bits_per_byte, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.device import Precision, keep_freed_memory, resolve_precision
from tunesmith.errors import UserError
from tunesmith.files.bases import base_at
from tunesmith.files.names import gives_scores, load, run_and_step
from tunesmith.files.places import located
from tunesmith.files.run import Run
from tunesmith.judge.measures import interval_record
from tunesmith.judge.preferences import preference_record
from tunesmith.judge.scorers import OwnScorer, load_scorer
from tunesmith.judge.trained_rows import trained_rows, training_runs
from tunesmith.judge.two_models import interval_text
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode
from tunesmith.options.commands import EvaluateCommand
from tunesmith.options.training import DataOptions
from tunesmith.stats import ratio_interval
from tunesmith.train.pair_loss import all_pair_scores, answer_logps
from tunesmith.train.token_loss import AnswerLoss, LossEstimate, answer_losses

Array = np.ndarray[Any, Any]
TURNS = ((1, 1), (2, 2), (3, 3), (4, None))
LENGTHS = ((1, 16), (17, 64), (65, 256), (257, None))


@dataclass(frozen=True)
class Chosen:
    """Which rows to measure on, as an index of all of them, and what is to be said of that."""

    which: slice | Array
    notes: tuple[str, ...] = ()

    def of(self, count: int) -> Array:
        """Their numbers, of `count` rows."""
        chosen: Array = np.arange(count)[self.which]
        return chosen


@dataclass(frozen=True)
class Held:
    """The rows to measure on, and how. runs: those that the model was trained in."""

    source: Source
    split: str
    data: DataOptions
    options: EvaluateCommand
    model: str
    runs: Sequence[Run] = ()

    @property
    def leaves_out(self) -> bool:
        """Whether rows that were trained on are left out."""
        return self.options.trained == "leave_out" or (self.options.trained == "auto" and self.options.split != "train")

    @cached_property
    def rows(self) -> Chosen:
        """The rows to measure on, as dialogues or texts. Raises: UserError if none is left."""
        return self._chosen(pairs=False)

    @cached_property
    def pair_rows(self) -> Chosen:
        """The pairs to measure on. Raises: UserError if none is left."""
        return self._chosen(pairs=True)

    def _chosen(self, *, pairs: bool) -> Chosen:
        if not self.runs:
            return Chosen(slice(None))
        trained, notes = trained_rows(self.runs, self.source, self.split, pairs=pairs)
        if not trained.any():
            return Chosen(slice(None), tuple(notes))
        what = f"{trained.sum():,} of the {len(trained):,} {'pairs' if pairs else 'rows'} of {self.data.name} ({self.split})"
        by = f"{self.model} was trained on {what}"
        if not self.leaves_out:
            notes.insert(0, f"{by}; they are included (--trained leave_out leaves them out)")
            return Chosen(slice(None), tuple(notes))
        if trained.all():
            raise UserError(
                f"{by}, so none is left to measure: name different data, or include them with --trained keep"
            )
        notes.insert(0, f"{by}; they are left out (--trained keep includes them)")
        return Chosen(~trained, tuple(notes))

    def precision(self, device: torch.device, width: int) -> Precision:
        return resolve_precision(self.options.precision, device, width)

    def dialogues(self, tokenizer: Tokenizer, loss_on: str, positions: int) -> Batches[TextRows]:
        """The rows, packed."""
        store = tokenise(self.source, self.split, tokenizer)
        layout = replace(self._layout(positions), loss_on=loss_on, shuffle=False)
        return Batches(TextRows(store, self.rows.of(len(store)), layout))

    def pairs(self, tokenizer: Tokenizer, positions: int) -> Batches[PairRows]:
        """The pairs, packed."""
        store = PairStore(tokenise(self.source, self.split, tokenizer, form="pairs"))
        return Batches(PairRows(store, self.pair_rows.of(len(store)), self._layout(positions)))

    def _layout(self, positions: int) -> BatchLayout:
        block_size = resolve_block_size(self.data.block_size, positions, self.model)
        return BatchLayout("packed", block_size, self.options.batch_size, truncation=self.data.truncation)


def evaluate(model_name: str, dataset: str, options: EvaluateCommand) -> dict[str, Any]:
    """Print the tables and return their figures: `response`, `all`, `by_turn`, `by_length`, `preference`, where they apply.

    Raises: UserError if model or data cannot be had or do not go together, or with `data.strict` for any bad row.
    """
    keep_freed_memory()
    data = one_name(dataset, options.data)
    source = open_dataset(data)
    split = options.split if options.split in source.files else "train"
    with base_at(options.model.base), chat_template(options.chat.template):
        return _evaluate(Held(source, split, data, options, model_name, training_runs(model_name)), dataset)


def _evaluate(held: Held, dataset: str) -> dict[str, Any]:
    """As `evaluate`, the model and the rows known."""
    model_name, options, data, source, split = held.model, held.options, held.data, held.source, held.split
    has_pairs = isinstance(next(source.rows(split, Report())).value, Preference)
    result: dict[str, Any] = {"model": model_name, "dataset": dataset, "split": split}
    if gives_scores(model_name):
        if not has_pairs:
            raise UserError(
                f"{model_name} gives scores, but {dataset} holds no pairs (chosen and rejected) to compare them on"
            )
        result["preference"], notes = reward_preference(model_name, held)
    else:
        model, tokenizer = load(model_name, device=options.device)
        losses, notes = text_losses(model, tokenizer, held)
        result |= losses
        if has_pairs:
            result["preference"], lines = policy_preference(model_name, model, tokenizer, held)
            notes += lines
    console = Console(highlight=False, soft_wrap=True)
    where = f"{model_name} on {dataset} ({split}"
    if "response" in result:
        print_losses(console, f"{where}, {result['rows']:,} rows)", result)
    if "preference" in result:
        print_preference(console, f"{where}, {result['preference']['pairs']:,} pairs)", result["preference"])
    said = [*(held.rows.notes if "response" in result else ()), *(held.pair_rows.notes if has_pairs else ())]
    for line in dict.fromkeys([*said, *source.notes, *notes]):
        console.print(f"note: {line}", markup=False)
    if data.strict and notes:
        raise UserError(f"--data.strict: {'; '.join(notes)}")
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


# ---- loss and perplexity ---------------------------------------------------------------------------------------------


def text_losses(model: Model, tokenizer: Tokenizer, held: Held) -> tuple[dict[str, Any], list[str]]:
    """Loss over the answers, in all and by turn and length, and over all tokens; what was skipped or cut."""
    precision = held.precision(model.device, model.width)
    of_answers = held.dialogues(tokenizer, "assistant", model.longest)
    answers = answer_losses(model, of_answers, precision)
    of_all = held.dialogues(tokenizer, "all", model.longest)
    everything = answer_losses(model, of_all, precision)
    report, rows = of_answers.rows.store.report, held.rows.of(len(of_answers.rows.store))
    alone = dict(zip(rows.tolist(), of_answers.rows.store.firsts(rows), strict=True))
    record = {
        "rows": len(rows),
        "response": loss_record(answers, alone),
        "all": loss_record(everything, alone) | bits_of(of_all, tokenizer, sum(a.nats for a in everything)),
        "by_turn": by_bucket(answers, TURNS, lambda a: a.turn, alone),
        "by_length": by_bucket(answers, LENGTHS, lambda a: a.tokens, alone),
    }
    return record, [*report.notes, *report.lines(), *of_answers.rows.cut_lines()]


def bits_of(batches: Batches[TextRows], tokenizer: Tokenizer, nats: float) -> dict[str, float]:
    """`{"bits_per_byte"}` of all tokens, by which models with different tokenizers compare; nothing if bytes cannot be counted."""
    try:
        size = sum(text_bytes(tokenizer, b.targets[: b.count].numpy()) for b in batches.fixed())
    except ValueError:  # not known of these tokens
        return {}
    return {"bits_per_byte": bits_per_byte(nats, size)} if size else {}


def loss_record(answers: Sequence[AnswerLoss], alone: Mapping[int, int]) -> dict[str, Any]:
    """`{"loss", "low", "high", "perplexity", "tokens", "answers"}`; the interval is over different rows, which are independent.

    alone: row -> the first row that is the same, with which it is one unit.
    """
    rows: dict[int, tuple[float, int]] = {}
    for a in answers:
        nats, tokens = rows.get(alone[a.row], (0.0, 0))
        rows[alone[a.row]] = (nats + a.nats, tokens + a.tokens)
    interval = interval_record(ratio_interval([nats for nats, _ in rows.values()], [n for _, n in rows.values()]))
    whole = LossEstimate(interval["mean"], sum(a.tokens for a in answers))
    record = {"loss": whole.loss, "low": interval["low"], "high": interval["high"], "perplexity": whole.perplexity}
    return record | {"tokens": whole.tokens, "answers": len(answers)}


def by_bucket(
    answers: Sequence[AnswerLoss],
    buckets: Sequence[tuple[int, int | None]],
    value: Callable[[AnswerLoss], int],
    alone: Mapping[int, int],
) -> dict[str, Any]:
    """`loss_record` of the answers in each bucket that has any; the keys are `1`, `17-64`, `257 or more`."""
    records = {}
    for low, high in buckets:
        inside = [a for a in answers if low <= value(a) and (high is None or value(a) <= high)]
        name = f"{low} or more" if high is None else str(low) if low == high else f"{low}-{high}"
        if inside:
            records[name] = loss_record(inside, alone)
    return records


def print_losses(console: Console, title: str, losses: dict[str, Any]) -> None:
    """One table: over answers, over all tokens, then the parts."""
    table = Table(title=escape(title), title_justify="left")
    for heading in ("tokens counted", "answers", "tokens", "loss, nats (95 % interval)", "perplexity"):
        table.add_column(heading, justify="left" if heading == "tokens counted" else "right")
    rows = [("response", losses["response"]), *((f"  turn {k}", v) for k, v in losses["by_turn"].items())]
    rows += [(f"  {k} tokens", v) for k, v in losses["by_length"].items()]
    for label, x in [*rows, ("all", losses["all"])]:
        bounds = "" if x["low"] is None else f" ({x['low']:.4f} to {x['high']:.4f})"
        count = "" if label == "all" else f"{x['answers']:,}"
        table.add_row(label, count, f"{x['tokens']:,}", f"{x['loss']:.4f}{bounds}", f"{x['perplexity']:,.2f}")
    console.print(table)
    if "bits_per_byte" in losses["all"]:
        console.print(f"{losses['all']['bits_per_byte']:.4f} bits per byte over all tokens")


# ---- preferences -----------------------------------------------------------------------------------------------------


def policy_preference(name: str, model: Model, tokenizer: Tokenizer, held: Held) -> tuple[dict[str, Any], list[str]]:
    """How often a language model gives the chosen answer more, by its log-ratio to a reference, else by log-probability."""
    batches = held.pairs(tokenizer, model.longest)
    precision = held.precision(model.device, model.width)
    values = all_logps(model, batches, precision)
    reference = held.options.reference or starting_point(name)
    by = "log-probability, as no --reference is given"
    if reference is not None:
        other, its_tokenizer = load(reference, device=held.options.device)
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"--reference {reference} has a different tokenizer from {name}: their log-probabilities cannot be compared"
            )
        values = values - all_logps(other, batches, precision)
        by = f"log-ratio to {reference}"
    record, repeats = preference_record(values, batches.rows.store, numbers_of(batches), by)
    return record, [*problems_of(batches), *repeats]


def problems_of(batches: Batches[PairRows]) -> list[str]:
    """What was skipped or cut, in words."""
    return [*batches.rows.store.store.report.lines(), *batches.rows.cut_lines()]


def numbers_of(batches: Batches[PairRows]) -> Array:
    """(pairs,) the numbers of the pairs in their store, in the order of the batches."""
    return np.array([source for batch in batches.fixed() for source in batch.sources])


def all_logps(model: Model, batches: Batches[PairRows], precision: Precision) -> Array:
    """(pairs, 2) float64, nats: log-probabilities of the chosen and rejected answers, in the order of the batches."""
    device = model.device
    with evaluation_mode(model):
        logps = [answer_logps(model, batch.to(device), precision) for batch in batches.fixed()]
    return torch.cat(logps).double().cpu().numpy()


def starting_point(name: str) -> str | None:
    """What a DPO run started from, where the MODEL is one's checkpoint."""
    checkpoint = run_and_step(name)
    if checkpoint is None or not (checkpoint[0].path / "config.yaml").exists():
        return None
    config = checkpoint[0].config
    began = "dpo" in config and config["model"].get("init") != "random"
    return located(checkpoint[0], config["model"]["name"]) if began else None


def reward_preference(name: str, held: Held) -> tuple[dict[str, Any], list[str]]:
    """How often a reward model scores the chosen answer higher."""
    scorer = load_scorer(name, device=held.options.device)
    if isinstance(scorer, OwnScorer):
        trunk = scorer.model.trunk
        batches = held.pairs(scorer.tokenizer, trunk.longest)
        precision = held.precision(trunk.device, trunk.width)
        scores = all_pair_scores(scorer.model, batches.fixed(), precision)
        values, numbers = scores.double().cpu().numpy(), numbers_of(batches)
        record, repeats = preference_record(values, batches.rows.store, numbers, "score")
        return record, [*problems_of(batches), *repeats]
    report = Report()
    every = [located.value for located in held.source.rows(held.split, report, pairs=True)]
    chosen_rows = held.pair_rows.of(len(every))
    pairs = [every[i] for i in chosen_rows]
    prompts = [pair.chosen.messages[:-1] for pair in pairs]
    chosen = scorer.score(prompts, [pair.chosen.messages[-1].content for pair in pairs])
    rejected = scorer.score(prompts, [pair.rejected.messages[-1].content for pair in pairs])
    store = PairStore(tokenise(held.source, held.split, Tokenizer.gpt2(), form="pairs"))
    record, repeats = preference_record(np.array([chosen, rejected]).T, store, chosen_rows, "score")
    return record, [*report.lines(), *repeats]


def print_preference(console: Console, title: str, preference: dict[str, Any]) -> None:
    """How often right, beside the rule that the longer answer is better."""
    table = Table(title=escape(f"{title}, by {preference['by']}"), title_justify="left")
    table.add_column("")
    table.add_column("pairs", justify="right")
    table.add_column("95 % interval", justify="right")
    rows = [
        ("prefers the chosen answer", preference["accuracy"], True),
        ("  where both are of similar length", preference["accuracy_at_like_length"], True),
        ('the rule "longer is better"', preference["longer_chosen"], True),
        ("mean margin", preference["margin"], False),
    ]
    for label, x, share in rows:
        if x is not None:
            table.add_row(label, f"{x['n']:,}", interval_text(x, percent=share))
    console.print(table)
