"""What a run is made from, compared by content when it goes on: rows, base, reference, tokenizer; and what is kept of changes."""

import json
import shutil

import pytest
import torch
import yaml

import tunesmith as ts
from tiny_runs import last_digest, tiny_config, train_losses, write_dialogues
from tunesmith.__main__ import main
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.weights import load_model, save_model
from tunesmith.options.pretraining import PretrainConfig
from tunesmith.options.training import DPOConfig, RewardConfig, SFTConfig
from tunesmith.train.resuming import history

SHORT = {"train__steps": 2, "checkpoint__every": 1, "eval__every": 2, "eval__iters": 1, "train__batch_size": 1}
LONGER = {**SHORT, "train__steps": 4}
TRAININGS = {SFTConfig: ts.sft, DPOConfig: ts.dpo, RewardConfig: ts.train_reward_model, PretrainConfig: ts.pretrain}
NEW = {
    "model__name": "gpt2", "model__n_layer": 1, "model__n_head": 2, "model__n_embd": 16, "model__block_size": 64,
    "tokenizer__vocab_size": 265, "data__block_size": 64, "optimizer__schedule": "constant",
}  # fmt: skip


def write_rows(path, kind, count):
    """Rows that a kind of training can use, in a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in (SFTConfig, PretrainConfig):
        write_dialogues(path, [(f"What is {n} and {n}?", f"That is {2 * n}, I believe.") for n in range(count)])
        return
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea at all."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_of(run):
    return {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def one_row_more(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))


def one_byte(path):
    path.write_bytes(path.read_bytes().replace(b"What is 3", b"What is 4", 1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cut, r"the training rows have changed \(24 before, 22 now; changed: train\.jsonl\)"),
        (one_row_more, r"the training rows have changed \(24 before, 25 now; changed: train\.jsonl\)"),
        (one_byte, r"the training rows have changed \(24 before, 24 now; changed: train\.jsonl\)"),
    ],
)
@pytest.mark.parametrize("kind", TRAININGS)
def test_changed_training_rows_are_refused(tiny_directory, tmp_path, kind, change, told):
    write_rows(tmp_path / "data/train.jsonl", kind, 24)
    write_rows(tmp_path / "data/test.jsonl", kind, 6)
    options = {**SHORT, "data__name": str(tmp_path / "data"), **(NEW if kind is PretrainConfig else {})}
    model = options.pop("model__name", tiny_directory)
    run = TRAININGS[kind](tiny_config(model, tmp_path / "r", kind, **options))
    change(tmp_path / "data/train.jsonl")
    before = files_of(run)
    with pytest.raises(UserError, match=rf"--resume: {told}\. .*--resume_changes accept"):
        TRAININGS[kind](tiny_config(model, run.path, kind, **{**options, "train__steps": 4}, resume=True))
    assert files_of(run) == before


@pytest.fixture
def rows(tmp_path):
    """A directory with train.jsonl and test.jsonl of dialogues."""
    for name, count in (("train", 24), ("test", 6)):
        write_rows(tmp_path / f"data/{name}.jsonl", SFTConfig, count)
    return tmp_path / "data"


def test_changed_validation_rows_are_refused_and_a_split_that_comes_or_goes(tiny_directory, tmp_path, rows):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__name=str(rows)))
    again = tiny_config(tiny_directory, run.path, **LONGER, data__name=str(rows), resume=True)
    cut(rows / "test.jsonl")
    with pytest.raises(UserError, match=r"the validation rows have changed \(6 before, 4 now; changed: test\.jsonl\)"):
        ts.sft(again)
    (rows / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"the validation rows have changed \(none now\)"):
        ts.sft(again)
    write_rows(rows / "test.jsonl", SFTConfig, 6)
    write_rows(rows / "train-2.jsonl", SFTConfig, 3)
    (rows / "train.jsonl").rename(rows / "train-1.jsonl")
    with pytest.raises(UserError, match=r"training rows have changed \(24 before, 27 now; new: train-2\.jsonl\)\."):
        ts.sft(again)


def test_data_that_have_moved_are_no_change(tiny_directory, tmp_path, rows):
    options = {"data__name": str(rows)}
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **LONGER, **options))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, **options))
    rows.rename(tmp_path / "elsewhere")
    again = ["sft", "--resume", "--out", str(run.path), "--train.steps", "4"]
    assert main([*again, "--data.name", str(tmp_path / "elsewhere")]) == 0
    assert train_losses(run) == train_losses(whole)
    assert last_digest(run) == last_digest(whole)
    assert run.config["data"]["name"] == str(tmp_path / "elsewhere")
    assert "history" not in run.config


def test_the_shared_case(tiny_directory, tmp_path, shared_data):
    """Two steps on six rows, the file cut to four, --resume."""
    data = tmp_path / "chg.jsonl"
    case = (shared_data.parent / "cases/resume_changed_data/chg.jsonl").read_text(encoding="utf-8-sig")
    data.write_text(case + "".join(case.splitlines(keepends=True)[:2]))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__name=str(data)))
    data.write_text(case)
    again = tiny_config(tiny_directory, run.path, **SHORT, data__name=str(data), resume=True)
    with pytest.raises(UserError, match=r"6 before, 4 now; changed: chg\.jsonl"):
        ts.sft(again)


def test_rows_of_other_files_are_compared_too(tiny_directory, tmp_path):
    extra = tmp_path / "sft.jsonl"
    write_rows(extra, SFTConfig, 12)
    options = {**SHORT, "dpo__sft_data": str(extra)}
    run = ts.dpo(tiny_config(tiny_directory, tmp_path / "r", DPOConfig, **options))
    cut(extra)
    with pytest.raises(UserError, match=r"the rows of dpo\.sft_data have changed \(12 before, 10 now"):
        ts.dpo(tiny_config(tiny_directory, run.path, DPOConfig, **options, resume=True))


def test_a_run_of_an_earlier_version_goes_on_and_says_what_it_cannot_know(tiny_directory, tmp_path, rows, capfd):
    whole = ts.sft(tiny_config(tiny_directory, tmp_path / "whole", **LONGER, data__name=str(rows)))
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__name=str(rows)))
    (run.path / "inputs.json").unlink()
    capfd.readouterr()
    again = tiny_config(tiny_directory, run.path, **LONGER, data__name=str(rows), resume=True)
    ts.sft(again)
    assert "has no inputs.json" in capfd.readouterr().out
    assert train_losses(run) == train_losses(whole)
    assert run.inputs == whole.inputs | {"draws": 1}  # as the rows of its first half were drawn
    (run.path / "inputs.json").write_text("[]")
    with pytest.raises(UserError, match=r"inputs\.json is damaged"):
        ts.sft(again)


def test_a_version_that_skips_other_rows_of_the_same_files_says_so(tiny_directory, tmp_path, rows):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__name=str(rows)))
    stored = json.loads((run.path / "inputs.json").read_text())
    used = stored["train"]["rows"]
    stored["train"]["rows"] += 3
    (run.path / "inputs.json").write_text(json.dumps(stored))
    told = rf"the training rows are chosen otherwise by this version \({used + 3} before, {used} now\).*--resume_changes accept"
    with pytest.raises(UserError, match=told):
        ts.sft(tiny_config(tiny_directory, run.path, **LONGER, data__name=str(rows), resume=True))


def test_another_command_cannot_go_on_with_a_run(tiny_directory, tmp_path, capsys):
    """That is said before anything about options of the one that the other lacks, or would set otherwise."""
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__batching="windows"))
    with pytest.raises(UserError, match="was made by tunesmith sft, and tunesmith dpo cannot continue it"):
        ts.dpo(tiny_config(tiny_directory, run.path, DPOConfig, **SHORT, resume=True))
    for command in ("dpo", "reward", "pretrain"):
        capsys.readouterr()
        assert main([command, "--resume", "--out", str(run.path)]) == 1
        told = (
            f"tunesmith: --resume: {run.path} was made by tunesmith sft, and tunesmith {command} cannot continue it\n"
        )
        assert capsys.readouterr().err == told


# Bases and references


@pytest.fixture
def base(tiny_directory, tmp_path):
    return shutil.copytree(tiny_directory, tmp_path / "base")


def shift_weights(directory):
    model = load_model(directory)
    with torch.no_grad():
        model.wte.weight[5, 5] += 1e-3
    save_model(model, Tokenizer.load(directory), directory)


@pytest.mark.parametrize("reference", ["cached", "model", "adapter"])
def test_the_reference_of_a_dpo_run_is_the_model_that_it_began_with(base, tmp_path, reference):
    options = {**SHORT, "dpo__reference": reference, **({"lora__rank": 2} if reference == "adapter" else {})}
    run = ts.dpo(tiny_config(base, tmp_path / "r", DPOConfig, **options))
    before = files_of(run)
    options["train__steps"] = 4
    for accept in ([], ["--resume_changes", "accept"]):
        again = ["dpo", "--resume", "--out", str(run.path), "--train.steps", "4", *accept]
        assert main([*again, "--model.init", "random"]) == 1
        assert main([*again, "--model.name", "sample"]) == 1
    with pytest.raises(
        UserError, match=r"model\.init was 'pretrained', now 'random'.*The reference of a DPO run must stay"
    ):
        ts.dpo(tiny_config(base, run.path, DPOConfig, **options, model__init="random", resume=True))
    shift_weights(base)
    for accept in ("refuse", "accept"):
        config = tiny_config(base, run.path, DPOConfig, **options, resume=True)
        with pytest.raises(UserError, match=r"model\.name holds different weights.*--model\.name, or start a new run"):
            ts.dpo(type(config)(**{**vars(config), "resume_changes": accept}))
    assert files_of(run) == before


def test_the_base_of_adapters_is_the_one_that_they_began_with(base, tmp_path):
    run = ts.sft(tiny_config(base, tmp_path / "r", **SHORT, lora__rank=2))
    shift_weights(base)
    with pytest.raises(UserError, match=r"model\.name holds different weights.*base of the adapters"):
        ts.sft(tiny_config(base, run.path, **LONGER, lora__rank=2, resume=True))


def test_a_base_that_has_moved_is_no_change(base, tmp_path):
    whole = ts.dpo(tiny_config(base, tmp_path / "whole", DPOConfig, **LONGER))
    run = ts.dpo(tiny_config(base, tmp_path / "r", DPOConfig, **SHORT))
    base.rename(tmp_path / "moved")
    ts.dpo(tiny_config(tmp_path / "moved", run.path, DPOConfig, **LONGER, resume=True))
    assert last_digest(run) == last_digest(whole)


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RewardConfig])
def test_new_adapters_on_an_adapter_that_is_gone_go_on_from_the_base_that_the_run_keeps(base, tmp_path, kind):
    train = {SFTConfig: ts.sft, DPOConfig: ts.dpo, RewardConfig: ts.train_reward_model}[kind]
    first = ts.sft(tiny_config(base, tmp_path / "first", **SHORT, lora__rank=2))
    whole = train(tiny_config(first.path, tmp_path / "whole", kind, **LONGER, lora__rank=2))
    run = train(tiny_config(first.path, tmp_path / "r", kind, **SHORT, lora__rank=2))
    first.path.rename(tmp_path / "moved")
    command = run.inputs["command"]
    assert main([command, "--resume", "--out", str(run.path), "--train.steps", str(LONGER["train__steps"])]) == 0
    assert last_digest(run) == last_digest(whole)
    assert run.config["model"]["name"] == str(first.path), "as it was given"
    assert "history" not in run.config
    (run.path / "base").rename(tmp_path / "base of the run")
    assert main([command, "--resume", "--out", str(run.path), "--train.steps", "6"]) == 1


def test_another_tokenizer_is_refused(base, tmp_path):
    run = ts.sft(tiny_config(base, tmp_path / "r", **SHORT))
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer is not the one that this run began with"):
        ts.sft(tiny_config(base, run.path, **LONGER, resume=True))


def test_a_resumed_run_computes_no_reference_again(base, tmp_path, monkeypatch):
    options = {"data__max_rows": 30, "eval__iters": 1}  # no more pairs for four steps than for two and the estimates
    run = ts.dpo(tiny_config(base, tmp_path / "r", DPOConfig, **{**SHORT, "train__steps": 20, **options}))
    (first,) = run.metrics("reference")
    assert first["computed"] > 0
    for _, path in run.checkpoints()[-2:]:
        shutil.rmtree(path)
    monkeypatch.setattr("tunesmith.train.reference.answer_logps", lambda *_: pytest.fail("computed again"))
    ts.dpo(tiny_config(base, run.path, DPOConfig, **{**SHORT, "train__steps": 20, **options}, resume=True))
    assert run.status["step"] == 20


# Accepted changes


def test_an_accepted_change_is_logged_and_config_yaml_keeps_from_when_it_holds(tiny_directory, tmp_path, rows, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT, data__name=str(rows)))
    cut(rows / "train.jsonl")
    again = ["sft", "--resume", "--out", str(run.path), "--train.steps", "4", "--optimizer.lr", "0.002"]
    assert main(again) == 1
    told = capfd.readouterr().err
    assert "optimizer.lr was 0.001, now 0.002" in told
    assert "24 before, 22 now" in told
    assert main([*again, "--resume_changes", "accept"]) == 0
    assert "note: changed from step 3 on: optimizer.lr was 0.001, now 0.002" in capfd.readouterr().out
    kept = [{k: e[k] for k in ("step", "option", "from", "to")} for e in run.metrics("changed")]
    assert run.config["history"] == kept
    rate, data = kept
    assert rate == {"step": 2, "option": "optimizer.lr", "from": 0.001, "to": 0.002}
    assert (data["step"], data["option"]) == (2, "train rows")
    assert (data["from"].split(",")[0], data["to"].split(",")[0]) == ("24 rows", "22 rows")
    assert [(e["step"], e["lr"]) for e in run.metrics("train")] == [(1, 0.001), (2, 0.001), (3, 0.002), (4, 0.002)]
    assert run.config["optimizer"]["lr"] == 0.002
    assert run.inputs["train"]["rows"] == 22
    # what was accepted is what the run is now
    assert main(["sft", "--resume", "--out", str(run.path), "--train.steps", "5"]) == 0
    assert run.config["history"] == kept
    assert len(run.metrics("changed")) == 2
    assert run.metrics("train")[-1]["lr"] == 0.002


def test_config_yaml_with_a_history_still_makes_a_run(tiny_directory, tmp_path, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT))
    stored = run.path / "config.yaml"
    again = ["sft", "--config", str(stored), "--out", str(run.path), "--resume"]
    assert main([*again, "--train.steps", "3", "--data.seed", "7", "--resume_changes", "accept"]) == 0
    assert "step: 2" in stored.read_text()
    capfd.readouterr()
    assert main([*again, "--train.steps", "4"]) == 0
    assert "does not repeat" not in capfd.readouterr().out
    assert main(["sft", "--config", str(stored), "--out", str(tmp_path / "new")]) == 0
    assert (
        "data.seed was 1234 up to step 2 and 7 after it; a run from this file uses the last value"
        in capfd.readouterr().out
    )
    assert ts.Run(tmp_path / "new").config == {k: v for k, v in run.config.items() if k != "history"}
    stored.write_text(stored.read_text().replace("  option: data.seed", "  what: data.seed"))
    assert main(["sft", "--config", str(stored), "--out", str(tmp_path / "other")]) == 2
    assert "history is a list of {step, option, from, to}" in capfd.readouterr().err
    assert main(["sft", "--history", "x"]) == 2


def test_a_change_is_logged_again_when_its_run_falls_back_to_the_same_checkpoint(tiny_directory, tmp_path):
    """Killed after an accepted change and before the next checkpoint: the log is cut back to the checkpoint."""
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT))
    options = {**LONGER, "optimizer__lr": 2e-3, "checkpoint__every": 9, "eval__every": 2}
    config = tiny_config(tiny_directory, run.path, **options, resume=True)
    ts.sft(type(config)(**{**vars(config), "resume_changes": "accept"}))
    changed = [(e["step"], e["option"]) for e in run.metrics("changed")]
    for step, path in run.checkpoints():
        if step > 2:
            shutil.rmtree(path)
    ts.sft(config)
    assert [(e["step"], e["option"]) for e in run.metrics("changed")] == changed == [(2, "optimizer.lr")]
    shutil.rmtree(run.checkpoint(2))  # from before the change: it now holds from there
    for step, path in run.checkpoints():
        if step > 1:
            shutil.rmtree(path)
    ts.sft(config)
    assert run.config["history"] == [{"step": 1, "option": "optimizer.lr", "from": 1e-3, "to": 2e-3}]
    assert [(e["step"], e["lr"]) for e in run.metrics("train")] == [(1, 1e-3), (2, 2e-3), (3, 2e-3), (4, 2e-3)]


def test_several_changes_at_one_step_are_one():
    a = {"step": 4, "option": "optimizer.lr", "from": 1, "to": 2}
    b = {"step": 9, "option": "optimizer.lr", "from": 2, "to": 3}
    c = {"step": 9, "option": "data.seed", "from": 5, "to": 6}
    assert history([a, b, c], 9) == (a, b, c)
    assert history([a, b, c], 4) == ({**a, "to": 3}, {**c, "step": 4})
    assert history([a, {**b, "to": 1}], 3) == ()
    assert history([], 3) == ()


def test_accepting_changes_needs_a_run_that_goes_on(tiny_directory, tmp_path, capfd):
    assert main(["sft", "--model.name", str(tiny_directory), "--resume_changes", "accept"]) == 2
    assert "--resume_changes accept is for a resumed run" in capfd.readouterr().err


# What --resume needs


def test_resume_alone_takes_the_runs_own_options_wherever_the_run_lies(tiny_directory, tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    given = ["--model.name", str(tiny_directory), "--data.name", str(rows)]
    argv = ["--data.block_size", "128", "--train.steps", "2", "--eval.iters", "1", "--train.device", "cpu"]
    assert main(["sft", *given, *argv]) == 0
    (run,) = [ts.Run(path) for path in (tmp_path / "runs").iterdir()]
    out = run.path.relative_to(tmp_path)
    by_name = [
        ["--out", str(out), "--resume"],
        [f"--out={out}", "--resume=true"],
        ["--resume", "true", "--out", str(out)],
    ]
    for number, words in enumerate([*by_name, [*given, "--resume"]], 3):
        assert main(["sft", *words, "--train.steps", str(number)]) == 0
        assert run.status["step"] == number


def test_a_run_without_its_options_or_checkpoints_is_one_clear_line(tiny_directory, tmp_path, capfd):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT))
    argv = ["sft", "--resume", "--out", str(run.path)]
    for path in ("config.yaml", "checkpoints"):
        (run.path / path).rename(tmp_path / path)
        lines = run.metrics()
        assert main(argv) == 1
        told = capfd.readouterr().err
        assert len(told.splitlines()) == 1
        assert {
            "config.yaml": "has lost its config.yaml",
            "checkpoints": "was at step 2 (finished) but holds no checkpoint",
        }[path] in told
        assert run.metrics() == lines
        (tmp_path / path).rename(run.path / path)
    assert main(argv) == 0


@pytest.mark.parametrize("keep", [0, 1])
def test_the_newest_checkpoint_always_stays(tiny_directory, tmp_path, keep):
    """Where it is not the best, and nobody asked to keep any."""
    options = {**SHORT, "train__steps": 5, "optimizer__lr": 0.5, "train__diverge_after": 0, "eval__every": 5}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, checkpoint__keep=keep))
    assert run.status["best_step"] == 0
    assert [step for step, _ in run.checkpoints()] == [0, 5]


def test_one_fingerprint_of_content(tmp_path):
    (tmp_path / "a").write_bytes(b"b" * (1 << 21))
    whole = "a" + "b" * (1 << 21) + "c"
    assert content_hash(["a", tmp_path / "a", memoryview(b"c")]) == content_hash([whole])
    assert content_hash([b"abc"]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_config_and_history_are_plain_yaml(tiny_directory, tmp_path):
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **SHORT))
    assert set(yaml.safe_load((run.path / "config.yaml").read_text())) == {
        "model", "data", "chat", "train", "optimizer", "lora", "eval", "checkpoint",
    }  # fmt: skip
