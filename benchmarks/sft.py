"""SFT step time and peak memory: tunesmith beside the plain loop, transformers' Trainer and TRL's SFTTrainer.

    python benchmarks/sft.py --root DIR_OF_HH_RLHF --rounds 3 --steps 4 --out benchmarks/results/sft-NAME.json

Same weights (GPT-2 shape, random, seed 0), same packed rows of real dialogues, loss on the assistant's tokens, fp32,
one row of 1,024 tokens a step, in one order; TRL packs the same dialogues into rows of its own. Every contestant runs in its
own process, in turn, `--rounds` times (A B C A B C ...), so that a drift of the machine meets all of them. `stock` is as
shipped. `tuned` has the public settings that helped: `torch.set_float32_matmul_precision("medium")`, glibc's allocator
thresholds, the one-kernel tanh GELU, fused AdamW, no activation checkpointing; the loop and `head for loss only` also spare
the head the tokens without loss (`logits_to_keep`). `--precision bf16` runs all in bf16 autocast over float32 weights.
Rates count tokens through the model; memory is the process's peak resident set, imports included. Utilisation is the
arithmetic that a plain implementation needs for these tokens (6 operations a weight, and the full square of attention) over
the rate of the fastest matrix product that torch has here; what leaves arithmetic out can pass 1.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from contest import ROW, Clock, Figures, Run, Tuned, child, measure, options, show, step_rates, summary, write_result

TRAINER: dict[str, Any] = {  # what both of transformers' trainers are given
    "per_device_train_batch_size": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_grad_norm": 0,
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    "dataloader_pin_memory": False, "seed": 0, "train_sampling_strategy": "sequential",
}  # fmt: skip


# ---- the work that all share: weights and rows, made once -----------------------------------------------------------


def save_weights(work: Path, model: str) -> Any:
    """Save random weights of this size with their tokenizer; returns the model."""
    import torch

    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.files.weights import save_model
    from tunesmith.models.gpt2 import GPT, GPTConfig
    from tunesmith.models.known import SIZES

    small = GPTConfig(n_layer=6, n_head=6, n_embd=384)
    gpt = GPT(small if model == "small" else SIZES[model])
    gpt.init_weights(torch.Generator().manual_seed(0))
    save_model(gpt, Tokenizer.gpt2(), work / "model")
    return gpt


def prepare(work: Path, model: str, root: str | None, rows: int, precision: str = "fp32") -> dict[str, Any]:
    """Save the weights and `rows` packed rows; returns what the data is."""
    import torch

    from tunesmith.data.datasets import open_dataset
    from tunesmith.data.epochs import Batches, BatchLayout
    from tunesmith.data.texts import text_rows
    from tunesmith.data.tokenizer import Tokenizer
    from tunesmith.data.tokenstore import tokenise
    from tunesmith.options.training import DataOptions
    from tunesmith.plan.memory import block_matrices

    gpt = save_weights(work, model)
    name = "hh:harmless-base" if root else "sample"
    store = tokenise(open_dataset(DataOptions(name=name, root=root)), "train", Tokenizer.gpt2())
    fill = 1 if precision == "fp32" else 64  # as `tunesmith sft` has it
    layout = BatchLayout("packed", block_size=ROW, batch_size=1, loss_on="assistant", fill_to=fill)
    batches = Batches(text_rows(store, range(len(store)), layout))
    torch.save([batches[i] for i in range(rows)], work / "rows.pt")
    used = [batches[i] for i in range(rows)]
    share = sum(b.count for b in used) / sum(b.tokens for b in used)
    c = gpt.config
    weights = block_matrices(c) * c.n_layer + c.vocab_size * c.n_embd
    operations = 6 * weights + 12 * c.n_layer * c.n_embd * ROW
    about = {"data": name, "rows": rows, "supervised_share": share, "parameters": gpt.parameter_count()}
    return {**about, "operations_per_token": operations, "ceiling_gflops": round(ceiling(), 1)}


def ceiling() -> float:
    """10^9 operations a second of the fastest float32 matrix product here, of the shapes of a 124 M model's MLP."""
    import torch

    from tunesmith.models.linear import product

    x, w = torch.randn(1024, 768), torch.randn(3072, 768)
    best = float("inf")
    for kernel in (product, lambda x, w: x @ w.t()):  # in float32 whatever `--precision` is
        for _ in range(20):
            start = time.perf_counter()
            kernel(x, w)
            best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * len(w) / best / 1e9


