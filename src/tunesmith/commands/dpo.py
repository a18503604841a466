"""Direct preference optimisation on pairs of answers: all weights, or LoRA adapters.

    tunesmith dpo --model.name runs/sft --data.name hh-pairs --lora.rank 8

Algorithm 4 of the paper, in about the memory of SFT: the prompt of a pair is computed once, pairs share rows, logits exist for a
few answers at a time, and the reference's log-probabilities are computed once and kept. What the usual recipes have
and this one leaves out: padding, a second copy of the model in memory, answers that lost their end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.batch import Batch
from tunesmith.data.cutting import block_size_of
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.texts import TextRows
from tunesmith.device import resolve_device
from tunesmith.files.run import Run
from tunesmith.judge.answering import rewards_at_steps
from tunesmith.models.modes import evaluation_mode
from tunesmith.options.training import DPOConfig
from tunesmith.plan.room import memory_lines
from tunesmith.train.choice import Sums
from tunesmith.train.divergence import batches_judged_by
from tunesmith.train.losses import SMOOTHED
from tunesmith.train.method import Task
from tunesmith.train.pair_loss import OBSERVED, PreferenceLoss, Reference, answer_logps, dpo_loss_sum, estimate_dpo
from tunesmith.train.reference import LogpStore, adapter_off, cached, second_model, store_path
from tunesmith.train.resolve import (
    check_options,
    check_pair_options,
    check_types,
    iters_of,
    precision_of,
    resolve_data,
    resolve_length,
    resolve_machine,
)
from tunesmith.train.resuming import inputs_of, prompts_of, rows_of, settle_origin
from tunesmith.train.session import begin, run_training
from tunesmith.train.splits import describe_pairs, load_splits, pair_batches
from tunesmith.train.token_loss import estimate_loss
from tunesmith.train.trainee import Trainee, load_trainee, prepare_model

BETAS = (1e-5, 1e3)  # between which a preference can be learned
ROBUST_SMOOTHING = 0.1  # of the robust loss where none is given: with 0 it is plain DPO


def check(config: DPOConfig) -> list[str]:
    """Checks the options that only this command has."""
    d, problems = config.dpo, check_pair_options(config.data)
    if not d.beta > 0:
        problems.append(f"--dpo.beta is {d.beta:g}, expected more than 0")
    elif d.beta < BETAS[0]:
        problems.append(
            f"--dpo.beta is {d.beta:g}: the gradient is proportional to it, and would be lost beside the optimizer's epsilon of 1e-8, so "
            f"that nothing is learned; give at least {BETAS[0]:g} (usual are 0.01 to 1)"
        )
    elif d.beta > BETAS[1]:
        problems.append(
            f"--dpo.beta is {d.beta:g}: the loss would hang on the rounding of the log-probabilities (some 0.001 nats an answer), times "
            f"beta; give at most {BETAS[1]:g} (usual are 0.01 to 1)"
        )
    if config.data.loss_on != "auto" and d.sft_data is None:
        problems.append("--data.loss_on only affects --dpo.sft_data here; a preference loss is always on the answers")
    if d.label_smoothing is not None and not 0 <= d.label_smoothing < 0.5:
        problems.append(f"--dpo.label_smoothing is {d.label_smoothing:g}, expected 0 or more and less than 0.5")
    if d.label_smoothing and d.loss not in SMOOTHED:
        problems.append(f"--dpo.label_smoothing has no effect with --dpo.loss {d.loss}; use sigmoid or robust")
    if d.reference == "adapter" and not config.lora.rank:
        problems.append(
            "--dpo.reference adapter needs adapters to switch off: give --lora.rank, or use cached or model"
        )
    if d.reference_device is not None and d.reference not in ("auto", "model"):
        problems.append(f"--dpo.reference_device is for a second model, and --dpo.reference {d.reference} uses none")
    return problems


def resolve_dpo(config: DPOConfig) -> DPOConfig:
    """The configuration with the defaults of `dpo` decided."""
    d = config.dpo
    if d.label_smoothing is None:
        d = dataclasses.replace(d, label_smoothing=ROBUST_SMOOTHING if d.loss == "robust" else 0.0)
    if d.reference == "auto":
        d = dataclasses.replace(d, reference="cached" if d.reference_device is None else "model")
    return dataclasses.replace(config, dpo=d)


def make_references(
    trainee: Trainee, config: DPOConfig, sets: Sequence[tuple[PairRows, Sequence[int]]]
) -> tuple[list[Reference], dict[str, Any]]:
    """One reference for each set of pairs, and what to log of it. sets: rows, and the numbers of the pairs that are needed.

    Called before the first step, while the policy still is the reference.
    """
    model, precision = trainee.trunk, precision_of(config)
    if config.dpo.reference == "adapter":
        return [adapter_off(model, precision)] * len(sets), {"mode": "adapter"}
    if config.dpo.reference == "model":
        where = resolve_device(config.dpo.reference_device or config.train.device, "--dpo.reference_device")
        return [second_model(model, where, precision)] * len(sets), {"mode": "model", "device": str(where)}
    store = LogpStore(store_path(trainee.fingerprint, precision))
    device = model.device

    def compute(batch: Batch) -> torch.Tensor:
        with evaluation_mode(model):  # fresh adapters add nothing yet
            return answer_logps(model, batch.to(device), precision)

    filled = [cached(rows, needed, store, compute) for rows, needed in sets]
    counts = {name: sum(getattr(fill, name) for _, fill in filled) for name in ("pairs", "computed")}
    return [reference for reference, _ in filled], {"mode": "cached", **counts}


def dpo(config: DPOConfig) -> Run:
    """Train on preferences and return the finished run.

    Raises: UserError before the first step, for anything in the configuration, data or model that cannot work.
    """
    config = check_types(config)
    check_options(config, check(config))
    with begin(config, "dpo") as (config, path):
        return _dpo(config, path)


def _dpo(config: DPOConfig, path: Path) -> Run:
    """As `dpo`, in the run's own directory."""
    config = resolve_dpo(config)
    trainee = load_trainee(config, path, fingerprint=True)
    model = trainee.trunk
    config = resolve_data(config, model.longest)
    config = resolve_machine(config, model.width, "dpo")
    splits = load_splits(config.data, trainee.tokenizer, pairs=True)
    train, validation, cut = pair_batches(splits, config)
    config = resolve_length(config, train, validation)
    sft_rows, more_notes = load_sft_rows(config, trainee)
    more = prompts_of(config.eval.prompts) | ({"sft_data": rows_of(sft_rows.rows.store)} if sft_rows else {})
    origin = settle_origin(config, path, inputs_of("dpo", trainee, splits, more))
    device, precision = prepare_model(trainee.model, trainee.trunk, config), precision_of(config)
    d = config.dpo
    settings = PreferenceLoss(d.beta, d.loss, d.label_smoothing or 0.0)
    iters, steps = iters_of(config), config.train.steps or 0
    micro_batches = steps * config.train.accumulate
    sampled = train.rows.sampled(max(iters, batches_judged_by(path, config.resume, micro_batches)))
    needed = sorted({*train.rows.used(micro_batches), *sampled})
    sets = [(train.rows, needed), (validation.rows, validation.rows.used(iters))]
    (on_train, on_validation), told = make_references(trainee, config, sets)

    def loss_sum(batch: Batch) -> torch.Tensor:
        return dpo_loss_sum(model, batch, on_train(batch), settings, precision)

    def evaluate() -> tuple[dict[str, float], Sums]:
        estimate = partial(estimate_dpo, model, settings=settings, precision=precision)
        seen, _ = estimate(train.sample(iters), on_train)
        held, parts = estimate(validation.fixed(iters), on_validation)
        found = {"train_loss": seen["loss"], "train_accuracy": seen["accuracy"]}
        found |= {name if name == "sft_loss" else f"validation_{name}": value for name, value in held.items()}
        if sft_rows is not None:
            found["sft_loss"] = estimate_loss(model, sft_rows.fixed(iters), precision).loss
        return found, parts

    task = Task(
        micro_batch=lambda i: train[i].to(device),
        per_epoch=train.per_epoch,
        loss_sum=loss_sum,
        evaluate=evaluate,
        train_loss=lambda n: estimate_dpo(model, train.sample(n), on_train, settings, precision)[0]["loss"],
        describe_rows=lambda batches: ", ".join(train.rows.store.place(r) for b in batches for r in b.sources[:3]),
        counted="pairs",
        observed=OBSERVED,
        opening=[("pairs", describe_pairs(train.rows, validation.rows, iters)), ("reference", told)],
        about=f"{len(train.rows):,} pairs, {train.rows_per_epoch:,} batch rows per epoch, reference {told['mode']}",
        memory=memory_lines(config, trainee.trunk.config, train),
        notes=[*splits.notes, *cut, *more_notes],
        reward_at=rewards_at_steps(config.eval, trainee, path, device),
    )
    return run_training(config, path, trainee, device, origin, task)


def load_sft_rows(config: DPOConfig, trainee: Trainee) -> tuple[Batches[TextRows] | None, list[str]]:
    """Validation rows of `dpo.sft_data`, on which the paper watches the policy's loss, and what was skipped or cut of them."""
    if config.dpo.sft_data is None:
        return None, []
    data = dataclasses.replace(
        config.data, name=config.dpo.sft_data, columns=None, config=None, batching="packed", truncation="auto"
    )
    splits = load_splits(data, trainee.tokenizer)
    layout = BatchLayout(
        batching="packed",
        block_size=block_size_of(data),
        batch_size=config.train.batch_size,
        loss_on=data.loss_on,
        seed=data.rows_seed,
    )
    rows = TextRows(splits.validation, splits.validation_rows, layout)
    cut = [f"validation: {line}" for line in rows.cut_lines()]
    return Batches(rows), [f"{data.name}: {line}" for line in (*splits.notes, *cut)]
