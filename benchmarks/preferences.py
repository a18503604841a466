"""DPO and LoRA, step time and peak memory: tunesmith beside TRL's DPOTrainer and SFTTrainer, with PEFT for adapters.

    python benchmarks/preferences.py --root DIR_OF_HH_RLHF --rounds 3 --steps 10 --out benchmarks/results

Tasks (`--task`): `dpo` trains all weights on preference pairs, `dpo-lora` adapters of rank 8 on all four linear layers of
each block, `lora-sft` such adapters on the packed rows of sft.py. Same weights (GPT-2 shape, random, seed 0), fp32,
AdamW with one constant rate a task, no clipping, no dropout. The pairs are real ones, in one order for everybody, two
a step, prompt + answer cut to 512 tokens; everybody gets the same ids, ends of answers included, and the losses of all
steps are compared. Contestants run in turn, each in its own process (A B C A B C ...).

The reference. In `dpo` tunesmith computes it in a first pass over the pairs, as `tunesmith dpo` does by default; in `dpo-lora`
with the adapters off in each step, which is --dpo.reference adapter and not the default. TRL runs a second model, or the
adapters off, in each step. That is counted for all: the first pass over a step's pairs is a part of that step's time.
`reference cached` is the second run over the same pairs, for TRL its `precompute_ref_log_probs`: the reference is known and
not counted. `packed` is `tunesmith` on the same pairs in batches of about 2,048 tokens instead of two pairs, so in fewer steps.

Rates count prompt + chosen and prompt + rejected of each pair, as cut and without the ends, for every tool alike, over
all timed steps of a round; memory is the process's peak resident set, imports included. `tuned` and `stock` as in sft.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import sft
from contest import Clock, Figures, Found, Tasks, measure, options, run_tasks, show, step_rates, summary, write_result
from sft import TRAINER, drive, rival_model, save_weights

RANK, BETA, LONGEST, PACKED = 8, 0.1, 512, 2048
LEARNING_RATE = {"dpo": 1e-6, "dpo-lora": 1e-5}  # those that `tunesmith dpo` takes by itself; lora-sft has sft.py's
CACHED = "tunesmith, reference cached"


# ---- the work that all share: weights and pairs, made once ----------------------------------------------------------


def prepare(work: Path, task: str, args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Save the weights and the pairs; returns what they are, and how many tokens of a round are counted."""
    import torch

    from tunesmith.models.lora import apply_lora, lora_layers

    model = save_weights(work, args.model)
    parameters = model.parameter_count()
    if task == "dpo-lora":
        apply_lora(model, rank=RANK, alpha=2.0 * RANK)
        torch.save({name: x.lora_A.detach() for name, x in lora_layers(model).items()}, work / "adapters.pt")
    given = {"task": task, "pairs": args.pairs, "root": args.root and str(Path(args.root).resolve()), "rows": None}
    everything = open_pairs(given)
    given["rows"] = [row for i in range(args.warmup + args.steps) for row in everything[i].sources]
    (work / "given.json").write_text(json.dumps(given))
    batches = open_pairs(given)
    (work / "pairs.json").write_text(
        json.dumps([plain_ids(batches.rows.assemble([i])) for i in range(len(batches.rows))])
    )
    timed = list(batches.rows.pairs)[args.warmup * args.pairs :]
    counted = sum(2 * p.prompt + sum(p.stops) for p in timed)
    padded = 0
    for start in range(0, len(timed), args.pairs):
        step = timed[start : start + args.pairs]
        padded += 2 * len(step) * (max(p.prompt + max(p.stops) for p in step) + 1)  # 1: the end is an input there
    about = {
        "data": everything.rows.store.store.source.name, "parameters": parameters, "pairs_a_step": args.pairs,
        "longest": LONGEST, "beta": BETA, "learning_rate": LEARNING_RATE[task],
        "rank": RANK if task == "dpo-lora" else None, "timed_pairs": len(timed), "counted_tokens": counted,
        "pairs_in_packed_batches": [len(group) for group in into_groups([len(p) for p in timed], PACKED)],
        "model_tokens_per_counted": {  # of the policy's pass; the reference's is the same again
            "tunesmith": round(sum(map(len, timed)) / counted, 3),
            "TRL, padding included": round(padded / counted, 3),
        },
    }  # fmt: skip
    return about, counted


def open_pairs(given: dict[str, Any]) -> Any:
    """The pairs as batches of exactly `pairs` of them: all in a random order, or `rows` of the training split in theirs."""
    from tunesmith.data.datasets import open_dataset
    from tunesmith.data.epochs import Batches, BatchLayout
    from tunesmith.data.pairs import PairRows
    from tunesmith.data.pairstore import PairStore
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.data.tokenstore import tokenise
    from tunesmith.options.training import DataOptions

    root = given["root"]
    source = open_dataset(DataOptions(name="hh:harmless-base" if root else "sample", root=root))
    store = PairStore(tokenise(source, "train", Tokenizer.gpt2(), form="pairs"))
    rows = range(len(store)) if given["rows"] is None else given["rows"]
    return Batches(PairRows(store, rows, BatchLayout("padded", LONGEST, given["pairs"])))


