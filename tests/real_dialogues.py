"""Dialogues as people wrote them, for templates: user and assistant in turn, the assistant last, half with a system turn."""

import gzip
import itertools
import json
import re
from pathlib import Path

from tunesmith.files.names import SAMPLE

SYSTEM = "You are a helpful assistant.\nBe brief, and say so if you do not know."


def _messages(turns):
    turns = turns[: len(turns) // 2 * 2]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def embedded(count):
    """From the sample that comes with the package; several are joined to one dialogue, so that there are many turns."""
    rows = map(json.loads, (SAMPLE.parent / "train.jsonl").read_text(encoding="utf-8").splitlines())
    pairs = [[m["content"] for m in [*row["prompt"], *row["chosen"]]] for row in rows]
    return [_messages(pairs[2 * i] + (pairs[2 * i + 1] if i % 3 else [])) for i in range(count)]


def _rows(path: Path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _hh(path: Path):
    for row in _rows(path):
        yield [text.strip(" ") for text in re.split(r"\n\n(?:Human|Assistant):", row["chosen"])[1:]]


def _oasst(path: Path):
    for tree in _rows(path):
        node, turns = tree["prompt"], []
        while node:
            turns.append(node["text"])
            node = min(node.get("replies") or [], key=lambda reply: reply.get("rank") or 0, default=None)
        yield turns


def real(shared_data: Path, count: int):
    """From HH-RLHF, OpenAssistant and Schema-Guided Dialogue in turn; texts as they are, every fifth dialogue of up to 8 turns."""
    sgd = (row["turns"] for row in _rows(shared_data / "sgd/dev.jsonl.gz"))
    hh, oasst = (
        _hh(shared_data / "hh-rlhf/harmless-base/test.jsonl.gz"),
        _oasst(shared_data / "oasst-en/trees.jsonl.gz"),
    )
    mixed = (turns for group in itertools.zip_longest(hh, oasst, sgd) for turns in group if turns)
    found = (turns for turns in mixed if len(turns) > 1 and all(turn.strip() for turn in turns))
    cut = (_messages(turns[: 8 if i % 5 == 0 else 4]) for i, turns in enumerate(found))
    return list(itertools.islice(cut, count))
