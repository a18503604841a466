"""The one fingerprint of content: of data files, token stores, tokenizers and the weights that a run stands on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 20


def content_hash(parts: Iterable[str | bytes | memoryview | Path]) -> str:
    """SHA-256 in hexadecimal over the parts one after the other: text as UTF-8, bytes as they are, a Path as its file's bytes.

    No name, date or place counts, so what was moved or copied unchanged keeps its fingerprint. Where two parts could be
    read as one, the caller puts what separates them (a shape, a length, a `repr`) between them.
    Raises: OSError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
