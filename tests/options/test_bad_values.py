"""Values that nothing sensible can be done with: each is refused where it is given, by name, from Python too."""

import dataclasses

import numpy as np
import pytest
import torch

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.errors import UsageError, UserError
from tunesmith.files.names import SAMPLE
from tunesmith.generation.engine import stream
from tunesmith.generation.sampling import Sampling
from tunesmith.options.parse import option_types, parts_of
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig

NAN, INF = float("nan"), float("inf")
TRAIN = {SFTConfig: ts.sft, DPOConfig: ts.dpo, RewardConfig: ts.train_reward_model, PretrainConfig: ts.pretrain}


@pytest.fixture(scope="module")
def loaded(tiny_directory):
    return ts.load(str(tiny_directory), device="cpu")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": (NAN, -1, "hot", None), "top_p": (NAN, 0, 1.5, "all"), "top_k": (NAN, 1.5, -1, None), "seed": (1.5, -1, NAN, None),
        "max_new_tokens": (0, 2.5, NAN, None, True), "batch_size": (0, -1, 1.5, NAN, None),
    }.items(),
)  # fmt: skip
def test_generate_refuses_by_name(loaded, name, values):
    question = [{"role": "user", "content": "Hi"}]
    for value in values:
        with pytest.raises(UsageError, match=f"{name} is {value!r}, expected"):
            ts.generate(*loaded, [question], **{"max_new_tokens": 2, name: value})
        with pytest.raises(UsageError, match=f"{name} is {value!r}, expected"):
            ts.generate(*loaded, [], **{"max_new_tokens": 2, name: value})
    if name == "max_new_tokens":
        with pytest.raises(UsageError, match="max_new_tokens is nan"):
            next(stream(*loaded, question, Sampling(), NAN))


@pytest.mark.parametrize("name", [None, 3, ""])
def test_load_refuses_what_is_no_name(name):
    for load in (ts.load, ts.load_reward):
        with pytest.raises(UsageError, match="expected a name on the hub"):
            load(name, device="cpu")


def test_load_takes_a_path_and_refuses_a_dtype_that_holds_no_weights(tiny_directory):
    assert ts.load(tiny_directory, device="cpu", dtype=torch.bfloat16)[0].wte.weight.dtype is torch.bfloat16
    for dtype in ("float32", torch.int32, None):
        with pytest.raises(UsageError, match="expected a floating-point one"):
            ts.load(str(SAMPLE), device="cpu", dtype=dtype)


def test_a_run_that_is_none_says_so(tmp_path):
    for ask in (
        lambda run: run.config,
        lambda run: run.status,
        lambda run: run.best_checkpoint(),
        lambda run: run.checkpoint(3),
    ):
        with pytest.raises(UserError, match=str(tmp_path)):
            ask(ts.Run(tmp_path))


def wrong(kind):
    """Values of other types than an option's."""
    parts = parts_of(kind)
    found = [["a"], {"a": 1}]
    if float in parts:
        found += [NAN, INF, -INF, "much"]
    if int in parts:
        found += [1.5, NAN, True] if bool not in parts else [1.5]
    if type(None) not in parts:
        found.append(None)
    return [*found, "no such word"] if str not in parts and float not in parts else found


@pytest.mark.parametrize("kind", TRAIN)
def test_every_option_refuses_a_value_of_another_type_before_anything_is_written(tmp_path, kind):
    config = tiny_config("sample", tmp_path / "r", kind)
    for name, type_ in option_types(kind).items():
        group, _, option = name.rpartition(".")
        for value in wrong(type_):
            if group:
                changed = dataclasses.replace(
                    config, **{group: dataclasses.replace(getattr(config, group), **{option: value})}
                )
            else:
                changed = dataclasses.replace(config, **{name: value})
            with pytest.raises(UsageError) as caught:
                TRAIN[kind](changed)
            assert f"--{name} is {value!r}, expected" in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_word_that_is_nearly_one_of_the_choices_is_suggested(tmp_path):
    with pytest.raises(
        UsageError, match=r"--data.batching is 'pakced', expected packed, windows or padded. Did you mean packed\?"
    ):
        ts.sft(tiny_config("sample", tmp_path / "r", data__batching="pakced"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dpo__beta": 1e-30}, r"--dpo.beta is 1e-30: the gradient .* nothing is learned; give at least 1e-05"),
        ({"dpo__beta": 1e30}, r"--dpo.beta is 1e\+30: the loss would hang on the rounding .*; give at most 1000"),
        ({"optimizer__lr": 1e-30}, r"--optimizer.lr is 1e-30: no weight in float32 changes by so little"),
        ({"train__grad_clip": 1e-30}, r"--train.grad_clip is 1e-30: .* 0 = no clipping"),
        ({"lora__rank": 2, "lora__alpha": 1e-30}, r"--lora.alpha is 1e-30 at --lora.rank 2"),
        ({"lora__rank": 2, "lora__alpha": 1e30}, r"--lora.alpha is 1e\+30 at --lora.rank 2"),
    ],
)
def test_settings_with_which_nothing_would_be_learned_are_refused_with_the_reason(tmp_path, options, told):
    with pytest.raises(UsageError, match=told):
        ts.dpo(tiny_config("sample", tmp_path / "r", DPOConfig, **options))


@pytest.mark.parametrize("kind", TRAIN)
def test_numbers_of_numpy_and_paths_are_options_like_any_other(tmp_path, tiny_directory, kind):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Which?", "chosen": "This one.", "rejected": "That."}\n' * 3)
    numbers = {
        "data__max_rows": np.int64(3), "data__seed": np.uint8(5), "train__steps": np.int64(2), "train__seed": np.int64(3),
        "optimizer__lr": np.float32(1e-3), "optimizer__weight_decay": np.float64(0), "checkpoint__keep": np.int64(0),
    }  # fmt: skip
    model, more = tiny_directory, {}
    if kind is PretrainConfig:
        model, more, shape = (
            "gpt2",
            {"tokenizer__name": "sample"},
            {"model__n_layer": np.int64(1), "model__n_head": 1, "model__n_embd": 16},
        )
        numbers |= {**shape, "model__block_size": np.int64(4), "data__block_size": np.int64(4)}
    run = TRAIN[kind](tiny_config(model, tmp_path / "r", kind, data__name=rows, **more, **numbers))
    for name, value in numbers.items():
        group, key = name.split("__")
        assert run.config[group][key] == value
    assert run.config["data"]["name"] == str(rows)


def test_a_seed_that_torch_does_not_take_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--train.seed is \d+, expected less than 2\*\*64"):
        ts.sft(tiny_config("sample", tmp_path / "r", train__seed=2**64))
