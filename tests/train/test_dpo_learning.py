"""What DPO learns: pairs it never saw are judged rightly, and generated answers become what was preferred."""

import json
import math

import pytest

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.options.training import DPOConfig

pytestmark = pytest.mark.long

LN2 = 0.693147
SELDOM = {"eval__every": 999, "checkpoint__every": 999}


def interval(share, n, z=1.96):
    """Wilson's 95 % interval of a share of n."""
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def assert_above(chance, share, n, what):
    low, high = interval(share, n)
    assert low > chance, f"{what}: {share:.3f} of {n} ({low:.3f} to {high:.3f}), chance {chance:.3f}"


def dpo(model, out, **options):
    return ts.dpo(tiny_config(model, out, DPOConfig, **(SELDOM | options)))


def test_the_sample_model_comes_to_prefer_the_chosen_answers_of_pairs_it_never_saw(tmp_path):
    options = {"data__block_size": 256, "train__epochs": 1.0, "train__steps": None, "optimizer__lr": 2e-4}
    run = dpo("sample", tmp_path / "r", **options, eval__iters=21, eval__at_start=False)
    (told,), (last,), steps = run.metrics("pairs"), run.metrics("eval"), run.metrics("train")
    assert told["validation_pairs"] == 40
    assert_above(0.5, last["validation_accuracy"], 40, "held-out pairs with the chosen answer first")
    assert_above(told["validation_longer_chosen"], last["validation_accuracy"], 40, "these, against the longer answer")
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-6)
    late = [line["margin"] for line in steps[-10:]]
    assert sum(late) / 10 > 0.3, f"margins of the last steps, each on pairs not seen before: {late}"
    assert last["validation_margin"] > 0.5
    assert last["validation_loss"] < LN2 - 0.1


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_generated_answers_become_what_was_preferred(tiny_directory, tmp_path):
    """A model that says `happy` as often as `tired` learns from pairs to say `happy`, also to questions it never saw."""
    animals = "cat dog horse cow goat sheep hen duck pig fox wolf bear lion seal crab frog owl crow swan mouse"
    questions = ("How is the {}?", "Is the {} well?", "And my {}?")
    prompts = [question.format(animal) for animal in animals.split(" ") for question in questions]
    held, answers = prompts[::6], {"chosen": "It is happy now.", "rejected": "It is tired now."}
    for split, own in (("test", held), ("train", [p for p in prompts if p not in held])):
        write(tmp_path / "pairs" / f"{split}.jsonl", [{"prompt": p, **answers} for p in own])
        both = [{"prompt": p, "completion": a} for p in own for a in answers.values()]
        write(tmp_path / "both" / f"{split}.jsonl", both)
    shared = SELDOM | {"data__block_size": 128, "train__batch_size": 4, "optimizer__lr": 3e-3, "train__steps": 80}
    base = ts.sft(tiny_config(tiny_directory, tmp_path / "sft", data__name=str(tmp_path / "both"), **shared))
    sgd = {"optimizer__name": "sgd", "optimizer__lr": 1e-2, "train__steps": 40, "dpo__beta": 0.5}
    tuned = dpo(base.path, tmp_path / "dpo", data__name=str(tmp_path / "pairs"), **(shared | sgd))

    def saying(run):
        """Of 50 sampled answers to held-out questions, how many say happy, and tired."""
        model, tokenizer = ts.load(f"{run.path}@{run.checkpoints()[-1][0]}", device="cpu")
        asked, found = [[{"role": "user", "content": p}] for p in held], []
        for seed in range(5):
            found += ts.generate(model, tokenizer, asked, max_new_tokens=16, temperature=1.0, top_p=1.0, seed=seed)
        assert len(found) == 50
        return [sum(word in answer for answer in found) for word in ("happy", "tired")]

    before, after = saying(base), saying(tuned)
    assert all(15 <= n <= 35 for n in before), f"happy, tired of 50 before: {before}"
    low, _ = interval(after[0] / 50, 50)
    _, high = interval(before[0] / 50, 50)
    assert low > high, f"answers of 50 that say happy and tired: {before} before, {after} after"
    assert after[1] <= 3, f"answers of 50 that say happy and tired: {before} before, {after} after"


def test_training_pairs_of_hh_are_learned_by_a_tiny_model(shared_data, tiny_directory, tmp_path):
    options = {"data__name": "hh:harmless-base", "data__root": str(shared_data / "hh-rlhf"), "data__max_rows": 60}
    run = dpo(tiny_directory, tmp_path / "r", **options, data__block_size=256, train__steps=50, eval__iters=60)
    (told,), (_, last) = run.metrics("pairs"), run.metrics("eval")
    assert 50 < told["train_pairs"] <= 60
    assert_above(0.75, last["train_accuracy"], told["train_pairs"], "training pairs with the chosen answer first")
    assert math.isfinite(last["validation_loss"])
