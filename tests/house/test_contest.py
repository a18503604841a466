"""What the comparisons share: tokens that really went through a model, and runs that others disturbed."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def contest():
    sys.path.insert(0, str(BENCHMARKS))
    import contest

    return contest


def test_rates_count_the_tokens_of_a_row_or_those_that_a_contestant_packed_itself(contest):
    assert contest.step_rates({"seconds": [2.0, 4.0]}) == [512.0, 256.0]
    assert contest.step_rates({"seconds": [2.0, 4.0], "tokens": [1000, 600]}) == [500.0, 150.0]


def test_a_tuned_rival_has_onednns_products_and_nobody_else(contest, capsys):
    found = []

    def run(work, steps, warmup, tuned):
        found.append(torch.get_float32_matmul_precision())
        return [1.0], [2.0], [7]

    before = torch.get_float32_matmul_precision()
    try:
        for tuned in (False, True, "lean"):
            torch.set_float32_matmul_precision("highest")
            contest.child(run, Path(), 1, 0, tuned)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["highest", "medium", "medium"]
    assert '"tokens": [7]' in capsys.readouterr().out


def test_a_disturbed_run_is_done_again_and_the_quieter_one_counts(contest, monkeypatch):
    command = [sys.executable, "-c", "import sys; print(len(sys.argv))"]
    for others in ([0.0], [90.0, 0.0], [90.0, 60.0]):
        busy = itertools.accumulate(itertools.chain.from_iterable((0.0, x) for x in others))
        monkeypatch.setattr(contest, "busy_seconds", lambda busy=busy: next(busy))
        done, share = contest.undisturbed(command, {})
        assert done.stdout == "1\n"
        assert (share < contest.QUIET) is (others[-1] == 0.0)
        assert next(busy, None) is None  # as many runs as that


def test_all_processors_seconds_grow_and_the_processor_has_a_name(contest):
    before = contest.busy_seconds()
    sum(range(10**7))
    assert contest.busy_seconds() >= before
    assert contest.processor()
