"""`--help`: one screen of what people set, and `--help all`. Which options stand on the screen is written here, in PAGES."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import UnionType
from typing import Any, Literal

from tunesmith.options.shortforms import Positional

INDENT = 26  # where the text of an option begins
WIDEST = 100  # longer lines are hard to read


@dataclass(frozen=True)
class Page:
    """The first screen of a command's help.

    what: two lines. examples: commands that work as they stand, or with names of one's own in capitals.
    first: the options that people set, ten at most; the others are under `--help all`.
    """

    what: str
    examples: tuple[str, ...]
    first: tuple[str, ...]


TRAINING = ("train.epochs", "train.steps", "train.batch_size", "optimizer.lr")
PAGES = {
    "demo": Page(
        "The whole chain on SmolLM2 (weights dequantised from 4 bits) or the embedded model, in minutes on two CPU "
        "cores: SFT, LoRA, a reward model, DPO, scores, answers side by side and a report.",
        ("tunesmith demo", "tunesmith demo --model sample"),
        ("model", "out", "steps", "open"),
    ),
    "data": Page(
        "Shows what a data set holds: the format recognised, rows, tokens, lengths, and what was skipped and why. "
        "--show prints rows with the tokens that carry loss highlighted.",
        ("tunesmith data sample --show 2", "tunesmith data my.jsonl --audit"),
        (
            "show",
            "audit",
            "against",
            "tokenizer",
            "data.columns",
            "data.block_size",
            "data.loss_on",
            "data.root",
            "data.max_rows",
            "out",
        ),
    ),
    "pretrain": Page(
        "Trains a new model, and its tokenizer, from plain text: a GPT-2, or the family and shape of another MODEL. "
        "Short texts share a row without attending to each other, long ones are cut into rows.",
        ("tunesmith pretrain --data book.txt --model.n_layer 4 --model.n_embd 384",),
        (
            "data.name",
            "model.n_layer",
            "model.n_head",
            "model.n_embd",
            "model.block_size",
            *TRAINING[:1],
            *TRAINING[2:],
            "out",
            "resume",
        ),
    ),
    "sft": Page(
        "Fine-tunes a model on dialogues: all weights, or LoRA adapters with --lora.rank. Dialogues are packed whole, "
        "and the loss is on the assistant's turns.",
        ("tunesmith sft --model sample --data sample --train.steps 60",),
        ("model.name", "data.name", "data.block_size", *TRAINING, "lora.rank", "out", "resume"),
    ),
    "reward": Page(
        "Trains a reward model on pairs of answers (Bradley-Terry): one score per answer, the chosen one above the "
        "rejected one.",
        ("tunesmith reward --model sample --data sample --train.steps 60",),
        ("model.name", "data.name", "data.block_size", *TRAINING, "lora.rank", "out", "resume"),
    ),
    "dpo": Page(
        "Direct preference optimisation on pairs of answers: all weights, or LoRA adapters with --lora.rank. MODEL is "
        "usually a run of tunesmith sft.",
        ("tunesmith dpo --model sample --data sample --optimizer.lr 2e-5",),
        ("model.name", "data.name", "dpo.beta", *TRAINING, "lora.rank", "out", "resume"),
    ),
    "evaluate": Page(
        "Loss and perplexity of a model on a data set, by turn and by length; on pairs, how often it prefers the chosen "
        "answer. Every figure has a 95 % interval.",
        ("tunesmith evaluate sample sample", "tunesmith evaluate runs/NAME my.jsonl --out figures.json"),
        (
            "split",
            "trained",
            "reference",
            "batch_size",
            "data.block_size",
            "data.columns",
            "data.root",
            "precision",
            "out",
        ),
    ),
    "score": Page(
        "Lets models answer a set of prompts and scores the answers with a reward model; every mean has a 95 % "
        "interval. RUN@all scores every checkpoint of a run.",
        ("tunesmith score runs/SFT runs/DPO --reward runs/REWARD",),
        ("reward", "prompts", "samples", "limit", "shown", "generate.temperature", "generate.max_new_tokens", "out"),
    ),
    "compare": Page(
        "Gives the same prompts to two models and shows the answers side by side; with a reward model or a judge, also "
        "who wins. Differences are those of B against A.",
        ("tunesmith compare sample runs/NAME --limit 5", "tunesmith compare runs/SFT runs/DPO --reward runs/REWARD"),
        (
            "prompts",
            "limit",
            "reward",
            "judge",
            "judge_model",
            "logprobs",
            "generate.temperature",
            "generate.max_new_tokens",
            "out",
            "html",
        ),
    ),
    "chat": Page(
        "Talks to a model in the terminal; answers appear as they are written. /help lists the chat commands.",
        ("tunesmith chat sample", "tunesmith chat runs/NAME"),
        (
            "system",
            "chat.template",
            "generate.temperature",
            "generate.top_p",
            "generate.top_k",
            "generate.max_new_tokens",
            "generate.seed",
            "device",
        ),
    ),
    "plan": Page(
        "Memory and time of a training run, before running it; no data is read and no weights are loaded. It plans "
        "sft (the default), pretrain, dpo and reward, each with its own options.",
        (
            "tunesmith plan sft --model gpt2-medium --lora.rank 8",
            "tunesmith plan dpo --model gpt2-medium --fit 8GB",
            "tunesmith plan reward --model gpt2-large --device t4",
            "tunesmith plan pretrain --model gpt2 --device a100",
        ),
        (
            "model.name",
            "device",
            "fit",
            "fit_inexact",
            "text_tokens",
            "supervised",
            "data.block_size",
            "train.batch_size",
            "train.steps",
            "out",
        ),
    ),
    "study": Page(
        "Runs a matrix of training runs: the built-in study `paper`, or a YAML file. Finished runs are skipped, "
        "interrupted ones resumed.",
        ("tunesmith study paper --scale smoke --dry_run", "tunesmith study my.yaml"),
        ("scale", "dry_run", "only", "batching", "jobs", "executor", "data.root", "data.rm_static", "out"),
    ),
    "report": Page(
        "One HTML page for finished runs, or for a study with a verdict on every claim; figures and tables are written as "
        "files beside it.",
        ("tunesmith report runs/SFT runs/DPO", "tunesmith report studies/paper-smoke"),
        ("out",),
    ),
}


@dataclass(frozen=True)
class Option:
    """An option as help shows it. title: of its group, "" outside of groups."""

    name: str
    kind: Any
    default: Any
    text: str
    title: str = ""


def asked_for_help(argv: Sequence[str]) -> Literal["", "first", "all"]:
    """Whether a command line asks for help, and for which."""
    for word, after in pairwise([*argv, ""]):
        if word in ("-h", "--help", "--help=all"):
            return "all" if "all" in (after, word.partition("=")[2]) else "first"
    return ""


def help_text(options: type[Any], prog: str, positionals: Sequence[Positional], *, every: bool) -> str:
    """The help of a command, in lines that fit the terminal. every: all options, in their groups."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    page = PAGES.get("".join(prog.split()[1:2]), Page(" ".join((options.__doc__ or "").split()), (), ()))
    arguments = [f"{p.name.upper()}{' ...' if p.many else ''}" for p in positionals]
    lines = [" ".join(["usage:", prog, *arguments, "[--option value ...]"]), ""]
    lines += [*textwrap.wrap(page.what, width), ""]
    lines += [f"{'example:' if i == 0 else '':8} {example}" for i, example in enumerate(page.examples)]
    for p in positionals:
        other = f" (or --{p.option} {p.option.upper()})" if p.option else ""
        lines += [""] * (p is positionals[0]) + _entry(p.name.upper(), f"{p.help}{other}", width)
    known = list(all_options(options))
    if every or not page.first:
        for option, previous in zip(known, [None, *known], strict=False):
            if previous is None or option.title != previous.title:
                lines += ["", f"{option.title or 'the command'}:"]
            lines += _entry(*_described(option), width)
    else:
        by_name = {option.name: option for option in known}
        lines += ["", "common options:" if len(known) > len(page.first) else "options:"]
        for name in page.first:
            head, text = _described(by_name[name])
            lines += _entry(head, _first_sentence(text), width)
    every = every or len(page.first) == len(known)
    return "\n".join([*lines, "", *_closing(prog, {option.name for option in known}, width, every=every)])


