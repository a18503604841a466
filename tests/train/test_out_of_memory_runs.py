"""Memory that ends in estimates and in whole runs: the same result, told once, remembered when resumed."""

import json
import shutil

import pytest
import torch

import tunesmith as ts
from made_pairs import batches_of
from short_memory import CUDA, FLOAT64, case, fail
from tiny_runs import as_argv, change_step_loss, comparable, last_digest, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.errors import UserError
from tunesmith.files.weights import load_model
from tunesmith.options.training import DPOConfig, RewardConfig
from tunesmith.train import pair_loss, token_loss
from tunesmith.train.optim import OneByOne
from tunesmith.train.pair_loss import PreferenceLoss, estimate_dpo, estimate_reward
from tunesmith.train.reference import LogpStore, cached
from tunesmith.train.token_loss import estimate_loss

# Estimates


def short_of(monkeypatch, module, name, room):
    """`module.name`, whose second argument is a batch, fails above `room` tokens; the sizes that did."""
    plain, failures = getattr(module, name), []

    def limited(model, batch, *args, **more):
        if batch.size > room:
            failures.append(batch.size)
            fail()
        return plain(model, batch, *args, **more)

    monkeypatch.setattr(module, name, limited)
    return failures


def steps_short_of(monkeypatch, kind, room):
    """The loss of a step fails above `room` tokens; the sizes that did."""
    failures = []

    def limited(loss_sum, batch):
        if batch.size > room:
            failures.append(batch.size)
            fail()
        return loss_sum(batch)

    change_step_loss(monkeypatch, kind, limited)
    return failures


def test_a_loss_estimate_in_pieces_is_the_same_batch_by_batch(monkeypatch):
    model, batches, _ = case("packed")
    expected = estimate_loss(model, batches)
    failures = short_of(monkeypatch, token_loss, "nll_sum", 256)
    found = estimate_loss(model, batches)
    assert failures == [1024, 512]
    assert (found.loss, found.tokens) == (pytest.approx(expected.loss, rel=FLOAT64), expected.tokens)
    assert [n for _, n in found.parts] == [n for _, n in expected.parts]
    assert [x for x, _ in found.parts] == pytest.approx([x for x, _ in expected.parts], rel=FLOAT64)
    short_of(monkeypatch, token_loss, "nll_sum", 10)
    with pytest.raises(UserError, match=r"out of memory in a forward pass over 1 row x .*--data\.block_size"):
        estimate_loss(model, batches)


def test_preference_estimates_and_the_kept_reference_in_pieces_are_the_same(monkeypatch, tmp_path):
    model, batches, _ = case("dpo")
    scorer = case("reward")[0]
    table = torch.randn(60, 2, dtype=torch.float64) - 30

    def reference(batch):
        return table[list(batch.pairs)]

    def kept(name):
        made = batches_of(batch_size=4)
        store = LogpStore(tmp_path / name)
        known, fill = cached(made.rows, range(40), store, lambda batch: pair_loss.answer_logps(model, batch))
        assert fill.computed == 40
        return known(made.rows.assemble(range(40)))

    def found(name):
        dpo_means, dpo_parts = estimate_dpo(model, batches, reference, PreferenceLoss())
        reward_means, reward_parts = estimate_reward(scorer, batches)
        numbers = [
            *dpo_means.values(),
            *(x for x, _ in dpo_parts),
            *reward_means.values(),
            *(x for x, _ in reward_parts),
        ]
        return numbers, kept(name)

    expected, expected_logps = found("a")
    failures = [short_of(monkeypatch, pair_loss, name, 70) for name in ("answer_logps", "pair_scores")]
    numbers, logps = found("b")
    assert all(failures)
    assert numbers == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(logps, expected_logps)


# Whole runs


RUNS = {
    "sft": (ts.sft, {}),
    "dpo": (ts.dpo, {"kind": DPOConfig}),
    "reward": (ts.train_reward_model, {"kind": RewardConfig}),
}
PLAIN = {"optimizer__name": "sgd", "optimizer__lr": 0.1, "train__accumulate": 2}


