"""Direct preference optimisation on pairs of answers: all weights, or LoRA adapters.

Algorithm 4 of the paper, in about the memory of SFT: the prompt of a pair is computed once, pairs share rows, logits exist for a
few answers at a time, and the reference's log-probabilities are computed once and kept. What the usual recipes have
and this one leaves out: padding, a second copy of the model in memory, answers that lost their end.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.options.configs import precision_of, with_options
from tunesmith.options.training import DPOConfig
from tunesmith.train.methods.method import Method, StepWork
from tunesmith.train.methods.preferences import OBSERVED, check_pair_options, pair_metrics

if TYPE_CHECKING:
    from tunesmith.models.model import Model
    from tunesmith.train.pair_loss import PreferenceLoss, Reference
    from tunesmith.train.splits import Data
    from tunesmith.train.task import Estimated, LossSum, Prepared, Sampled, Task
    from tunesmith.train.trainee import Trainee

BETAS = (1e-5, 1e3)  # between which a preference can be learned
ROBUST_SMOOTHING = 0.1  # of the robust loss where none is given: with 0 it is plain DPO


def check(config: DPOConfig) -> list[str]:
    """What is wrong with the options that only this command has."""
    from tunesmith.train.losses import SMOOTHED

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


def resolve(config: DPOConfig) -> DPOConfig:
    """The configuration with the defaults of `dpo` decided."""
    d, decided = config.dpo, dict[str, Any]()
    if d.label_smoothing is None:
        decided["dpo.label_smoothing"] = ROBUST_SMOOTHING if d.loss == "robust" else 0.0
    if d.reference == "auto":
        decided["dpo.reference"] = "cached" if d.reference_device is None else "model"
    return with_options(config, decided)


def preference_loss(config: DPOConfig) -> PreferenceLoss:
    """The loss of a resolved configuration."""
    from tunesmith.train.pair_loss import PreferenceLoss

    d = config.dpo
    return PreferenceLoss(d.beta, d.loss, d.label_smoothing or 0.0)


def loss_sum(model: Model, config: DPOConfig, reference: Reference | None = None) -> LossSum:
    """DPO of a batch's pairs. reference: of the training; else a live one, or zeros, which take the time of kept ones."""
    from tunesmith.train.pair_loss import dpo_loss_sum
    from tunesmith.train.reference import live_reference, zeros

    held = reference or live_reference(model, config) or zeros
    settings, precision = preference_loss(config), precision_of(config)
    return lambda batch: dpo_loss_sum(model, batch, held(batch), settings, precision)


def data(config: DPOConfig, trainee: Trainee) -> Data:
    """The pairs, and validation rows of `dpo.sft_data`, on which the paper watches the policy's loss."""
    from tunesmith.train.splits import load_data, watched_texts

    pairs = load_data(config, trainee.tokenizer, pairs=True)
    if config.dpo.sft_data is None:
        return pairs
    watched, notes = watched_texts(config.dpo.sft_data, config, trainee.tokenizer)
    return dataclasses.replace(pairs, watched=watched, notes=[*pairs.notes, *notes])


def task(run: Prepared) -> Task:
    """The run as the loop reads it. Called before the first step, while the policy still is the reference."""
    from tunesmith.train.pair_loss import estimate_dpo
    from tunesmith.train.reference import make_references
    from tunesmith.train.token_loss import estimate_loss

    train, validation, watched, iters = run.data.train, run.data.validation, run.data.watched, run.iters
    model, settings, precision = run.trainee.trunk, preference_loss(run.config), run.precision
    on_train, on_validation, kept = make_references(run)
    estimate = partial(estimate_dpo, model, settings=settings, precision=precision)

    def evaluate(sampled: Sampled) -> Estimated:
        on_sample, _ = estimate(train.sample(iters), on_train, kept=sampled)
        held_out, losses = estimate(validation.fixed(iters), on_validation)
        metrics = pair_metrics(on_sample, held_out)
        if watched is not None:
            metrics["sft_loss"] = estimate_loss(model, watched.fixed(iters), precision).loss
        return metrics, losses

    return run.task(
        loss_sum=loss_sum(model, run.config, on_train),
        evaluate=evaluate,
        train_loss=lambda n, sampled: estimate(train.sample(n), on_train, kept=sampled)[0]["loss"],
        about=f"{len(train.rows):,} pairs, {train.rows_per_epoch:,} batch rows per epoch, reference {kept['mode']}",
        opening=[run.data.pairs_event(iters), ("reference", kept)],
    )


def step_work(config: DPOConfig) -> StepWork:
    """A second model is a second set of weights, unless it is on another device; a live reference is a pass of its own."""
    d = config.dpo
    if d.reference not in ("model", "adapter"):
        return StepWork(
            ahead="a forward pass over all pairs before the first step, if the reference is not computed yet"
        )
    here = d.reference_device in (None, config.train.device)
    return StepWork(copies=2 if d.reference == "model" and here else 1, frozen_passes=1)


def cheaper(config: DPOConfig) -> dict[str, tuple[Any, str]]:
    """Kept log-probabilities in place of a live reference."""
    if not step_work(config).frozen_passes:
        return {}
    return {"dpo.reference": ("cached", "no second set of weights; computed once before training")}


METHOD = Method(
    command="dpo",
    config=DPOConfig,
    title="Direct preference optimisation",
    learning_rate=1e-6,
    pairs=True,
    observed=OBSERVED,
    held_to_start=True,
    check=check,
    resolve=resolve,
    data=data,
    loss_sum=loss_sum,
    task=task,
    step_work=step_work,
    cheaper=cheaper,
)
