"""What a training says at its end, and what is said about a name that was not meant so."""

import json
import shlex

import pytest

import tunesmith as ts
from tiny_runs import as_argv, tiny_config
from tunesmith.__main__ import main
from tunesmith.errors import UserError, did_you_mean
from tunesmith.files.names import find_model
from tunesmith.files.run import Run
from tunesmith.options.training import DPOConfig, RewardConfig

SHORT = {"train__steps": 2, "data__max_rows": 12, "data__block_size": 64, "eval__iters": 1, "eval__every": 2}
QUICK = {  # what makes the suggested commands quick: they run as they stand, with this behind them
    "chat": [], "compare": ["--limit", "1", "--generate.max_new_tokens", "2"], "evaluate": ["--data.max_rows", "4"],
    "score": ["--limit", "2", "--generate.max_new_tokens", "2"],
    "sft": ["--train.steps", "1", "--data.max_rows", "4", "--eval.iters", "1"],
    "dpo": ["--train.steps", "1", "--data.max_rows", "4", "--eval.iters", "1", "--eval.max_new_tokens", "2"],
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115 - chat reads to its end
    return tmp_path


def suggested(text):
    """The line about the best checkpoint, and the commands in the last lines of a training."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("next: "))
    (best,) = (line for line in lines if "best checkpoint" in line)
    return best, [line[6:] for line in lines[first:]]


def trained(config, capsys):
    assert main(as_argv(config)) == 0
    return suggested(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("kind", "commands"),
    [(None, ["chat", "compare"]), (RewardConfig, ["score", "dpo"]), (DPOConfig, ["compare", "chat"])],
    ids=["sft", "reward", "dpo"],
)
def test_a_training_ends_with_the_directory_to_load_and_two_commands_that_run(
    kind, commands, tiny_directory, here, capsys
):
    options = {**SHORT, **({"kind": kind} if kind else {})}
    best, found = trained(tiny_config(tiny_directory, "runs/my run", **options), capsys)
    run = Run("runs/my run")
    step = run.status["best_step"]
    where = f"'{run.best_checkpoint()}'; MODEL 'runs/my run' selects it"
    assert best.partition("; not distinguishable")[0] == f"best checkpoint: step {step} (by validation loss; {where})"
    assert [shlex.split(line)[:2] for line in found] == [["tunesmith", command] for command in commands]
    for line in found:
        words = shlex.split(line)[1:]
        assert main([*words, *QUICK[words[0]]]) == 0, line


def test_after_pretraining_comes_sft(here, capsys):
    text = here / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The number {i} comes before {i + 1}."}) + "\n" for i in range(300)))
    shape = ["--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "16", "--model.block_size", "64"]
    argv = [
        "pretrain",
        "--data",
        "text.jsonl",
        *shape,
        "--tokenizer.vocab_size",
        "300",
        "--train.steps",
        "1",
        "--eval.iters",
        "1",
    ]
    assert main([*argv, "--out", "base"]) == 0
    _, found = suggested(capsys.readouterr().out)
    assert found == ["tunesmith sft --model base --data sample", "tunesmith chat base"]
    for line in found:
        words = shlex.split(line)[1:]
        assert main([*words, *QUICK[words[0]]]) == 0


def test_a_model_that_began_at_random_is_not_compared_with_its_beginning(tiny_directory, here, capsys):
    _, found = trained(tiny_config(tiny_directory, "r", model__init="random", **SHORT), capsys)
    assert found == ["tunesmith chat r", "tunesmith evaluate r sample"]
    assert main([*shlex.split(found[1])[1:], *QUICK["evaluate"]]) == 0


# ---- did you mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"), [("smaple", "sample"), ("sampel", "sample"), ("gpt2-meduim", "gpt2-medium")]
)
def test_a_models_name_that_is_nearly_one_is_suggested(typed, meant, capsys):
    with pytest.raises(UserError, match=rf"Did you mean {meant}\?"):
        find_model(typed)
    for argv in (["chat", typed], ["evaluate", typed, "sample"], ["plan", "--model", typed, "--device", "t4"]):
        assert main(argv) == 1
        assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_a_file_and_the_published_smollm2_are_answered_with_what_to_name(here):
    (here / "model").mkdir()
    (here / "model" / "model.safetensors").touch()
    for name in ("model/model.safetensors", "./model/model.safetensors"):
        with pytest.raises(UserError, match=r"It is a file: name its directory, model$"):
            find_model(name)
    with pytest.raises(UserError, match="Without the hub: smollm2, dequantised from 4 bits"):
        find_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_run_beside_the_missing_one_is_suggested(here, capsys):
    run = here / "runs" / "first"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "step": 3}')
    for name in ("runs/frist", "frist", "first", "runs/firts/"):
        with pytest.raises(UserError, match=r"Did you mean runs/first\?"):
            find_model(name)
    for name in ("runs/frist@3", "frist@3", "runs/frist@all"):
        assert main(["score", name, "--reward", "sample"]) == 1
        assert f"Did you mean runs/first@{name.partition('@')[2]}?" in capsys.readouterr().err
    assert main(["report", "runs/frist"]) == 1
    assert "Did you mean runs/first?" in capsys.readouterr().err
    assert main(["sft", "--resume", "--out", "runs/frist"]) == 1
    assert "Did you mean runs/first?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["plna"], "plan"), (["plan", "dop"], "dpo"), (["sft", "--optimizer.name", "admw"], "adamw"),
        (["sft", "--train.precision", "bf61"], "bf16"), (["data", "smaple"], "sample"), (["sft", "--config", "paper/e11"], "paper/e1"),
        (["sft", "--config", "mine.yml"], "mine.yaml"), (["compare", "sample", "sample", "--prompts", "promts.txt"], "prompts.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_other_names_that_are_nearly_one_are_suggested(argv, meant, here, capsys):
    (here / "mine.yaml").write_text("data: {}\n")
    (here / "prompts.txt").write_text("Hello\n")
    assert main(argv) in (1, 2)
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_nothing_is_suggested_for_a_name_like_no_other():
    assert did_you_mean("someone/their-model", ["sample", "gpt2"]) == ""
    assert did_you_mean("frist", ["first"], {"first": "runs/first"}) == ". Did you mean runs/first?"


# ---- conversations that cannot be answered ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "empty conversation"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "ends with an assistant turn.*'Hello'",
        ),
        ([{"role": "assistant", "content": "Hello"}], "ends with an assistant turn"),
    ],
)
def test_a_conversation_without_a_question_is_refused(conversation, message):
    model, tokenizer = ts.load("sample", device="cpu")
    with pytest.raises(UserError, match=message):
        ts.generate(model, tokenizer, [conversation], max_new_tokens=2)