def _closing(prog: str, known: set[str], width: int, *, every: bool) -> list[str]:
    """Where the rest is. every: nothing is left."""
    more = f"`{prog} --help all` lists all {len(known)} options. " * (not every)
    short = " ".join(f"--{g} X is short for --{g}.name X." for g in ("model", "data") if f"{g}.name" in known)
    short += " " * bool(short)
    preset = "or a preset: paper/e1, ...; " * ("model.name" in known and "train.steps" in known)
    files = f"--config FILE.yaml ({preset}repeatable, later wins) sets options; --print_config prints them all."
    return textwrap.wrap(f"{more}{short}{files}", width)


def _described(option: Option) -> tuple[str, str]:
    """What is typed, and what it does with its default."""
    value = option.default
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    default = "" if value is None or value is False or value in ("", []) else f" [{shown}]"
    text = option.text.removesuffix(".") if default else option.text
    return f"--{option.name} {placeholder(option)}", f"{text}{default}"


def _first_sentence(text: str) -> str:
    """A text up to its first full stop, with the default that stands at its end."""
    first, stop, rest = text.partition(". ")
    default = rest[rest.rindex(" [") :] if stop and rest.endswith("]") and " [" in rest else ""
    return f"{first}{default}"


def _entry(head: str, text: str, width: int) -> list[str]:
    """An option and its text, which begins on a line of its own where the option is long."""
    lines = textwrap.wrap(text, max(20, width - INDENT), break_on_hyphens=False)
    head = f"  {head}"
    if len(head) > INDENT - 2:
        return [head, *(" " * INDENT + line for line in lines)]
    return [f"{head:<{INDENT}}{lines[0] if lines else ''}", *(" " * INDENT + line for line in lines[1:])]