def plain_ids(batch: Any) -> dict[str, list[int]]:
    """A batch of one pair as TRL's columns: what we predict after the prompt, ends included, are its completions."""
    prompt = batch.input_ids[0, : batch.documents.lengths[0]]
    chosen, rejected = batch.targets.split(list(batch.lengths))
    return {"prompt_ids": prompt.tolist(), "chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()}


def into_groups(lengths: list[int], size: int) -> list[list[int]]:
    """Consecutive numbers in as many groups as there are whole `size`s in the sum, of nearly equal sums."""
    total, before = sum(lengths), 0
    groups: list[list[int]] = [[] for _ in range(max(1, round(total / size)))]
    for i, n in enumerate(lengths):
        groups[int((before + n / 2) * len(groups) / total)].append(i)
        before += n
    return [group for group in groups if group]


# ---- contestants: each runs in its own process and prints one JSON line ----------------------------------------------


def run_ours(work: Path, steps: int, warmup: int, tuned: bool, reference: str, packed: bool = False) -> Figures:
    """reference: `pass` (a first pass, counted), `known` (the same, not counted), `adapter` (off in each step)."""
    from tunesmith.device import keep_freed_memory

    keep_freed_memory()  # as `tunesmith dpo` does by itself
    from tunesmith.files.weights import load_model
    from tunesmith.models.lora import apply_lora
    from tunesmith.models.modes import evaluation_mode
    from tunesmith.train.optim import build_optimizer
    from tunesmith.train.pair_loss import PreferenceLoss, answer_logps, dpo_loss_sum
    from tunesmith.train.reference import LogpStore, adapter_off, cached
    from tunesmith.train.step import optimizer_step

    given = json.loads((work / "given.json").read_text())
    batches, pairs = open_pairs(given), given["pairs"]
    model = load_model(work / "model").train()
    if given["task"] == "dpo-lora":
        apply_lora(model, rank=RANK, alpha=2.0 * RANK)
    optimizer = build_optimizer(model, "adamw", lr=LEARNING_RATE[given["task"]], weight_decay=0.0)  # TRL's default
    groups = [list(range(i * pairs, (i + 1) * pairs)) for i in range(warmup + steps)]
    if packed:
        first = warmup * pairs
        timed = [
            [first + i for i in g] for g in into_groups([len(p) for p in list(batches.rows.pairs)[first:]], PACKED)
        ]
        groups = timed[:1] * warmup + timed
    settings = PreferenceLoss(BETA)

    def compute(batch: Any) -> Any:
        with evaluation_mode(model):
            return answer_logps(model, batch)

    def first_pass(numbers: list[int]) -> Any:
        with tempfile.TemporaryDirectory(dir=work) as fresh:  # a store for each, so that a repeated pair costs again
            return cached(batches.rows, numbers, LogpStore(Path(fresh) / "logps.npy"), compute)[0]

    clock = Clock(warmup)
    references = []
    for numbers in groups:
        references.append(adapter_off(model, "fp32") if reference == "adapter" else first_pass(numbers))
        clock.mark()
    passes, clock = clock.seconds(), Clock(warmup)
    losses = []
    for numbers, known in zip(groups, references, strict=True):
        batch = batches.rows.assemble(numbers)
        stats = optimizer_step(
            model, [batch], lambda b, known=known: dpo_loss_sum(model, b, known(b), settings), optimizer
        )
        losses.append(stats.loss)
        clock.mark()
    seconds = clock.seconds()
    if reference == "pass":
        seconds = [a + b for a, b in zip(passes, seconds, strict=True)]
    return seconds, losses


def adapter_config() -> Any:
    """The same adapters in PEFT's words."""
    from peft import LoraConfig

    targets = ["c_attn", "c_proj", "c_fc"]  # c_proj is there twice: of the attention and of the MLP
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")


def run_trl(work: Path, steps: int, warmup: int, tuned: bool, precomputed: bool = False) -> Figures:
    import datasets
    import torch
    import trl
    from transformers import AutoTokenizer

    class OnIds(trl.DPOTrainer):
        """This version only takes texts; the ids that it would make of them are given instead."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    given = json.loads((work / "given.json").read_text())
    lora = given["task"] == "dpo-lora"
    own = {"learning_rate": LEARNING_RATE[given["task"]], "per_device_train_batch_size": given["pairs"]}
    settings: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False} if tuned else {"bf16": False}
    arguments = trl.DPOConfig(
        output_dir=str(work / "out"),
        max_steps=warmup + steps,
        **{**TRAINER, **own},
        beta=BETA,
        max_length=LONGEST + 1,  # the end is an input there; the pairs are cut already
        precompute_ref_log_probs=precomputed,
        **settings,
    )
    trainer = OnIds(
        rival_model(work, tuned),
        None if lora or precomputed else rival_model(work, tuned),
        arguments,
        train_dataset=datasets.Dataset.from_list(json.loads((work / "pairs.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        peft_config=adapter_config() if lora else None,
    )
    if lora:  # both start with the same random A, so that the losses can be compared
        drawn, found = torch.load(work / "adapters.pt"), 0
        for name, parameter in trainer.model.named_parameters():
            key = name.removeprefix("base_model.model.transformer.").removesuffix(".lora_A.default.weight")
            if key in drawn:
                parameter.data.copy_(drawn[key])
                found += 1
        assert found == len(drawn), (found, len(drawn))
    return drive(trainer, warmup)


def run_trl_sft(work: Path, steps: int, warmup: int, tuned: bool) -> Figures:
    return sft.run_trl(work, steps, warmup, tuned, peft_config=adapter_config())


TASKS: Tasks = {
    "dpo": {
        "tunesmith": (partial(run_ours, reference="pass"), False),
        CACHED: (partial(run_ours, reference="known"), False),
        "tunesmith, packed": (partial(run_ours, reference="pass", packed=True), False),
        "TRL, tuned": (run_trl, True),
        "TRL, tuned, reference cached": (partial(run_trl, precomputed=True), True),
        "TRL, stock": (run_trl, False),
    },
    "dpo-lora": {
        "tunesmith": (partial(run_ours, reference="adapter"), False),
        CACHED: (partial(run_ours, reference="known"), False),
        "TRL + PEFT, tuned": (run_trl, True),
        "TRL + PEFT, tuned, reference cached": (partial(run_trl, precomputed=True), True),
        "TRL + PEFT, stock": (run_trl, False),
    },
    "lora-sft": {
        "tunesmith": (partial(sft.run_ours, rank=RANK), False),
        "TRL + PEFT, tuned": (run_trl_sft, True),
        "TRL + PEFT, stock": (run_trl_sft, False),
    },
}


# ---- the comparison -------------------------------------------------------------------------------------------------


def loss_differences(found: Found) -> dict[str, float]:
    """How far the losses of each contestant lie from ours at most, over all steps and rounds; packed ones have others."""
    (_, ours), *others = found.items()
    return {
        name: max(
            abs(a - b)
            for own, run in zip(ours, runs, strict=True)
            for a, b in zip(own["losses"], run["losses"], strict=True)
        )
        for name, runs in others
        if "packed" not in name
    }


def compare(task: str, args: argparse.Namespace) -> None:
    """One task: its contestants, its table, its file."""
    contestants = {n: tuned for n, (_, tuned) in TASKS[task].items() if not args.only or n in (*args.only, "tunesmith")}
    pairs = task in LEARNING_RATE
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        if pairs:
            about, tokens = prepare(Path(work), task, args)
        else:
            about = sft.prepare(Path(work), args.model, args.root, args.warmup + args.steps)
            about |= {"rank": RANK, "learning_rate": TRAINER["learning_rate"], "model_tokens_per_counted": 1.0}

        def rates(run: dict[str, Any]) -> list[float]:
            # steps of pairs differ in length and in how much of them is shared: only their sum is the same for all
            return [tokens / sum(run["seconds"])] if pairs else step_rates(run)

        print(f"\n{task}: {json.dumps(about)}", flush=True)
        arguments = ["--task", task, "--work", work, "--steps", str(args.steps), "--warmup", str(args.warmup)]
        found = measure(__file__, contestants, arguments, args.rounds, rates)
    rows = summary(found, rates)
    show(rows)
    more: dict[str, Any] = {"rates_of": "round" if pairs else "step"}
    if pairs:
        more["loss_differences"] = loss_differences(found)
        for name, runs in found.items():
            print(f"losses of {name}: {' '.join(f'{x:.7f}' for x in runs[0]['losses'])}")
        print(f"largest differences from ours: {more['loss_differences']}")
    if CACHED in found:
        ratio = next(r["our_speed_ratio"] for r in rows if r["name"] == CACHED)
        more["cached_speed_ratio"] = round(1 / ratio, 3)
        print(f"with the reference cached: {more['cached_speed_ratio']:.2f} x as fast as the first run")
    print(f"{task} took {(time.perf_counter() - began) / 60:.1f} minutes")
    if args.out:
        common = {"task": task, "model": args.model, "rounds": args.rounds, "steps": args.steps, "precision": "fp32"}
        path = args.out / f"{task}-{args.model}-{os.cpu_count()}core.json"
        write_result(path, {**common, **about}, rows, found, **more)


def main() -> None:
    parser = options(__doc__ or "")
    parser.set_defaults(steps=10)
    parser.add_argument("--pairs", type=int, default=2, help="preference pairs a step")
    run_tasks(parser, TASKS, compare)


if __name__ == "__main__":
    main()
