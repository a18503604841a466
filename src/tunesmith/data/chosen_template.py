"""Which form a model's dialogues have: the chat_template that it brings, HH where it brings none, or the one that is asked for.

`--chat.template` holds for the models that a command talks to or trains, and not for a reward model or a judge: those read
the same conversation in the form that they were trained with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from tunesmith.data.hh_template import HH
from tunesmith.data.readers import read_text
from tunesmith.data.templates import TEMPLATES
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError, path_meant

AUTO = "auto"
_asked: ContextVar[str] = ContextVar("chat_template", default=AUTO)


@contextlib.contextmanager
def chat_template(name: str) -> Iterator[None]:
    """Inside, models have this form: `auto` their own, the name of one of `TEMPLATES`, or a file with a Jinja template."""
    before = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(before)


def load_tokenizer_in(directory: Path) -> Tokenizer:
    """The tokenizer of a model's directory with the form that is asked for, else its own, which is then not even looked at.

    Raises: UserError if there is no such form, or it needs tokens that the tokenizer lacks.
    """
    return Tokenizer.load(directory) if _asked.get() == AUTO else with_template_asked_for(Tokenizer.load(directory, HH))


def with_template_asked_for(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with the form that the innermost `chat_template` asks for. Raises: as `load_tokenizer_in`."""
    name = _asked.get()
    if name == AUTO:
        return tokenizer
    try:
        tokenizer.use(TEMPLATES[name] if name in TEMPLATES else _in_file(name), "the template")
    except UserError as error:
        raise UserError(f"--chat.template {name}: {error}") from None
    return tokenizer


def _in_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        known = dict.fromkeys([AUTO, *TEMPLATES])
        raise UserError(
            f"no such file, and none of {', '.join(known)}{path_meant(path, Path.is_file, {k: k for k in known})}"
        )
    return read_text(path)
