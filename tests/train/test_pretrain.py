"""Pretraining: a model and its tokenizer from nothing, on Python's own help texts; and what makes it impossible."""

import dataclasses
import gzip
import io
import json
import math
import pydoc_data.topics
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from shown_commands import blocks, commands, run
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.data.datasets import open_dataset
from tunesmith.data.readers import STRETCH, Report, read_file
from tunesmith.data.token_bytes import bits_per_byte, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.models.known import SIZES
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DataOptions
from tunesmith.study.report import render_report
from tunesmith.train.methods.pretrain import new_shape
from tunesmith.train.scratch import training_texts
from tunesmith.train.splits import load_splits

MARGIN = 0.4  # nats per token by which the model must beat the best that knows no context
HELD_OUT = 0.2
SHAPE = {
    "model__name": "gpt2", "model__n_layer": 2, "model__n_head": 4, "model__n_embd": 64, "model__block_size": 128,
    "data__max_rows": None, "tokenizer__vocab_size": 512,
}  # fmt: skip
SHORT = {**SHAPE, "model__n_embd": 16, "train__steps": 8, "eval__every": 4, "checkpoint__every": 4}


def short_run(data, out, **options):
    """A run of a second; only what differs from SHORT is named."""
    return ts.pretrain(tiny_config("gpt2", out, PretrainConfig, data__name=str(data), **{**SHORT, **options}))


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Python's help texts as a data set, a text a row."""
    path = tmp_path_factory.mktemp("topics") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in pydoc_data.topics.topics.values()))
    return path