def pairs_file(path):
    turns = [(f"What is {i}?", f"It is {i * 7} and no more.", f"{i} or so") for i in range(40)]
    rows = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__name": str(path)}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_ran_out_of_memory_ends_as_one_that_did_not(tiny_directory, tmp_path, monkeypatch, capsys, kind):
    """float32 sums in another order: weights equal to 1e-6 after six steps. It fails once, and says so once."""
    train, named = RUNS[kind]
    options = PLAIN | named | (pairs_file(tmp_path / "pairs.jsonl") if kind != "sft" else {})
    whole = train(tiny_config(tiny_directory, tmp_path / "whole", **options))
    failures = steps_short_of(monkeypatch, kind, 150)
    capsys.readouterr()
    run = train(tiny_config(tiny_directory, tmp_path / "split", **options))
    printed = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    (event,) = run.metrics("split")
    assert [event["tokens"]] == failures
    assert (event["step"], event["limit"]) == (1, run.status["split_limit"])
    assert event["limit"] < event["tokens"]
    (line,) = printed
    assert line.startswith("step 1: out of memory with ")
    assert f"at most {event['limit']} tokens" in line
    assert "fp32 on CPU" in line
    assert "--train.batch_size 1 --train.accumulate 4" in line
    assert train_losses(run) == pytest.approx(train_losses(whole), rel=1e-6)
    assert [m["tokens"] for m in run.metrics("train")] == [m["tokens"] for m in whole.metrics("train")]
    assert "split_limit" not in whole.status
    if kind == "sft":
        after = load_model(whole.checkpoints()[-1][1]).state_dict()
        for name, value in load_model(run.checkpoints()[-1][1]).state_dict().items():
            torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6, msg=name)


def test_a_resumed_run_goes_on_with_the_size_that_fits(tiny_directory, tmp_path, monkeypatch):
    """Bit for bit, and without a second failure; with another need of memory the limit is found anew."""
    options = {**PLAIN, "model__dropout": 0.2}
    failures = steps_short_of(monkeypatch, "sft", 150)
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **options))
    assert len(failures) == 1
    for name, more, again in (("same", {}, 1), ("other", {"train__activation_checkpointing": True}, 2)):
        run = ts.Run(tmp_path / name)
        shutil.copytree(whole.path, run.path)
        shutil.rmtree(run.checkpoints()[-1][1])
        assert run.checkpoints()[-1][0] == 3
        ts.sft(tiny_config(tiny_directory, run.path, **options, **more, resume=True))
        assert len(failures) == again
        assert len(run.metrics("split")) == again
        if name == "same":
            assert comparable(run) == comparable(whole)
            assert last_digest(run) == last_digest(whole)
            assert run.status == whole.status


def test_a_run_that_updates_inside_backward_ends_at_once(tiny_directory, tmp_path, monkeypatch):
    options = {"train__optimizer_in_backward": True, "train__grad_clip": 0.0, "eval__at_start": False}
    failures = steps_short_of(monkeypatch, "sft", 150)
    with pytest.raises(
        UserError, match=r"2 rows x 128 tokens.*--train\.batch_size, --train\.optimizer_in_backward false"
    ):
        ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options))
    assert failures == [256]


def test_the_command_ends_with_one_line_where_a_document_does_not_fit(tiny_directory, tmp_path, monkeypatch, capsys):
    failures = steps_short_of(monkeypatch, "sft", 5)
    config = tiny_config(tiny_directory, tmp_path / "r", eval__at_start=False)
    assert main(as_argv(config)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tunesmith: out of memory with 1 row x ")
    told = [
        "fp32 on CPU",
        "--train.activation_checkpointing true",
        "--data.block_size below 128",
        "--lora.rank",
        "Tried to",
    ]
    assert all(part in line for part in told)
    assert len(failures) >= 2
    assert ts.Run(tmp_path / "r").status["state"] == "failed"
    assert "out of memory" in ts.Run(tmp_path / "r").status["reason"]
    assert not ts.Run(tmp_path / "r").checkpoints()


def test_optimizer_state_that_does_not_fit_ends_the_command_with_one_line(
    monkeypatch, tiny_directory, tmp_path, capsys
):
    def fail(_self):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(OneByOne, "allocate_state", fail)
    assert main(as_argv(tiny_config(tiny_directory, tmp_path / "run"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("tunesmith: out of memory allocating the state of adamw for")
    assert len(told.splitlines()) == 1
