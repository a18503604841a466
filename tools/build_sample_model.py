"""Build the embedded `sample` base model from the texts it was made of. See docs/sample-model.md.

    python tools/build_sample_model.py --data DIR --work build/sample

DIR holds chitchat/chitchat.jsonl.gz, self-dialogue/self_dialogue.jsonl.gz, oasst-en/trees.jsonl.gz and
instructions/*.json(l), as docs/sample-model.md lists them. Four parts: the texts; `tunesmith pretrain` with
tools/sample_model.yaml; the best checkpoint in fp16 as the embedded model; the figures for its page, its held-out loss
beside that of a 5-gram model over the same tokens among them. Arguments after `--` go to `tunesmith pretrain`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ngram import held_out

from tunesmith.__main__ import main as tunesmith
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.texts import text_rows
from tunesmith.data.token_bytes import bits_per_byte, text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE, load
from tunesmith.files.run import Run
from tunesmith.files.weights import load_model, save_model
from tunesmith.models.gpt2 import GPT
from tunesmith.options.training import DataOptions
from tunesmith.train.splits import load_splits
from tunesmith.train.token_loss import estimate_loss

CONFIG = Path(__file__).with_name("sample_model.yaml")
HELD_OUT = 20  # one text in twenty


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON or JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if path.suffix == ".json":
            yield from json.load(file)
        else:
            yield from map(json.loads, file)


def texts(data: Path) -> Iterator[tuple[str, str]]:
    """(family, text): the turns of a conversation, or a task and its answer, with an empty line between them.

    Texts of a family share their beginning: the branches of one tree.
    """
    for name in ("chitchat/chitchat.jsonl.gz", "self-dialogue/self_dialogue.jsonl.gz"):
        for row in rows(data / name):
            yield "", "\n\n".join(row["turns"])
    for row in rows(data / "oasst-en/trees.jsonl.gz"):
        yield from ((row["prompt"]["text"], "\n\n".join(path)) for path in branches(row["prompt"]))
    for row in rows(data / "instructions/rasbt_instruction_data.json"):
        yield "", f"{row['instruction']}\n{row['input']}".strip() + "\n\n" + row["output"]
    for row in rows(data / "instructions/self_instruct_seed_tasks.jsonl"):
        example = row["instances"][0]
        yield "", f"{row['instruction']}\n{example['input']}".strip() + "\n\n" + example["output"]


def branches(message: dict[str, Any]) -> Iterator[list[str]]:
    """Paths from a tree's root to its leaves, through the two best answers of each message."""
    if not message["replies"]:
        yield [message["text"]]
    for reply in message["replies"][:2]:
        yield from ([message["text"], *path] for path in branches(reply))


def write_texts(data: Path, folder: Path) -> None:
    """train.jsonl and test.jsonl with a column `text`. What shares its beginning with a held-out text is not trained on."""
    found = list(texts(data))
    random.Random(0).shuffle(found)
    held, rest = found[: len(found) // HELD_OUT], found[len(found) // HELD_OUT :]
    known = {family for family, _ in held if family}
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("test", held), ("train", [row for row in rest if row[0] not in known])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _, text in part))


def held_out_loss(model: GPT, tokenizer: Tokenizer, dataset: str) -> str:
    """Loss over every held-out text of a data set, in both units."""
    splits = load_splits(DataOptions(name=dataset), tokenizer, prose=True)
    layout = BatchLayout("packed", model.config.block_size, batch_size=4, loss_on="all")
    batches = Batches(text_rows(splits.validation, splits.validation_rows, layout))
    found = estimate_loss(model, batches.fixed())
    size = sum(text_bytes(tokenizer, splits.validation.row(r, "all")[1]) for r in splits.validation_rows)
    bits = bits_per_byte(found.loss * found.tokens, size)
    return f"{found.loss:.4f} nats a token, {bits:.4f} bits a byte over {found.tokens:,} tokens"


def print_card(folder: Path) -> None:
    """The figures of docs/sample-model.md, of the model as it is embedded."""
    model, tokenizer = load("sample")
    print(f"parameters: {model.parameter_count():,}")
    print(f"SHA-256 of the weights: {hashlib.sha256((SAMPLE / 'model.safetensors').read_bytes()).hexdigest()}")
    print(f"held-out texts: {held_out_loss(model, tokenizer, str(folder))}")
    print(f"embedded test dialogues: {held_out_loss(model, tokenizer, 'sample')}")
    print(held_out(str(folder), tokenizer))


def main() -> None:
    own, more = split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/sample"))
    parser.add_argument("--card", action="store_true", help="only the figures of the model as it is embedded now")
    args = parser.parse_args(own)
    folder, out = args.work / "texts", args.work / "run"
    write_texts(args.data, folder)
    if not args.card:
        resume = ["--resume"] if (out / "status.json").exists() else []
        command = ["pretrain", "--config", str(CONFIG), "--data.name", str(folder), "--out", str(out), *resume, *more]
        print("tunesmith", *command)
        if code := tunesmith(command):
            sys.exit(code)
        if Run(out).status["state"] != "finished":
            sys.exit("stopped before its end; the same command goes on with it")
        best = Run(out).best_checkpoint()
        shutil.rmtree(SAMPLE, ignore_errors=True)
        save_model(load_model(best).to(torch.float16), Tokenizer.load(best), SAMPLE)
        print(f"{best} -> {SAMPLE}")
    print_card(folder)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those before `--`, and those after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


if __name__ == "__main__":
    main()
