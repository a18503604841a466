"""A model's own Jinja `chat_template`, rendered as transformers renders it, by a sandbox that ends what does not end by itself.

A template comes from whoever made the model, so it is a foreign program: jinja2's sandbox keeps it from files and from
Python's insides, and the limits below from running for ever and from filling the memory. What it is given is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.environment import Template as Compiled
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.data.dialogue import BadRow
from tunesmith.errors import UserError

Turn = dict[str, str]

MOST_STEPS = 1_000_000
"""Turns of loops and calls that one rendering may take: a dialogue of 1,000 turns takes some ten thousand."""
MOST_CHARACTERS = 10_000_000
"""Length that no text or list of a rendering may exceed, beyond what the messages themselves hold."""

_SEARCH = re.compile("(starts|ends)with|r?(split|partition|find|index)|replace|count|remove(prefix|suffix)")
"""Methods of a text whose arguments are looked for in it."""
SHORTEST_MARK = 3


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with every loop, call and arithmetic counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # optimised, what is constant would be computed as a template is read, past all counting
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        del self.globals["lipsum"]  # a text of any length, made in one call
        self.filters["tojson"] = _tojson
        self.filters[_COUNTED] = self.counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # local time, as there
        self.begin(0)

    def begin(self, size: int) -> None:
        """Counts for one rendering of messages of so many characters."""
        self.steps, self.room = MOST_STEPS, MOST_CHARACTERS + size

    def counted(self, value: Any) -> Any:
        """Itself, or as a list what comes one by one, if it is no longer than it may be; its length counts, as it may be looped over."""
        if isinstance(value, Iterator):
            value = list(value)
        if isinstance(value, Sized):
            self._spend(0 if isinstance(value, str) else len(value), len(value))
        return value

    def _spend(self, steps: int, length: int = 0) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS:,} steps: does it ever end?")
        if length > self.room:
            raise SecurityError(f"it makes a text or list of more than {MOST_CHARACTERS:,} elements")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox's own, counted; a number so large can only be meant to fill the memory."""
        self._spend(1, max((a for a in args if isinstance(a, int)), default=0))
        return self.counted(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As the sandbox's own, but a product or a power is refused before it is made."""
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, thing = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(thing, Sized):
                self._spend(1, times * len(thing))
        if operator == "**" and (abs(left) > 1000 or abs(right) > 1000):
            raise SecurityError("it asks for a power too large to compute")
        if operator == "%" and isinstance(left, str) and "*" in left:
            raise SecurityError("it formats a value to a width that is not a constant")
        return self.counted(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """The template's Python: what loops go over, what filters and `~` make, all pass through `counted`."""
        for loop in source.find_all(nodes.For):
            loop.iter = _counting(loop.iter)
        for node in source.find_all(nodes.Filter):
            _check_numbers(node)
        if any(isinstance(c.value, str) and _WIDE.search(c.value) for c in source.find_all(nodes.Const)):
            raise SecurityError("it formats a value to a width of 100,000 characters or more")
        _wrap(source)
        return super()._generate(source, *args, **kwargs)


_WIDE = re.compile(r"[%{:][^%{}\s]*\d{6}")  # `%1000000000d`, `{:>1000000000}`
_COUNTED = "counted here"  # not a name that a template can write


def _counting(node: Any) -> Any:
    return nodes.Filter(node, _COUNTED, [], [], None, None).set_lineno(node.lineno)


def _wrap(node: nodes.Node) -> None:
    """Let every `~` and every filter below a node be counted."""
    for name, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _wrap(child)
            grows = isinstance(child, nodes.Concat) or (isinstance(child, nodes.Filter) and child.name != _COUNTED)
            if grows and not isinstance(node, nodes.FilterBlock):
                children[i] = _counting(child)
        setattr(node, name, children if isinstance(value, list) else children[0])


def _check_numbers(node: nodes.Node) -> None:
    """Raises: SecurityError for a filter (`center`, `indent`) that is asked for a width to fill the memory with."""
    for number in node.find_all(nodes.Const):
        if isinstance(number.value, int) and number.value > MOST_CHARACTERS:
            raise SecurityError(f"it asks a filter for {number.value:,} characters")


class _Generation(Extension):
    """`{% generation %}`: transformers marks by it what an assistant says. Which that is we find without it."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own it escapes nothing for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class Rendering:
    """A chat template, ready to be rendered.

    marks: texts that it looks for in what it is given, as `</think>` in an answer. day: the date, where it writes one: on
    another day it renders another text.
    """

    def __init__(self, text: str, variables: Mapping[str, str], where: str) -> None:
        """variables: `bos_token` and its like -> the token's text. where: what messages call the template.

        Raises: UserError if it cannot be read.
        """
        self.where, self.variables, self._sandbox = where, dict(variables), Sandbox()
        try:
            tree = self._sandbox.parse(text)
            self._template: Compiled = self._sandbox.from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(f"{where}, line {error.lineno}: {error.message}; it is not a Jinja template") from None
        except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: {_one_line(error)}; use a different template (--chat.template)") from None
        self.marks = frozenset(_marks(tree))
        dated = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
        self.day = f"{datetime.now():%Y-%m-%d}" if dated else ""

    def __call__(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """The text of a dialogue. Raises: BadRow with what the template says against it, or what is wrong with the template."""
        self._sandbox.begin(sum(len(m["content"]) for m in messages))
        pieces = self._template.generate(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=answer_follows,
            **self.variables,
        )
        try:
            return "".join(self._within(pieces))
        except TemplateError as error:
            raise BadRow(f"{self.where}: {_one_line(error)}") from None
        except Exception as error:  # a foreign program: anything can go wrong in it
            raise BadRow(f"{self.where} fails with {type(error).__name__}: {_one_line(error)}") from None

    def _within(self, pieces: Iterator[str]) -> Iterator[str]:
        total = 0
        for piece in pieces:
            total += len(piece)
            if total > self._sandbox.room:
                raise SecurityError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
            yield piece


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _marks(tree: nodes.Template) -> Iterator[str]:
    """Constant texts that a template compares a part of some text with."""
    for compare in tree.find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        if any(operand.op in ("in", "notin") for operand in compare.ops) or any(
            isinstance(part, nodes.Slice) for side in sides for part in side.find_all(nodes.Slice)
        ):
            yield from _texts(sides)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and _SEARCH.fullmatch(call.node.attr):
            yield from _texts(call.args)
    for used in tree.find_all(nodes.Filter):
        if used.name == "replace":
            yield from _texts(used.args)


def _texts(sides: Sequence[nodes.Node]) -> Iterator[str]:
    for side in sides:
        if isinstance(side, nodes.Const) and isinstance(side.value, str) and len(side.value.strip()) >= SHORTEST_MARK:
            yield side.value
