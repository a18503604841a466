"""A MODEL that is a run can be loaded while it trains: where its checkpoint goes, the next one is read, whole."""

import shutil

import pytest
import torch

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.errors import UserError
from tunesmith.files import names
from tunesmith.options.training import RewardConfig

STEPS = {"train__steps": 3, "eval__every": 1, "checkpoint__every": 1, "checkpoint__keep": 9, "eval__iters": 1}


@pytest.fixture(scope="module", params=["sft", "lora", "reward"])
def run(request, tiny_directory, tmp_path_factory):
    more = {"lora__rank": 2} if request.param == "lora" else {}
    kind, train = (RewardConfig, ts.train_reward_model) if request.param == "reward" else (ts.SFTConfig, ts.sft)
    return train(tiny_config(tiny_directory, tmp_path_factory.mktemp("read") / request.param, kind, **STEPS, **more))


def weights(loaded):
    return torch.cat([p.flatten() for p in loaded[0].parameters()])


@pytest.mark.parametrize("moment", ["before the weights", "after the weights", "in between"])
def test_of_a_checkpoint_that_is_removed_while_it_is_read_the_next_one_is_read(run, tmp_path, monkeypatch, moment):
    copy = ts.Run(shutil.copytree(run.path, tmp_path / "run"))
    load = ts.load_reward if "reward" in run.path.name else ts.load
    part = (
        "_tokenizer_in"
        if moment == "after the weights"
        else "load_reward_model"
        if load is ts.load_reward
        else "load_plain"
    )
    read, removed = getattr(names, part), []

    def reading(directory, **more):
        if not removed:
            removed.append(directory)
            if moment == "in between":
                found = read(directory, **more)
                shutil.rmtree(directory)
                return found
            shutil.rmtree(directory)
        return read(directory, **more)

    monkeypatch.setattr(names, part, reading)
    loaded = load(str(copy.path), device="cpu")
    monkeypatch.undo()
    assert removed
    assert copy.best_checkpoint() != removed[0]
    assert torch.equal(weights(loaded), weights(load(str(copy.best_checkpoint()), device="cpu")))


def test_a_damaged_checkpoint_that_stays_is_an_error_and_so_is_a_step_that_goes(run, tmp_path, monkeypatch):
    copy = ts.Run(shutil.copytree(run.path, tmp_path / "run"))
    load = ts.load_reward if "reward" in run.path.name else ts.load
    (file,) = copy.checkpoint(3).glob("*model.safetensors")
    file.write_bytes(b"{")
    with pytest.raises(UserError, match="safetensors"):
        load(f"{copy.path}@3", device="cpu")
    read = names._tokenizer_in
    monkeypatch.setattr(names, "_tokenizer_in", lambda d: (shutil.rmtree(d), read(d)))
    with pytest.raises(UserError, match=r"has no checkpoint of step 2; it has: 0, 1, 3"):
        load(f"{copy.path}@2", device="cpu")