def placeholder(option: Option) -> str:
    """What stands for an option's value: its choices, N or X for numbers, else its name in capitals."""
    words: list[str] = []
    kind = option.kind
    for part in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else [kind]:
        if typing.get_origin(part) is Literal:
            words += map(str, typing.get_args(part))
        elif part is bool:
            words += ["true", "false"]
        elif part is not type(None):
            words.append({int: "N", float: "X"}.get(part, option.name.rpartition(".")[2].upper()))
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def all_options(options: type[Any]) -> Iterator[Option]:
    """Every option with its type, default and text, those outside of groups first."""
    yield from _options_of(options, "", "")
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(kind := kinds[field.name]):
            title = " ".join((kind.__doc__ or "").split())
            yield from _options_of(kind, f"{field.name}.", title)  # type: ignore[arg-type]


def _options_of(options: type[Any], prefix: str, title: str) -> Iterator[Option]:
    kinds, texts = typing.get_type_hints(options), _texts(options)
    for field in dataclasses.fields(options):
        if not dataclasses.is_dataclass(kinds[field.name]):
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            yield Option(prefix + field.name, kinds[field.name], default, texts.get(field.name, ""), title)


def _texts(options: type[Any]) -> dict[str, str]:
    """Option -> the string that stands below it in the class; Python keeps those nowhere, so the source is read."""
    texts: dict[str, str] = {}
    written = [k for k in options.__mro__ if dataclasses.is_dataclass(k) and inspect.get_annotations(k)]
    for kind in reversed(written):  # a class put together of others has no source
        (definition,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[field.target.id] = " ".join(str(text.value.value).split())
                else:
                    texts.pop(field.target.id, None)
    return texts