# ---- contestants: each runs in its own process and prints one JSON line ----------------------------------------------


def run_ours(
    work: Path, steps: int, warmup: int, tuned: bool, rank: int = 0, name: str = "adamw", checkpointing: Any = False,
    in_backward: bool = False, bf16: bool = False, allocator: Literal["fast", "lean"] = "fast", precision: Any = "fp32",
) -> Figures:  # fmt: skip
    """rank: of LoRA adapters. checkpointing, in_backward, bf16, name, allocator: the memory modes, as `tunesmith sft` sets them up."""
    from tunesmith.device import set_allocator

    set_allocator(allocator)  # as `tunesmith sft` does by itself
    import torch

    from tunesmith.files.weights import load_model
    from tunesmith.models.lora import apply_lora
    from tunesmith.options.training import OptimizerOptions, SFTConfig, TrainOptions
    from tunesmith.train.step import optimizer_step
    from tunesmith.train.token_loss import nll_sum
    from tunesmith.train.trainee import make_optimizer, store_in_bf16

    batches = torch.load(work / "rows.pt", weights_only=False)
    model = load_model(work / "model").train()
    if rank:
        apply_lora(model, rank=rank, alpha=2.0 * rank)
    if bf16:
        store_in_bf16(model)
    model.activation_checkpointing = checkpointing
    train, rule = TrainOptions(optimizer_in_backward=in_backward), OptimizerOptions(name=name, lr=1e-4)
    optimizer = make_optimizer(model, SFTConfig(train=train, optimizer=rule))
    clock, losses = Clock(warmup), []
    for i in range(warmup + steps):
        stats = optimizer_step(model, [batches[i % len(batches)]], lambda b: nll_sum(model, b, precision), optimizer)
        losses.append(stats.loss)
        clock.mark()
    return clock.seconds(), losses


def run_ours_system_allocator(work: Path, steps: int, warmup: int, tuned: bool, **more: Any) -> Figures:
    os.environ["TUNESMITH_ALLOCATOR"] = "system"
    return run_ours(work, steps, warmup, tuned, **more)


def rival_model(work: Path, tuned: bool) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"activation_function": "gelu_pytorch_tanh"} if tuned else {}
    return transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype="float32", **options).train()


def labelled_rows(work: Path) -> list[dict[str, list[int]]]:
    """The same rows as plain input_ids and labels (unshifted, as transformers wants them)."""
    import torch

    rows = []
    for batch in torch.load(work / "rows.pt", weights_only=False):
        ids = batch.input_ids[0]
        labels = torch.full_like(ids, -100)
        rows_, targets = batch.rows[: batch.count], batch.targets[: batch.count]
        inside = rows_ + 1 < len(ids)  # the last token's target lies outside of an unshifted row
        follows = rows_[inside]
        same = ids[follows + 1] == targets[inside]  # not the end-of-text targets, which are no inputs here
        labels[follows[same] + 1] = targets[inside][same]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def run_loop(work: Path, steps: int, warmup: int, tuned: bool, precision: str = "fp32") -> Figures:
    """What most people write: logits, cross_entropy, AdamW. Tuned: logits of the tokens with loss only."""
    import torch
    import torch.nn.functional as F

    model = rival_model(work, tuned)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=tuned or None)
    rows = labelled_rows(work)
    clock, losses = Clock(warmup), []
    for i in range(warmup + steps):
        row = rows[i % len(rows)]
        ids, following = torch.tensor([row["input_ids"]]), torch.tensor([*row["labels"][1:], -100])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            which = torch.where(following != -100)[0] if tuned else torch.arange(len(following))
            logits = model(ids, logits_to_keep=which if tuned else 0).logits
            loss = F.cross_entropy(logits[0], following[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        clock.mark()
    return clock.seconds(), losses


def run_trainer(
    work: Path, steps: int, warmup: int, tuned: bool, checkpointing: bool = False, keep: bool = False, precision: str = "fp32"
) -> Figures:  # fmt: skip
    """keep: logits of the tokens with loss only, by a collator of one's own."""
    import torch
    import transformers

    rows = [{k: torch.tensor(v) for k, v in row.items()} for row in labelled_rows(work)]
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "out"),
        max_steps=warmup + steps,
        **TRAINER,
        optim="adamw_torch_fused",
        gradient_checkpointing=checkpointing,
        remove_unused_columns=not keep,
        bf16=precision == "bf16",
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ((ids, labels),) = (row.values() for row in batch)
        following = torch.cat([labels[1:], torch.tensor([-100])])
        which = torch.where(following != -100)[0]
        kept = {"logits_to_keep": which, "shift_labels": following[which][None]}
        return {"input_ids": ids[None], "labels": labels[None], **kept}

    collator = collate if keep else None
    model = rival_model(work, tuned)
    return drive(transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator), warmup)


