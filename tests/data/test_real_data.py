"""Real dialogues, every row of every folder: nothing lost, nothing added, counts as a plain count gives them."""

import gzip
import json
from itertools import islice

import pytest

from tunesmith.data.datasets import open_dataset, parse_row
from tunesmith.data.dialogue import Dialogue, Preference
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.hh_template import HH, parse_transcript
from tunesmith.data.readers import Report
from tunesmith.data.texts import text_rows
from tunesmith.data.tokenstore import tokenise
from tunesmith.options.training import DataOptions

HH_COUNTS = {"train": 1300, "test": 200}


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def turns(texts, first="user"):
    other = "assistant" if first == "user" else "user"
    return [{"role": other if i % 2 else first, "content": text} for i, text in enumerate(texts)]


def answered(messages):
    """Up to the last assistant turn: there is nothing to learn after it."""
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[: last + 1]


def oasst(data):
    """Every path of every tree from the first prompt to an assistant's answer without replies."""
    rows = []

    def walk(node, above):
        path = [*above, {"role": node["role"], "content": node["text"]}]
        for reply in node["replies"]:
            walk(reply, path)
        if not node["replies"] and any(m["role"] == "assistant" for m in path):
            rows.append({"messages": answered(path)})

    for tree in lines(data / "oasst-en" / "trees.jsonl.gz"):
        walk(tree["prompt"], [])
    return rows


def conversations(file):
    return [{"messages": answered(turns(row["turns"]))} for row in lines(file) if len(row["turns"]) > 1]


def personality(data):
    rows = lines(data / "personality-chat" / "personality_chat.jsonl.gz")
    return [
        {"prompt": row["question"], "chosen": row["professional"], "rejected": row["witty"]} for row in rows
    ] + [{"prompt": row["question"], "completion": row["friendly"]} for row in rows]  # fmt: skip


