"""Build the embedded `sample` base model from the texts it was made of. See docs/sample-model.md.

    python tools/build_sample_model.py --data DIR --work build/sample

DIR holds chitchat/chitchat.jsonl.gz, self-dialogue/self_dialogue.jsonl.gz, oasst-en/trees.jsonl.gz and
instructions/*.json(l), as docs/sample-model.md lists them. Three parts: the texts and the tokenizer, the training (an
ordinary `tunesmith sft` from random weights with loss on all tokens), the weights in fp16.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import tunesmith as ts
from tunesmith.gpt import GPTConfig
from tunesmith.models import SAMPLE
from tunesmith.options import CheckpointOptions, DataOptions, EvalOptions, ModelOptions, OptimizerOptions, TrainOptions
from tunesmith.tokenizer import END_OF_TEXT
from tunesmith.tokenizer import Tokenizer as OurTokenizer
from tunesmith.weights import config_to_hf, load_model, save_model

SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=4096, block_size=1024)
HELD_OUT = 20  # one text in twenty


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON or JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if path.suffix == ".json":
            yield from json.load(file)
        else:
            yield from map(json.loads, file)


def texts(data: Path) -> Iterator[str]:
    """Every text: the turns of a conversation, or a task and its answer, with an empty line between them."""
    for name in ("chitchat/chitchat.jsonl.gz", "self-dialogue/self_dialogue.jsonl.gz"):
        for row in rows(data / name):
            yield "\n\n".join(row["turns"])
    for row in rows(data / "oasst-en/trees.jsonl.gz"):
        yield from (("\n\n".join(path)) for path in branches(row["prompt"]))
    for row in rows(data / "instructions/rasbt_instruction_data.json"):
        yield f"{row['instruction']}\n{row['input']}".strip() + "\n\n" + row["output"]
    for row in rows(data / "instructions/self_instruct_seed_tasks.jsonl"):
        example = row["instances"][0]
        yield f"{row['instruction']}\n{example['input']}".strip() + "\n\n" + example["output"]


def branches(message: dict[str, Any]) -> Iterator[list[str]]:
    """Paths from a tree's root to its leaves, through the two best answers of each message."""
    if not message["replies"]:
        yield [message["text"]]
    for reply in message["replies"][:2]:
        yield from ([message["text"], *path] for path in branches(reply))


def write_texts(data: Path, folder: Path) -> list[str]:
    """train.jsonl and test.jsonl with a column `text`; returns the training texts."""
    found = list(texts(data))
    random.Random(0).shuffle(found)
    held = len(found) // HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("test", found[:held]), ("train", found[held:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    return found[held:]


def write_tokenizer(training_texts: list[str], folder: Path) -> None:
    """A byte-level BPE of the shape's vocabulary; the embedded dialogues count six times, to be read in whole words."""
    ours = []
    for split in ("train", "test"):  # the vocabulary only: no weight sees the held-out dialogues
        for row in rows(SAMPLE.parent / f"{split}.jsonl"):
            ours.append("\n\n".join(m["content"] for m in row["prompt"] + row["chosen"]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(training_texts + ours * 6, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    OurTokenizer(backend).save(folder, SHAPE.block_size)
    (folder / "config.json").write_text(json.dumps(config_to_hf(SHAPE, backend.token_to_id(END_OF_TEXT))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/sample"))
    parser.add_argument("--steps", type=int, default=2600)
    args = parser.parse_args()
    run_directory = args.work / "run"
    resume = (run_directory / "status.json").exists()
    if not resume:
        write_tokenizer(write_texts(args.data, args.work / "texts"), args.work / "shape")
    run = ts.sft(
        ts.SFTConfig(
            model=ModelOptions(name=str(args.work / "shape"), init="random"),
            data=DataOptions(name=str(args.work / "texts"), loss_on="all", truncation="split"),
            train=TrainOptions(steps=args.steps, batch_size=4),
            optimizer=OptimizerOptions(lr=1.5e-3, weight_decay=0.1, schedule="cosine", warmup_steps=100),
            eval=EvalOptions(every=130, iters=10),
            checkpoint=CheckpointOptions(every=100, keep=2),
            out=str(run_directory),
            resume=resume,
        )
    )
    best = run.best_checkpoint()
    shutil.rmtree(SAMPLE, ignore_errors=True)
    save_model(load_model(best).to(torch.float16), OurTokenizer.load(best), SAMPLE)
    print(f"{best} -> {SAMPLE}")


if __name__ == "__main__":
    main()
