"""Text that others wrote, on its way to a terminal; and bytes that a terminal or a pipe gives as text."""

from __future__ import annotations

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL, C1: all that begins a sequence
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")


def visible(text: str) -> str:
    r"""The text with control characters as escapes, so that it cannot move the cursor, recolour or retitle a terminal.

    Newlines and tabs stay.

    >>> visible("a\x1b[31mb\r\n")
    'a\\x1b[31mb\\r\n'
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def latin1_where_undecodable(text: str) -> str:
    r"""Bytes that Python kept as lone surrogates (`errors="surrogateescape"`) read as Latin-1; all else as it is.

    >>> latin1_where_undecodable(b"caf\xe9".decode("utf-8", "surrogateescape"))
    'café'
    """
    return _ESCAPED_BYTES.sub(lambda found: chr(ord(found[0]) - 0xDC00), text)
