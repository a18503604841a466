"""`evaluate RUN DATASET` leaves out the rows that the run was trained on, or says how many they are."""

import dataclasses
import json

import pytest

from tiny_runs import tiny_config, write_dialogues
from tunesmith.commands.evaluate import evaluate
from tunesmith.commands.training import sft
from tunesmith.errors import UserError
from tunesmith.options.commands import EvaluateCommand
from tunesmith.options.training import DataOptions

ROWS = [(f"What is {i} and {i}?", f"It is {2 * i}, I think.") for i in range(40)]
SHORT = {"train__steps": 1, "data__max_rows": None, "data__block_size": 64, "eval__iters": 1, "eval__every": 1}


@pytest.fixture(scope="module")
def own(tiny_directory, tmp_path_factory):
    """A run that was trained on 40 rows of one file, less the 4 that it held out."""
    directory = tmp_path_factory.mktemp("own")
    write_dialogues(directory / "rows.jsonl", ROWS)
    config = tiny_config(
        tiny_directory, directory / "run", data__name=str(directory / "rows.jsonl"), data__holdout=0.1, **SHORT
    )
    return sft(config), directory


def measured(model, dataset, capsys, **options):
    found = evaluate(str(model), str(dataset), EvaluateCommand(device="cpu", **options))
    return found["rows"], capsys.readouterr().out


def test_of_its_own_file_the_held_out_rows_are_measured(own, capsys):
    run, directory = own
    rows, told = measured(run.path, directory / "rows.jsonl", capsys)
    assert rows == 4
    assert "was trained on 36 of the 40 rows" in told
    assert "they are left out (--trained keep includes them)" in told


def test_a_file_that_overlaps_loses_what_it_shares_whatever_its_form(own, capsys):
    run, directory = own
    rows = [{"prompt": q.upper(), "completion": a} for q, a in ROWS] + [{"prompt": "Who?", "completion": "Me."}] * 3
    file = directory / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured(run.path, file, capsys)[0] == 4 + 3
    rows, told = measured(run.path, file, capsys, trained="keep")
    assert rows == 43
    assert "was trained on 36 of the 43 rows" in told
    assert "they are included (--trained leave_out leaves them out)" in told


def test_the_training_rows_are_measured_where_they_are_asked_for(own, capsys):
    run, directory = own
    rows, told = measured(run.path, directory / "rows.jsonl", capsys, split="train")
    assert rows == 40
    assert "was trained on 36" in told


def test_where_nothing_is_left_the_way_out_is_said(own):
    run, directory = own
    file = directory / "seen.jsonl"
    held = run.config["data"]
    from tunesmith.data.datasets import holdout_rows

    train, _ = holdout_rows(40, held["holdout"], held["seed"])
    write_dialogues(file, [ROWS[i] for i in train[:5]])
    with pytest.raises(UserError, match=r"was trained on 5 of the 5 rows .* none is left to measure.*--trained keep"):
        evaluate(str(run.path), str(file), EvaluateCommand(device="cpu"))


def test_a_run_that_starts_from_a_run_was_trained_on_its_rows_too(own, tmp_path, capsys):
    run, directory = own
    later = tmp_path / "later.jsonl"
    write_dialogues(later, [(f"Where is {i}?", f"After {i - 1}, before {i + 1}.") for i in range(20)])
    second = sft(tiny_config(run.path, tmp_path / "second", data__name=str(later), data__holdout=0.1, **SHORT))
    rows, told = measured(second.path, directory / "rows.jsonl", capsys)
    assert rows == 4
    assert "was trained on 36 of the 40 rows" in told
    assert measured(second.path, later, capsys)[0] == 2


def test_other_models_and_other_rows_are_measured_whole(own, tiny_directory, capsys):
    run, directory = own
    rows, told = measured(tiny_directory, directory / "rows.jsonl", capsys)
    assert (rows, "trained on" in told) == (40, False)
    found = evaluate(str(run.path), "sample", EvaluateCommand(device="cpu", data=DataOptions(max_rows=5)))
    assert found["rows"] == 5
    assert "trained on" not in capsys.readouterr().out


def test_lost_training_data_and_changed_ones_are_said(own, tiny_directory, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    write_dialogues(file, ROWS)
    run = sft(tiny_config(tiny_directory, tmp_path / "run", data__name=str(file), **SHORT))
    write_dialogues(file, ROWS[:30])
    assert (
        "the training data of"
        in measured(run.path, "sample", capsys, data=dataclasses.replace(DataOptions(), max_rows=5))[1]
    )
    file.unlink()
    rows, told = measured(run.path, "sample", capsys, data=DataOptions(max_rows=5))
    assert rows == 5
    assert "on: its data cannot be read" in told