@pytest.fixture(scope="module")
def trained(topics, tmp_path_factory):
    """200 steps on the help texts; seconds."""
    options = {
        "data__name": str(topics), "train__steps": 200, "train__batch_size": 8, "optimizer__lr": 1e-2,
        "optimizer__warmup_steps": 20, "eval__every": 100, "eval__iters": 60, "data__holdout": HELD_OUT,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    return ts.pretrain(tiny_config("gpt2", out, PretrainConfig, **{**SHAPE, **options}))


@pytest.fixture(scope="module")
def held_out(trained, topics):
    """The held-out texts of that run as tokens, and their tokenizer."""
    tokenizer = Tokenizer.load(trained.best_checkpoint())
    splits = load_splits(DataOptions(name=str(topics), holdout=HELD_OUT), tokenizer, prose=True)
    return [splits.validation.row(r, "all")[0] for r in splits.validation_rows], tokenizer


# ---- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_beats_every_model_that_knows_no_context(trained, held_out):
    """The entropy of the held-out tokens' own frequencies is the least that any unigram model can reach on them."""
    texts, tokenizer = held_out
    targets = Counter(t for text in texts for t in [*text[1:].tolist(), tokenizer.end_of_text])
    total = sum(targets.values())
    entropy = -sum(n / total * math.log(n / total) for n in targets.values())
    estimates = trained.metrics("eval")
    assert estimates[0]["validation_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert estimates[-1]["validation_loss"] < entropy - MARGIN


@pytest.mark.long
def test_bits_per_byte_are_those_of_the_held_out_text(trained, held_out):
    """Loss and bytes counted by hand: every text in full but for its first token."""
    texts, tokenizer = held_out
    size = sum(len(tokenizer.decode(t).encode()) - len(tokenizer.decode(t[:1]).encode()) for t in texts)
    tokens = sum(map(len, texts))
    for line in trained.metrics("eval"):
        bits = line["validation_loss"] * tokens / math.log(2) / size
        assert line["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    model, _ = ts.load(str(trained.path), device="cpu")
    nats = 0.0
    for text in texts:  # a long text is cut into blocks; the last token of one predicts the first of the next
        targets = np.append(text[1:], tokenizer.end_of_text)
        for a in range(0, len(text), 128):
            ids, wanted = torch.tensor(text[a : a + 128])[None], torch.tensor(targets[a : a + 128])
            with torch.no_grad():
                nats += cross_entropy(model.lm_head(model(ids))[0].double(), wanted, reduction="sum").item()
    best = min(trained.metrics("eval"), key=lambda line: line["validation_loss"])
    assert bits_per_byte(nats, size) == pytest.approx(best["validation_bits_per_byte"], rel=1e-5)


def test_text_bytes_counts_cut_characters_and_no_end(tokenizer):
    text = "naïve 👍 e\u0301\r\n\x00"
    ids = [*tokenizer.encode(text), tokenizer.end_of_text]
    assert text_bytes(tokenizer, ids) == len(text.encode())
    assert text_bytes(tokenizer, ids[:3]) + text_bytes(tokenizer, ids[3:]) == len(text.encode())
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize("batching", ["packed", "windows", "padded"])
def test_k_steps_and_resume_equal_n_steps_bit_for_bit(topics, tmp_path, batching):
    options = {"model__dropout": 0.2, "data__batching": batching, "optimizer__warmup_steps": 3}
    whole = short_run(topics, tmp_path / "whole", **options)
    for step in (4, 0):
        run = interrupted(whole, tmp_path / f"from-{step}", step)
        short_run(topics, run.path, **options, resume=True)
        assert_same_end(run, whole)


def test_a_resumed_run_keeps_its_tokenizer_and_trains_no_other(topics, tmp_path, monkeypatch):
    run = interrupted(short_run(topics, tmp_path / "whole"), tmp_path / "cut", 4)
    monkeypatch.setattr(Tokenizer, "train", staticmethod(lambda *_: pytest.fail("a second tokenizer was trained")))
    assert short_run(topics, run.path, resume=True).status["state"] == "finished"


def test_the_stored_configuration_repeats_the_run(topics, tmp_path):
    run = short_run(topics, tmp_path / "a")
    assert main(["pretrain", "--config", str(run.path / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert_same_end(ts.Run(tmp_path / "b"), run)
    found = run.config
    assert (found["model"]["n_layer"], found["model"]["block_size"], found["data"]["block_size"]) == (2, 128, 128)
    assert "lora" not in found


def test_a_changed_shape_is_no_resume(topics, tmp_path, capsys):
    run = short_run(topics, tmp_path / "run")
    assert main(["pretrain", "--out", str(run.path), "--resume", "--model.n_embd", "32"]) == 1
    assert "model.n_embd was 16, now 32" in capsys.readouterr().err


# ---- what comes out is an ordinary run -------------------------------------------------------------------------------


@pytest.mark.long
def test_the_run_can_be_tuned_evaluated_and_reported(trained, tmp_path, capsys):
    tuned = ts.sft(tiny_config(trained.path, tmp_path / "sft", train__steps=2, eval__every=2))
    assert tuned.status["state"] == "finished"
    assert main(["evaluate", str(trained.path), "sample", "--device", "cpu"]) == 0
    page = render_report([trained])
    assert "Pretraining" in page
    assert "validation bits per byte" in page
    model, tokenizer = ts.load(str(trained.path), device="cpu")
    assert model.parameter_count() == 512 * 64 + 128 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    assert tokenizer.vocab_size == model.config.vocab_size == 512
    assert isinstance(ts.generate(model, tokenizer, [[{"role": "user", "content": "for"}]], max_new_tokens=4)[0], str)


@pytest.mark.long
def test_transformers_computes_the_same_from_what_was_saved(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = trained.best_checkpoint()
    theirs, (ours, tokenizer) = AutoModelForCausalLM.from_pretrained(path), ts.load(str(path), device="cpu")
    text = 'The "for" statement is used to iterate over the elements of a sequence. Naïve 👍'
    ids = AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text)
    with torch.no_grad():
        assert torch.allclose(theirs(torch.tensor([ids])).logits, ours.lm_head(ours(torch.tensor([ids]))), atol=1e-4)


# ---- the tokenizer and the shape -------------------------------------------------------------------------------------


def test_gpt2s_vocabulary_is_the_other_choice(topics, tmp_path, tokenizer):
    run = short_run(topics, tmp_path / "run", tokenizer__name="gpt2", tokenizer__vocab_size=None, train__steps=1)
    found = Tokenizer.load(run.best_checkpoint())
    assert found.fingerprint == tokenizer.fingerprint
    assert run.config["tokenizer"] == {"name": "gpt2", "vocab_size": None}


@pytest.mark.long
def test_the_tokenizer_and_the_shape_of_a_model_can_be_taken(trained, topics, tmp_path):
    taken = {"model__n_layer": None, "model__n_head": None, "model__n_embd": None, "model__block_size": None}
    base = {"model__name": str(trained.path), "tokenizer__name": str(trained.path), "tokenizer__vocab_size": None}
    run = short_run(topics, tmp_path / "run", **taken, **base, train__steps=1)
    found, before = (Tokenizer.load(r.best_checkpoint()).fingerprint for r in (run, trained))
    assert found == before
    assert run.config["model"]["n_embd"] == 64


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes(size):
    config = tiny_config(size, Path("unused"), PretrainConfig, data__block_size=0)
    resolved, shape = new_shape(config)
    assert shape == SIZES[size]
    assert (resolved.model.n_layer, resolved.data.block_size) == (shape.depth, shape.longest)


def test_held_out_texts_do_not_shape_the_vocabulary(topics, tokenizer):
    config = dataclasses.replace(PretrainConfig().data, name=str(topics))
    splits = load_splits(config, tokenizer, prose=True)
    texts = list(pydoc_data.topics.topics.values())
    assert list(training_texts(config)) == [texts[i] for i in splits.train_rows]
    assert len(splits.validation_rows) == round(0.05 * len(texts))


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_dialogues_are_learned_as_text_without_roles(tokenizer):
    data = DataOptions(name="sample")
    splits = load_splits(data, tokenizer, prose=True)
    row = next(open_dataset(data).rows("train", Report())).value
    turns = row.chosen.messages
    tokens, targets = splits.train.row(0, "all")
    text = tokenizer.decode(tokens)
    assert text == "\n\n".join(m.content for m in turns)
    assert "Human:" not in text
    assert targets.tolist() == [*tokens[1:].tolist(), tokenizer.end_of_text]
    assert splits.train.plain.all(), "so that long ones are split and nothing is lost"


def rows_of(path):
    return [(r.line, r.value["text"]) for r in read_file(path, 0, Report())]


def test_a_text_file_is_cut_at_end_lines_and_at_empty_lines(tmp_path):
    paragraph = "A line of some length that stands here.\nAnd another one, naïve 👍.\n\n"
    long = paragraph * 700
    path = tmp_path / "book.txt"
    path.write_bytes(
        ("\ufefffirst\r\nstory\r\n<|endoftext|>\nsecond <|endoftext|> inline\n<|endoftext|>\n" + long).encode()
    )
    rows = rows_of(path)
    assert [text for _, text in rows[:2]] == ["first\r\nstory", "second <|endoftext|> inline"]
    assert [line for line, _ in rows[:3]] == [1, 4, 6]
    assert "\n\n".join(text for _, text in rows[2:]) == long.strip()
    assert all(text.startswith("A line") and STRETCH * 3 // 4 - 9 < len(text) <= STRETCH for _, text in rows[2:-1])
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert all(text.split("\n")[0].rstrip("\r") == lines[line - 1] for line, text in rows)
    packed = tmp_path / "book.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert rows_of(packed) == rows


@pytest.mark.parametrize("border", ["\n", " ", ""], ids=["lines", "words", "nothing"])
def test_a_text_without_empty_lines_is_cut_at_the_next_best_place(tmp_path, border):
    text = border.join(["word" * 5] * 2000)
    (tmp_path / "a.txt").write_text(text)
    rows = [text for _, text in rows_of(tmp_path / "a.txt")]
    assert len(rows) == 3
    assert all(len(row) <= STRETCH for row in rows)
    assert (border if border == "\n" else "").join(rows) == text
    assert not border or all(row.strip(border).endswith("word" * 5) for row in rows)


def test_a_directory_of_text_files_and_of_rows_beside_notes(tmp_path, topics):
    (tmp_path / "train.txt").write_text("one\n<|endoftext|>\ntwo\n")
    (tmp_path / "test.txt").write_text("three\n")
    source = open_dataset(DataOptions(name=str(tmp_path)))
    assert {s: len(list(source.rows(s, Report()))) for s in source.files} == {"train": 2, "test": 1}
    shutil.copy(topics, tmp_path / "train.jsonl")  # now the text files are notes beside the data
    assert [p.name for p in open_dataset(DataOptions(name=str(tmp_path))).files["train"]] == ["train.jsonl"]


# ---- what cannot work ------------------------------------------------------------------------------------------------

TINY = ["--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "8", "--model.block_size", "64"]


@pytest.mark.parametrize(
    ("content", "options", "code", "told"),
    [
        ("one line", "", 1, "one usable row cannot be split into training and validation"),
        ("", "", 1, "it is empty"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "", 1, "corpus.txt is not UTF-8 text .*save it as UTF-8"),
        (b"\x00\x01\x02\x03" * 9, "", 1, "corpus.txt holds zero bytes, so it is not a text file"),
        ("{topics}", "--tokenizer.vocab_size 200000", 1, r"vocab_size 200,000 is more than these texts allow: .* Use [\d,]+ or"),
        ("{topics}", "--tokenizer.vocab_size 256", 2, "vocab_size is 256, expected at least 257"),
        ("{topics}", "--model.block_size 1000000", 1, r"block_size 1,000,000 is more than all the training texts .* [\d,]+ tokens"),
        ("{topics}", "--data.block_size 128", 2, r"raise --model.block_size \(64\)"),
        ("{topics}", "--model.n_head 3", 2, "n_embd = 8 is not a multiple of n_head = 3"),
        ("{topics}", "--model.n_layer 0", 2, "n_layer = 0"),
        ("{topics}", "--model.name gpt3/none", 2, "--model: .*gpt3/none"),
        ("{topics}", "--data.loss_on assistant", 2, "a base model learns every token"),
        ("{topics}", "--tokenizer.name gpt2", 2, "vocab_size is for a new tokenizer; the vocabulary of gpt2"),
        ("{topics}", "--lora.rank 8", 2, "unknown option --lora.rank"),
        ("{topics}", "--data.name=", 2, "--data.name is missing"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_what_cannot_work_is_told_in_one_line(tmp_path, capsys, content, options, code, told):
    path, out = tmp_path / "corpus.txt", tmp_path / "run"
    texts = "\n<|endoftext|>\n".join(pydoc_data.topics.topics.values())
    path.write_bytes(content if isinstance(content, bytes) else content.replace("{topics}", texts).encode())
    argv = [
        "pretrain",
        "--data.name",
        str(path),
        *TINY,
        "--tokenizer.vocab_size",
        "300",
        "--train.steps",
        "1",
        "--train.device",
        "cpu",
    ]
    assert main([*argv, "--out", str(out), *options.split()]) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(told, err), err
    assert not out.exists()


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help", "all"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--model.n_layer", "--tokenizer.vocab_size", "--data.name", "--optimizer.lr"))
    with pytest.raises(SystemExit):
        main(["pretrain", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["tokenizer"] == {"name": "new", "vocab_size": None}


# ---- its page --------------------------------------------------------------------------------------------------------


def test_commands_and_python_of_the_page_run(tmp_path, monkeypatch, capsys):
    """As written, but for fewer steps and batches; in this process, which has torch already."""
    monkeypatch.chdir(tmp_path)
    first, *rest = commands("docs/pretraining.md", "python -c")
    assert run(first, tmp_path).returncode == 0
    for command in rest:
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n/quit\n"))
        shorter = re.sub(r"--train.steps \d+", "--train.steps 2 --eval.iters 2", command)
        shorter = re.sub(r"--optimizer.warmup_steps \d+", "--optimizer.warmup_steps 1", shorter)
        assert main(shlex.split(shorter)[1:]) == 0, capsys.readouterr().err
    assert [ts.Run(f"runs/{name}").status["step"] for name in ("base", "base-sft")] == [2, 2]
    (body,) = blocks("docs/pretraining.md", "python")
    exec(body, {})
    assert float(capsys.readouterr().out.splitlines()[-1]) < 8
