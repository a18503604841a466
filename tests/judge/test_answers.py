"""Records of answers: what is measured on them without a judge, their file, and how two sets are compared."""

import json
from dataclasses import replace

import pytest

from tunesmith.data.hh_template import HH
from tunesmith.errors import UserError
from tunesmith.files.answers import ScoredAnswer, read_answers, rewards, write_answers
from tunesmith.judge.measures import (
    best_rewards,
    compare_rewards,
    distinct,
    like_length,
    measures,
    repetition,
    reward_summary,
)


def answer(prompt="p", text="a b", reward=None, group="", tokens=3, reason="stop"):
    return ScoredAnswer(prompt, group, text, reason, tokens, reward)


def test_distinct_counts_different_sequences_over_all_texts():
    """a b a b / a b: 6 words, 2 different; 4 pairs of words (ab ba ab ab), 2 different."""
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct([""], 1) == 0


def test_repetition_is_the_share_of_four_word_sequences_seen_before():
    """a b c d a b c d: abcd bcda cdab dabc abcd, the last seen before."""
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("I see. I see. I see. I see. I see.") > 0.5
    assert repetition("all of these words are different from each other") == 0
    assert repetition("short") == 0


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Human: what?", True), ("Sure.\nassistant: hi", True), ("ok\n\n  User : x", True), ("System: be good", True),
        ("A human: what a thing", False), ("The human is here", False), ("Ask your assistant.", False), ("Humans: many", False),
    ],
)  # fmt: skip
def test_role_markers_at_the_beginning_of_a_line_are_leaks(text, leaks):
    assert HH.leaks(text) is leaks


def test_measures_of_a_set():
    found = measures(
        [answer(text="a b", tokens=3), replace(answer(text="Human: a", tokens=9, reason="length"), leaks=True)]
    )
    assert found == {
        "length": 6, "distinct_1": 4 / 5, "distinct_2": 1, "repetition": 0, "role_leaks": 0.5, "self_stopped": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no answers"):
        measures([])


def test_the_file_brings_back_what_went_in(tmp_path):
    answers = [answer(text='é\u2028 "x"\n', reward=0.25, group="g"), answer()]
    write_answers(tmp_path / "answers" / "step-00000001.jsonl", answers)
    assert read_answers(tmp_path / "answers" / "step-00000001.jsonl") == answers


def test_answers_of_earlier_versions_leak_as_in_the_hh_form(tmp_path):
    answers = [
        replace(answer(text=text), leaks=leaks) for text, leaks in (("Sure.\nHuman: hi", True), ("Sure.", False))
    ]
    write_answers(tmp_path / "a.jsonl", answers)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "old.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "leaks"}) + "\n" for row in rows)
    )
    assert read_answers(tmp_path / "old.jsonl") == answers


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    write_answers(file, [answer()])
    file.write_text(file.read_text() + '{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a valid answer"):
        read_answers(file)


def test_rewards_are_means_over_the_answers_to_a_prompt():
    answers = [answer(p, reward=r) for p, r in (("x", 1.0), ("x", 3.0), ("y", 5.0), ("y", 5.0))]
    assert rewards(answers) == {"x": 2, "y": 5}
    assert best_rewards(answers) == [3, 5]
    with pytest.raises(ValueError, match="not every answer"):
        rewards([*answers, answer()])


def test_a_prompt_counts_once_however_often_it_stands_there():
    """Five prompts ten times over had an interval a third as wide; answers to one prompt are no independent examples."""
    five = [answer(str(i), reward=r, tokens=i) for i, r in enumerate([-3.0, 1.0, 0.5, -0.5, 2.0])]
    other = [answer(str(i), reward=r, tokens=9) for i, r in enumerate([1.0, 1.0, 0.0, -0.25, 2.5])]
    assert reward_summary(five * 10) == reward_summary(five)
    assert compare_rewards(five * 10, other * 10) == compare_rewards(five, other)
    spread = [replace(a, reward=a.reward + d) for a in five for d in (-0.5, 0.5)]  # two samples a prompt
    assert reward_summary(spread) == reward_summary(five)


def test_the_summary_counts_prompts_and_groups():
    answers = [answer(prompt=str(i), reward=float(i), group="ab"[i % 2]) for i in range(10)]
    found = reward_summary(answers)
    assert (found["mean"], found["n"]) == (4.5, 10)
    assert found["low"] < 4.5 < found["high"]
    assert {g: (v["mean"], v["n"]) for g, v in found["groups"].items()} == {"a": (4, 5), "b": (5, 5)}
    assert reward_summary([answer(reward=1.0)])["low"] is None


def test_a_comparison_and_its_mirror():
    a = [answer(str(i), reward=r, tokens=t) for i, (r, t) in enumerate([(1.0, 10), (2.0, 10), (0.0, 50), (4.0, 10)])]
    b = [answer(str(i), reward=r, tokens=t) for i, (r, t) in enumerate([(0.0, 9), (2.0, 10), (3.0, 10), (1.0, 99)])]
    there, back = compare_rewards(a, b), compare_rewards(b, a)
    assert there.difference.mean == 0.25
    assert (there.wins.wins, there.wins.ties, there.wins.losses) == (2, 1, 1)
    assert (there.matched.wins, there.matched.ties, there.matched.losses) == (1, 1, 0)
    assert back.wins == there.wins.mirrored
    assert back.difference.mean == -there.difference.mean
    assert back.rate.low == pytest.approx(1 - there.rate.high)
    assert there.as_dict()["matched_length"]["win_rate"]["n"] == 2


def test_identical_answers_win_half():
    a = [answer(str(i), reward=float(i)) for i in range(8)]
    found = compare_rewards(a, a)
    assert found.rate.mean == 0.5
    assert 0.5 in found.rate
    assert (found.difference.low, found.difference.high) == (0, 0)


def test_only_answers_to_the_same_prompts_are_compared():
    with pytest.raises(ValueError, match="different prompts"):
        compare_rewards([answer("x", reward=1.0)], [answer("y", reward=1.0)])


def test_like_length_is_within_a_fifth():
    assert like_length(80, 100)
    assert not like_length(79, 100)
    assert like_length(0, 0)
