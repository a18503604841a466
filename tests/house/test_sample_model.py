"""The embedded model is the one that its page describes: its bytes, its size, its loss on dialogues it never saw."""

import gzip
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import tunesmith as ts
from reference import saying
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.prompts import Prompt, encode_prompt
from tunesmith.data.texts import text_rows
from tunesmith.data.token_bytes import bits_per_byte, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.options.training import DataOptions
from tunesmith.train.splits import load_splits
from tunesmith.train.token_loss import estimate_loss

PAGE_FILE = Path(__file__).parents[2] / "docs" / "sample-model.md"
PAGE = PAGE_FILE.read_text(encoding="utf-8")
FEWEST, MOST = 4096, 8192  # tokens
LARGEST = 20_000_000  # bytes


def told(pattern):
    """The one place of the page that says it."""
    (found,) = re.findall(pattern, PAGE)
    return found.replace(",", "")


def test_weights_are_those_of_the_page():
    file = SAMPLE / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == told(r"SHA-256 of the weights \| `([0-9a-f]{64})`")
    assert file.stat().st_size < LARGEST


def test_size_is_that_of_the_page():
    model, tokenizer = ts.load("sample", device="cpu")
    assert model.parameter_count() == int(told(r"parameters \| ([\d,]+);"))
    assert model.parameter_count() < 12_000_000
    assert tokenizer.vocab_size == model.config.vocab_size == int(told(r"byte-level BPE, ([\d,]+) tokens"))
    assert FEWEST <= tokenizer.vocab_size <= MOST
    assert model.config.block_size == 1024


@pytest.mark.long
def test_loss_on_the_held_out_dialogues_is_that_of_the_page():
    """The 40 dialogues of the sample's test split as text without roles: no weight of the base saw them."""
    model, tokenizer = ts.load("sample", device="cpu")
    splits = load_splits(DataOptions(name="sample"), tokenizer, prose=True)
    layout = BatchLayout("packed", block_size=1024, batch_size=1, loss_on="all")
    held = Batches(text_rows(splits.validation, splits.validation_rows, layout))
    found = estimate_loss(model, held.fixed())
    size = sum(text_bytes(tokenizer, b.targets.numpy()) for b in held.fixed())
    assert found.loss == pytest.approx(float(told(r"embedded test dialogues \| ([\d.]+) nats a token")), abs=2e-3)
    bits = bits_per_byte(found.loss * found.tokens, size)
    assert bits == pytest.approx(
        float(told(r"embedded test dialogues \| [\d.]+ nats a token, ([\d.]+) bits a byte")), abs=2e-3
    )


# ---- the tools that make and check it ----------------------------------------------------------------------------------


@pytest.fixture
def tools(monkeypatch):
    """The build's modules, importable."""
    monkeypatch.syspath_prepend(str(PAGE_FILE.parents[1] / "tools"))
    import build_sample_model
    import check_sample_model

    return build_sample_model, check_sample_model


def write_data(folder):
    """A data directory in the layout of the real one, a few texts each."""

    def lines(name, rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    def talk(i):
        return {"turns": [f"hello number {i}", f"how is the weather in place {i}?", "it rains again"]}

    def node(text, *replies):
        return {"text": text, "replies": list(replies)}

    lines("chitchat/chitchat.jsonl.gz", map(talk, range(40)))
    lines("self-dialogue/self_dialogue.jsonl.gz", map(talk, range(100, 140)))
    trees = [node(f"tree {i}", node("a", node("b")), node("c"), node("never: the third")) for i in range(15)]
    lines("oasst-en/trees.jsonl.gz", [{"prompt": tree} for tree in trees])
    tasks = [{"instruction": f"task {i}", "input": "", "output": "done"} for i in range(10)]
    (folder / "instructions").mkdir()
    (folder / "instructions/rasbt_instruction_data.json").write_text(json.dumps(tasks))
    lines(
        "instructions/self_instruct_seed_tasks.jsonl",
        [{"instruction": "seed", "instances": [{"input": "x", "output": "y"}]}],
    )


def test_the_build_makes_a_model_and_its_card(tools, tmp_path, monkeypatch, capsys):
    build, _ = tools
    write_data(tmp_path / "data")
    new = tmp_path / "embedded"
    shutil.copytree(SAMPLE, new)
    monkeypatch.setattr(build, "SAMPLE", new)
    monkeypatch.setattr("tunesmith.files.names.SAMPLE", new)
    shape = "--model.n_layer 1 --model.n_head 2 --model.n_embd 8 --model.block_size 64 --tokenizer.vocab_size 300"
    length = "--train.steps 2 --optimizer.warmup_steps 1"
    argv = f"--data {tmp_path}/data --work {tmp_path}/work -- {shape} {length} --train.device cpu --eval.iters 2"
    monkeypatch.setattr(sys, "argv", ["build", *argv.split()])
    build.main()
    shown = capsys.readouterr().out
    digest = hashlib.sha256((new / "model.safetensors").read_bytes()).hexdigest()
    assert f"SHA-256 of the weights: {digest}" in shown
    assert re.search(r"interpolated 5-gram: [\d.]+ nats a token over [\d,]+ held-out tokens, [\d.]+ bits a byte", shown)
    assert json.loads((new / "config.json").read_text())["dtype"] == "float16"
    assert ts.load("sample", device="cpu")[1].vocab_size == 300


def test_nothing_held_out_shares_its_beginning_with_a_training_text(tools, tmp_path):
    build, _ = tools
    write_data(tmp_path / "data")
    build.write_texts(tmp_path / "data", tmp_path / "texts")
    train, test = (
        [json.loads(line)["text"] for line in (tmp_path / "texts" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    trees = [{text.split("\n")[0] for text in part if text.startswith("tree")} for part in (train, test)]
    assert trees[1], "a branch of a tree is held out"
    assert not trees[0] & trees[1]
    assert len(test) == (80 + 30 + 11) // 20
    assert len(train) == 80 + 30 + 11 - len(test) - sum(
        2 - sum(t.startswith(f"{tree}\n") for t in test) for tree in trees[1]
    )
    assert "never" not in " ".join(train + test)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("", False),
        ("one two three four " * 2, False),
        ("one two three four " * 3, True),
        ("I like it so much. I LIKE it so, yes. And i like it so.", True),
        ("a a a a a", False),
        ("a a a a a a", True),
    ],
)
def test_four_words_three_times(tools, text, repeated):
    assert tools[1].repeats(text) == repeated


def test_answers_keep_what_stopped_them(tools, tmp_path, monkeypatch):
    """A model that says a role marker has leaked it, though the user would not see it."""
    _, check = tools
    tokenizer = Tokenizer.load(SAMPLE)
    marker, end = tokenizer.encode(" Yes.\n\nHuman: so"), [tokenizer.end_of_text]
    monkeypatch.setattr(check, "load_prompts", lambda: [Prompt("hi"), Prompt("why is that so, do you think?")])
    found = []
    for ids in (marker, [*tokenizer.encode(" Yes."), *end]):
        length = len(encode_prompt(tokenizer, [{"role": "user", "content": "hi"}]))
        monkeypatch.setattr(check, "load", lambda *_, ids=ids, length=length, **__: (saying(ids, length), tokenizer))
        found.append(check.answers("any", 1)[0])
    assert [a.by_itself for a in found] == [False, True]
    assert [bool(check.ROLE.search(a.text)) for a in found] == [True, False]
