"""The estimate of the training loss is of the training rows, not of those that happened to be trained on first."""

import json

import pytest
import torch

import tunesmith as ts
from made_runs import write_run
from reference import random_model
from tiny_runs import comparable, last_digest, tiny_config
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.reward_head import RewardModel
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.study.run_figures import loss_curve
from tunesmith.train import halving, pair_loss, token_loss
from tunesmith.train.optim import build_optimizer
from tunesmith.train.pair_loss import PreferenceLoss, estimate_dpo, estimate_reward, reward_loss_sum
from tunesmith.train.resuming import OLD_DRAWS
from tunesmith.train.splits import in_batches, load_splits
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import estimate_loss, nll_sum

KINDS = ["packed", "windows", "padded", "pairs"]


def batches_of(kind, tmp_path, **options):
    """The training rows of the sample in batches of some kind."""
    if kind == "pairs":
        config = tiny_config("m", tmp_path, RewardConfig, **{"data__block_size": 64, "data__max_rows": None, **options})
        return in_batches(load_splits(config.data, Tokenizer.load(SAMPLE), pairs=True), config, pairs=True).train
    config = tiny_config(
        "m", tmp_path, **{"data__batching": kind, "data__block_size": 64, "data__max_rows": None, **options}
    )
    return in_batches(load_splits(config.data, Tokenizer.load(SAMPLE)), config).train


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_that_of_fresh_rows_when_the_first_batches_are_known_by_heart(tmp_path, kind):
    batches = batches_of(kind, tmp_path, train__batch_size=4)
    gpt = random_model(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=6144, block_size=64))
    model = RewardModel(gpt) if kind == "pairs" else gpt
    loss_sum = reward_loss_sum if kind == "pairs" else nll_sum
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    for step in range(40):
        optimizer_step(model, [batches[step % 2]], lambda b: loss_sum(model, b), optimizer, max_norm=1.0)

    def loss(some):
        return estimate_reward(model, some)[0]["loss"] if kind == "pairs" else estimate_loss(model, some).loss

    first, estimate, fresh = loss(batches.fixed(2)), loss(batches.sample(16)), loss(batches[i] for i in range(8, 24))
    assert first < 0.6 * min(fresh, estimate)
    assert estimate == pytest.approx(fresh, rel=0.3)  # 64 pairs are few


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_always_the_same_holds_each_row_once_and_is_not_what_comes_first(tmp_path, kind):
    batches = batches_of(kind, tmp_path, data__max_rows=60)

    def ids(some):
        return [
            row.tolist() for batch in some for row in (batch.input_ids if kind != "pairs" else [batch.input_ids[0]])
        ]

    assert ids(batches.sample(5)) == ids(batches.sample(5)) == ids(batches.sample(9))[: len(ids(batches.sample(5)))]
    assert ids(batches.sample(3)) != ids(batches.fixed(3))
    if kind != "windows":
        whole = [sorted(r for b in some for r in b.sources) for some in (batches.sample(10**6), batches.fixed())]
        assert whole[0] == whole[1]
    if kind == "pairs":
        assert batches.rows.sampled(2) == sorted(i for b in batches.sample(2) for i in b.pairs)


@pytest.mark.parametrize("kind", ["sft", "windows", "dpo", "reward"])
def test_an_estimate_that_has_been_begun_is_the_same_and_computes_only_what_is_missing(tmp_path, kind):
    """Shorter, equal, longer, longer than the data, and after an interruption."""
    batches = batches_of({"sft": "packed", "windows": "windows"}.get(kind, "pairs"), tmp_path, data__max_rows=60)
    gpt = random_model(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=6144, block_size=64))
    scorer = RewardModel(gpt) if kind == "reward" else None

    def estimate(some, kept=None):
        if scorer:
            return estimate_reward(scorer, some, kept=kept)
        if kind == "dpo":
            return estimate_dpo(gpt, some, lambda b: torch.zeros(b.count, 2), PreferenceLoss(), kept=kept)
        return estimate_loss(gpt, some, kept=kept)

    def passes(n):
        before = len(kept)
        assert estimate(batches.sample(n), kept) == estimate(batches.sample(n))
        return len(kept) - before

    def broken_off():
        yield from batches.sample(2)
        raise KeyboardInterrupt

    kept = []
    assert [passes(n) for n in (3, 2, 3, 5)] == [3, 0, 0, 2]
    assert passes(10**6) == len(list(batches.sample(10**6))) - 5
    kept.clear()
    with pytest.raises(KeyboardInterrupt):
        estimate(broken_off(), kept)
    assert passes(4) == 2


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig])
def test_the_rows_by_which_a_run_is_judged_are_computed_once_with_an_estimate_of_the_same_step(
    tiny_directory, tmp_path, monkeypatch, kind
):
    plain, passes = halving.within_memory, []
    train = {SFTConfig: ts.sft, DPOConfig: ts.dpo, RewardConfig: ts.train_reward_model}[kind]

    def run(name, shares):
        def counting(batches, compute, kept=None):
            return plain(batches, lambda batch: passes.append(name) or compute(batch), kept if shares else None)

        for module in (token_loss, pair_loss):
            monkeypatch.setattr(module, "within_memory", counting)
        return train(tiny_config(tiny_directory, tmp_path / name, kind, train__steps=2, eval__every=1))

    shared, apart = run("shared", True), run("apart", False)
    told = [[line for line in comparable(r) if line["event"] != "reference"] for r in (shared, apart)]
    assert told[0] == told[1]  # (the second run finds the reference of the first)
    assert last_digest(shared) == last_digest(apart)
    assert shared.status == apart.status
    judged, iters = 4, 3
    assert passes.count("shared") == (judged + iters) + 2 * iters + (judged + iters), "steps 0, 1 and 2"
    assert passes.count("apart") == passes.count("shared") + 2 * iters


def test_a_run_logs_the_loss_of_the_sample(tiny_directory, tmp_path):
    config = tiny_config(tiny_directory, tmp_path / "r", optimizer__lr=3e-3, train__steps=4, eval__every=4)
    run = ts.sft(config)
    train = in_batches(load_splits(config.data, Tokenizer.load(SAMPLE)), config).train
    model, _ = ts.load(f"{run.path}@4", device="cpu")
    with torch.no_grad():
        told, right, wrong = (run.metrics("eval")[-1]["train_loss"], *(estimate_loss(model, b(3)).loss for b in (train.sample, train.fixed)))  # fmt: skip  # noqa: E501
    assert told == pytest.approx(right, rel=1e-6)
    assert told != pytest.approx(wrong, rel=1e-4)


def test_a_run_of_an_earlier_version_says_so_when_it_goes_on_and_in_its_report(tiny_directory, tmp_path, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", train__steps=1))
    assert loss_curve(run).notes == ()
    stored = json.loads((run.path / "inputs.json").read_text())
    assert stored.pop("draws") == 2
    (run.path / "inputs.json").write_text(json.dumps(stored))
    for steps in (2, 3):  # and again: what an earlier version has logged stays in the log
        ts.sft(tiny_config(tiny_directory, run.path, train__steps=steps, resume=True))
        assert f"note: {OLD_DRAWS}" in capfd.readouterr().out
    (note,) = loss_curve(run).notes
    assert note.startswith("r: started by an earlier version")
    (write_run(tmp_path / "made").path / "inputs.json").unlink()
    assert loss_curve(ts.Run(tmp_path / "made")).notes[0].startswith("made: started by")