def run_trl(work: Path, steps: int, warmup: int, tuned: bool, precision: str = "fp32", **more: Any) -> Figures:
    """TRL packs the dialogues itself (best fit), loss on the completion tokens. more: for the trainer."""
    import datasets
    import torch
    import trl
    from transformers import AutoTokenizer

    dialogues = []
    for batch in torch.load(work / "rows.pt", weights_only=False):
        supervised = torch.zeros(batch.input_ids.numel(), dtype=torch.int64)
        supervised[(batch.rows[: batch.count] + 1).clamp(max=len(supervised) - 1)] = 1
        start = 0
        for length in batch.documents.lengths:
            stretch = slice(start, start + length)
            ids, mask = batch.input_ids[0, stretch].tolist(), supervised[stretch].tolist()
            if sum(mask):
                dialogues.append({"input_ids": ids, "completion_mask": mask})
            start += length
    arguments = trl.SFTConfig(
        output_dir=str(work / "out"),
        max_steps=warmup + steps,
        **TRAINER,
        packing=True,
        max_length=ROW,
        bf16=precision == "bf16",
        **({"gradient_checkpointing": False} if tuned else {}),
    )
    trainer = trl.SFTTrainer(
        rival_model(work, tuned),
        arguments,
        train_dataset=datasets.Dataset.from_list(dialogues * 3),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        **more,
    )
    return drive(trainer, warmup)


def drive(trainer: Any, warmup: int) -> tuple[list[float], list[float], list[int]]:
    """Run a transformers Trainer; read the clock at the end of each step, and how many tokens it had, padding not counted."""
    import transformers

    clock, tokens, train = Clock(warmup), [], trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        return train(model, inputs, *args, **kwargs)

    trainer.training_step = counted

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            clock.mark()

    trainer.add_callback(Marks())
    trainer.train()
    return clock.seconds(), [r["loss"] for r in trainer.state.log_history if "loss" in r], tokens[warmup:]


CONTESTANTS: dict[str, tuple[Run, Tuned]] = {  # name: (function, tuned)
    "tunesmith": (run_ours, False),
    "Trainer, tuned": (run_trainer, True),
    "Trainer, tuned, head for loss only": (partial(run_trainer, keep=True), True),
    "TRL, tuned": (run_trl, True),
    "loop, tuned": (run_loop, True),
    "tunesmith (allocator off)": (run_ours_system_allocator, False),
    "Trainer, stock": (run_trainer, False),
    "TRL, stock": (run_trl, False),
    "loop, stock": (run_loop, False),
}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of everybody's arithmetic")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if args.child:
        function, tuned = CONTESTANTS[args.child]
        child(partial(function, precision=args.precision), args.work, args.steps, args.warmup, tuned)
        return
    with tempfile.TemporaryDirectory() as work:
        about = prepare(Path(work), args.model, args.root, args.warmup + args.steps, args.precision)
        names = {n: CONTESTANTS[n][1] for n in CONTESTANTS if not args.only or n in args.only or n == "tunesmith"}
        arguments = ["--work", work, "--steps", str(args.steps), "--warmup", str(args.warmup)]
        found = measure(__file__, names, [*arguments, "--precision", args.precision], args.rounds, step_rates)
    rows = summary(found, step_rates)
    for row in rows:
        row["utilisation"] = round(
            row["tokens_per_s"] * about["operations_per_token"] / about["ceiling_gflops"] / 1e9, 3
        )
    show(rows)
    if args.out:
        settings = {"model": args.model, "rounds": args.rounds, "steps": args.steps, "precision": args.precision}
        write_result(args.out, {**settings, **about}, rows, found)


if __name__ == "__main__":
    main()