def instructions(data):
    folder = data / "instructions"
    plain = json.loads((folder / "rasbt_instruction_data.json").read_text(encoding="utf-8"))
    pairs = json.loads((folder / "rasbt_instruction_data_with_preference.json").read_text(encoding="utf-8"))
    seeds = lines(folder / "self_instruct_seed_tasks.jsonl")

    def asked(row):
        return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]

    return [
        *({"prompt": asked(row), "completion": row["output"]} for row in plain),
        *({"prompt": asked(row), "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs),
        *({"prompt": asked(row | one), "completion": one["output"]} for row in seeds for one in row["instances"]),
    ]


SOURCES = {
    "oasst-en": oasst,
    "chitchat": lambda data: conversations(data / "chitchat" / "chitchat.jsonl.gz"),
    "self-dialogue": lambda data: conversations(data / "self-dialogue" / "self_dialogue.jsonl.gz"),
    "sgd": lambda data: conversations(data / "sgd" / "dev.jsonl.gz"),
    "personality-chat": personality,
    "instructions": instructions,
}


ENCODED_EVERY = {"self-dialogue": 60, "chitchat": 24}
"""Of these, every n-th conversation is also encoded and decoded; all of them take 40 seconds."""


def wanted_text(row):
    """What the chosen dialogue of a raw row should read, written without the package."""
    marker = {"user": "\n\nHuman: ", "prompter": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    if "messages" in row:
        return "".join(marker[m["role"]] + m["content"] for m in row["messages"])
    return marker["user"] + row["prompt"] + marker["assistant"] + row.get("chosen", row.get("completion"))


def hh_rows(shared_data):
    return {split: lines(shared_data / "hh-rlhf" / "harmless-base" / f"{split}.jsonl.gz") for split in HH_COUNTS}


def hh_store(shared_data, tokenizer, split="train", **options):
    options = DataOptions(name="hh:harmless-base", root=str(shared_data / "hh-rlhf"), **options)
    return tokenise(open_dataset(options), split, tokenizer)


# ---- HH-RLHF -------------------------------------------------------------------------------------------------------


def test_every_hh_text_is_parsed_and_rendered_to_its_exact_bytes(shared_data):
    texts = [row[key] for rows in hh_rows(shared_data).values() for row in rows for key in ("chosen", "rejected")]
    assert len(texts) == 2 * 1500
    for text in texts:
        assert HH.text(parse_transcript(text).messages).encode() == text.encode()


@pytest.mark.parametrize("split", ["train", "test"])
def test_hh_counts_are_those_of_a_plain_count(shared_data, tokenizer, split):
    """Rows, and the empty chosen answers, counted here on the raw text."""
    rows = hh_rows(shared_data)[split]
    empty = [i for i, r in enumerate(rows, 1) if not r["chosen"].rpartition("\n\nAssistant:")[2].strip()]
    # a text that does not end in an answer, or begins with none, would need a count of its own
    assert all("\n\nHuman:" not in r["chosen"].rpartition("\n\nAssistant:")[2] for r in rows)
    report = hh_store(shared_data, tokenizer, split).report
    assert report.rows == len(rows) == HH_COUNTS[split]
    assert report.bad == ({"empty answer": len(empty)} if empty else {})
    assert report.used == len(rows) - len(empty)
    assert report.places.get("empty answer", []) == [f"{split}.jsonl.gz:{i}" for i in empty[:3]]


def test_hh_has_empty_answers_so_that_the_count_above_means_something(shared_data, tokenizer):
    bad = [hh_store(shared_data, tokenizer, split).report.bad for split in HH_COUNTS]
    assert sum(found.get("empty answer", 0) for found in bad) > 0


def test_hh_tokens_decode_to_the_text_and_targets_to_the_answers(shared_data, tokenizer):
    rows = hh_rows(shared_data)["train"]
    store = hh_store(shared_data, tokenizer)
    for index in range(len(store)):
        text = rows[int(store.places[index, 1]) - 1]["chosen"]
        tokens, targets = store.row(index, "assistant")
        assert tokenizer.decode(tokens) == text
        answers = [turn.partition("\n\nHuman:")[0] for turn in text.split("\n\nAssistant:")[1:]]
        found = tokenizer.decode([t if t != tokenizer.end_of_text else 0 for t in targets[targets >= 0]])
        assert found == "".join(answer + "!" for answer in answers if answer), "token 0, `!`, stands for each end"


def test_trailing_space_would_mistokenise_every_hh_prompt(shared_data, tokenizer):
    """The prompt of the last answer, as it stands and with one space more, against the ids in training."""
    rows = hh_rows(shared_data)["train"]
    store = hh_store(shared_data, tokenizer)
    ours = spaced = 0
    for index in range(len(store)):
        text = rows[int(store.places[index, 1]) - 1]["chosen"]
        prompt = text[: text.rindex("\n\nAssistant:") + len("\n\nAssistant:")]
        tokens = store.row(index, "assistant")[0].tolist()
        ids = [i for s in HH.segments(parse_transcript(prompt).messages, False) for i in tokenizer.encode(s.text)]
        ours += tokens[: len(ids)] != ids
        with_space = [*ids[:-1], *tokenizer.encode(": ")] if prompt.endswith(":") else []
        spaced += tokens[: len(with_space)] != with_space
    assert ours == 0
    assert spaced >= 0.99 * len(store)


def test_packing_hh_at_1024_uses_more_than_99_percent(shared_data, tokenizer):
    store = hh_store(shared_data, tokenizer)
    batches = Batches(text_rows(store, range(len(store)), BatchLayout("packed", block_size=1024, batch_size=1)))
    used = sum(batch.tokens for batch in batches.fixed())
    assert used == int(store.lengths.clip(max=1024).sum())
    assert used / (1024 * batches.rows_per_epoch) > 0.99


# ---- the other folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_comes_through_whole(shared_data, tokenizer, name):
    """parse_row -> segments -> encode -> decode gives the row's text, and the answers are the assistant's turns."""
    raw = [(row, wanted_text(row)) for row in SOURCES[name](shared_data)]
    assert len(raw) > 300
    good = [(row, text) for row, text in raw if text.rpartition("Assistant:")[2].strip()]
    assert len(good) > 0.99 * len(raw), "hardly any answer is empty"
    parsed = [parse_row(row) for row, _ in good]
    dialogues = [row.chosen if isinstance(row, Preference) else row for row in parsed]
    assert all(isinstance(dialogue, Dialogue) for dialogue in dialogues)
    rows = []
    for dialogue, (_, text) in zip(dialogues, good, strict=True):
        pieces = HH.segments(dialogue.messages, False)
        assert "".join(piece.text for piece in pieces) == text
        answers = [" " + m.content for m in dialogue.messages if m.role == "assistant"]
        assert [piece.text for piece in pieces if piece.loss] == answers
        rows.append((pieces, text))
    rows = rows[:: ENCODED_EVERY.get(name, 1)]
    encoded = iter(tokenizer.encode_batch([piece.text for pieces, _ in rows for piece in pieces]))
    for pieces, text in rows:
        ids = [i for piece in islice(encoded, len(pieces)) for i in piece]
        assert tokenizer.decode(ids) == text


def test_instruction_files_are_read_as_they_are(shared_data):
    """Alpaca's columns: the input belongs to the question."""
    source = open_dataset(DataOptions(name=str(shared_data / "instructions" / "rasbt_instruction_data.json")))
    report = Report()
    rows = [located.value for located in source.rows("train", report)]
    assert (report.rows, report.used) == (1100, 1100)
    file = shared_data / "instructions" / "rasbt_instruction_data.json"
    first = json.loads(file.read_text(encoding="utf-8"))[0]
    question, answer = rows[0].messages
    assert question.content == "\n\n".join(filter(None, (first["instruction"], first["input"])))
    assert answer.content == first["output"]
