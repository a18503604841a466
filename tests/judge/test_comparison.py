"""What a comparison comes to, from records written by hand, and the page that shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from hanging import HANGS
from tunesmith.files.answers import ANSWER_END, ScoredAnswer
from tunesmith.judge.language_model import Judgement
from tunesmith.judge.two_models import (
    Comparison,
    PromptResult,
    interval_text,
    judge_text,
    level,
    model_rows,
    notes,
    result_line,
    versus_rows,
)
from tunesmith.judge.two_models_page import render_comparison


def row(n, a, b, *, group="g", tokens=(10, 10), orders=None, logps=None):
    of_a, of_b = (
        ScoredAnswer(f"Question {n}?", group, f"answer {side}{n}", "stop", length, reward)
        for side, reward, length in zip("ab", (a, b), tokens, strict=True)
    )
    return PromptResult(
        of_a, of_b, None if orders is None else Judgement(orders, ("first words", "second words")), logps
    )


REWARDS = [(0.0, 1.0), (0.5, 0.0), (1.0, 1.0), (0.25, 2.0), (-1.0, -0.5), (3.0, 3.5)]


@pytest.fixture
def rewarded():
    lengths = [(10, 10), (10, 8), (10, 7), (10, 13), (1, 1), (30, 25)]
    rows = [
        row(i, a, b, group="xy"[i % 2], tokens=n) for i, ((a, b), n) in enumerate(zip(REWARDS, lengths, strict=True))
    ]
    return Comparison(("first", "second"), rows, "a scorer", settings="greedy")


def mirrored(comparison):
    swap = {"a": "b", "b": "a", "tie": "tie", None: None}
    rows = []
    for r in comparison.rows:
        j = r.judgement
        judgement = j and Judgement((swap[j.orders[1]], swap[j.orders[0]]), j.replies[::-1], j.asked)
        rows.append(PromptResult(r.b, r.a, judgement))
    return Comparison(comparison.names[::-1], rows, comparison.scorer, comparison.judge, comparison.settings)


# ---- rewards -------------------------------------------------------------------------------------------------------


def test_rewards_are_compared_pair_by_pair(rewarded):
    found = rewarded.summary()["reward"]
    assert found["wins"] == {"wins": 4, "ties": 1, "losses": 1}
    assert found["win_rate"]["mean"] == pytest.approx(4.5 / 6)
    assert found["difference"]["mean"] == pytest.approx(sum(b - a for a, b in REWARDS) / 6)
    assert found["difference"]["low"] < found["difference"]["mean"] < found["difference"]["high"]
    assert found["scorer"] == "a scorer"


def test_like_length_leaves_the_others_out(rewarded):
    """Of 10:10, 10:8, 10:7, 10:13, 1:1, 30:25 the third and the fourth differ by more than a fifth of the longer."""
    found = rewarded.summary()["reward"]["matched_length"]
    assert found["wins"] == {"wins": 3, "ties": 0, "losses": 1}
    assert found["difference"]["mean"] == pytest.approx((1 - 0.5 + 0.5 + 0.5) / 4)


def test_no_pair_of_like_length_is_no_error():
    alone = Comparison(("a", "b"), [row(0, 0.0, 1.0, tokens=(1, 9)), row(1, 0.0, 1.0, tokens=(1, 9))], "s")
    assert alone.summary()["reward"]["matched_length"] is None
    assert [r.label for r in versus_rows(alone.summary())] == ["reward: all prompts"]
    assert "Similar length" in " ".join(notes(alone.summary()))


def test_groups_are_compared_by_themselves(rewarded):
    found = rewarded.summary()["reward"]["groups"]
    assert {name: g["wins"] for name, g in found.items()} == {
        "x": {"wins": 2, "ties": 1, "losses": 0},
        "y": {"wins": 2, "ties": 0, "losses": 1},
    }


def test_swapped_order_gives_the_mirrored_summary(rewarded):
    judged = [("a", "a"), ("b", "b"), ("a", "b"), ("tie", "tie"), (None, "b"), ("b", "b")]
    rows = [PromptResult(r.a, r.b, Judgement(o)) for r, o in zip(rewarded.rows, judged, strict=True)]
    there = Comparison(rewarded.names, rows, "s", "j").summary()
    back = mirrored(Comparison(rewarded.names, rows, "s", "j")).summary()
    assert (there["a"], there["b"]) == (back["b"], back["a"])
    for measure in ("reward", "judge"):
        for part in (lambda s: s, lambda s: s["matched_length"]):
            one, other = part(there[measure]), part(back[measure])
            assert (one["wins"]["wins"], one["wins"]["losses"]) == (other["wins"]["losses"], other["wins"]["wins"])
            assert one["win_rate"]["mean"] == pytest.approx(1 - other["win_rate"]["mean"])
            assert one["win_rate"]["low"] == pytest.approx(1 - other["win_rate"]["high"])
            if measure == "reward":
                assert one["difference"]["mean"] == pytest.approx(-other["difference"]["mean"])
                assert one["difference"]["low"] == pytest.approx(-other["difference"]["high"], rel=0.1)
    for figure in ("agreement", "first_position", "no_verdict"):
        assert there["judge"][figure] == back["judge"][figure]


# ---- the judge -----------------------------------------------------------------------------------------------------


def test_the_judge_is_counted_with_its_agreement_and_its_taste_for_a_position():
    orders = [("b", "b"), ("b", "b"), ("a", "a"), ("a", "b"), ("tie", "tie"), (None, "a")]
    rows = [row(i, None, None, orders=o) for i, o in enumerate(orders)]
    same = Judgement(("tie", "tie"), asked=False)
    alone = replace(rows[0].a, prompt="Another question?")
    found = Comparison(("a", "b"), [*rows, PromptResult(alone, alone, same)], judge="j").summary()["judge"]
    assert found["wins"] == {"wins": 2, "ties": 3, "losses": 1}
    assert found["win_rate"]["mean"] == pytest.approx(3.5 / 6)
    assert (found["agreement"]["mean"], found["agreement"]["n"]) == (pytest.approx(4 / 5), 5)
    # single verdicts b b b b a a a b and the a of the last: first stood b(2nd) b(2nd) a(1st) a(1st) b(2nd)
    assert (found["first_position"]["mean"], found["first_position"]["n"]) == (pytest.approx(5 / 9), 9)
    assert (found["no_verdict"], found["same_answers"]) == (1, 1)
    told = " ".join(notes(Comparison(("a", "b"), [*rows, PromptResult(alone, alone, same)], judge="j").summary()))
    assert "80.0 % (" in told
    assert "without a verdict, left out of the judge's win rate: 1." in told
    assert "the same answer from both, ties without asking the judge: 1." in told


@pytest.mark.parametrize(
    ("orders", "told"),
    [
        (("b", "b"), "judge: B"), (("tie", "tie"), "judge: tie"), ((None, "a"), "judge: no verdict"),
        (("a", "b"), "judge: tie (with A first A, with B first B)"),
    ],
)  # fmt: skip
def test_a_judgement_in_words(orders, told):
    assert judge_text(Judgement(orders)) == told


# ---- the result in a line -------------------------------------------------------------------------------------------


def told_of(pairs):
    return result_line(Comparison(("m/a", "m/b"), [row(i, a, b) for i, (a, b) in enumerate(pairs)], "s").summary())


def test_the_better_model_is_named_with_its_win_rate():
    told = told_of([(0.0, 1.0)] * 20 + [(1.0, 0.5)] * 2)
    assert told.startswith("By reward, B (m/b) is better than A (m/a): B wins 90.9 % (")
    assert "of 22 prompts, ties half; mean difference B - A +0.864 (+0." in told
    assert told_of([(b, a) for a, b in [(0.0, 1.0)] * 20]).startswith(
        "By reward, A (m/a) is better than B (m/b): B wins 0.0 %"
    )


def test_a_win_rate_around_one_half_decides_nothing(rewarded):
    assert result_line(rewarded.summary()).startswith("By reward, A and B cannot be told apart: B wins 75.0 % (")
    assert told_of([(0.0, 1.0)]).startswith("By reward, A and B cannot be told apart")  # one prompt


def test_a_higher_mean_without_clearly_more_wins_is_said_as_that():
    """Not as a tie beside an interval that leaves out 0."""
    pairs = [(0.0, 5.0)] * 22 + [(1.0, 0.5)] * 18
    for told, ahead in ((told_of(pairs), "B (m/b)"), (told_of([(b, a) for a, b in pairs]), "A (m/a)")):
        assert told.startswith(f"By reward, {ahead} has the higher mean but not clearly more wins: B wins")


def test_more_wins_with_a_lower_mean_are_not_called_better():
    told = told_of([(0.0, 0.1)] * 40 + [(50.0, 0.0)] * 12)
    assert told.startswith("By reward, B (m/b) wins more prompts but has the lower mean: B wins 76.9 %")


def test_each_measure_has_its_sentence_and_silence_is_said():
    rows = [row(i, 0.0, 1.0, orders=("a", "a")) for i in range(20)]
    told = result_line(Comparison(("x", "y"), rows, "s", "j").summary())
    assert "By reward, B (y) is better than A (x)" in told
    assert "By the judge's verdicts, A (x) is better than B (y): B wins 0.0 %" in told
    unsure = [row(i, None, None, orders=(None, "a")) for i in range(3)]
    assert "No prompt has a verdict" in result_line(Comparison(("x", "y"), unsure, judge="j").summary())
    assert "Nothing scored these answers" in result_line(Comparison(("x", "y"), [row(0, None, None)]).summary())


def test_the_page_begins_with_it(rewarded):
    page = render_comparison(rewarded)
    assert html.unescape(re.search(r'</h1>\n<p class="lead">(.*?)</p>', page)[1]) == result_line(rewarded.summary())


# ---- numbers in words ----------------------------------------------------------------------------------------------


def test_intervals_in_words():
    record = {"mean": -0.5, "low": -1.25, "high": 0.25, "n": 9}
    assert interval_text(record, signed=True) == "-0.500 (-1.250 to +0.250)"
    assert interval_text({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 9}, percent=True) == "50.0 % (25.0 to 75.0)"
    assert interval_text({"mean": 0.5, "low": None, "high": None, "n": 1}) == "0.500"
    assert interval_text(None) == "n/a"


@pytest.mark.parametrize(
    ("change", "strength"),
    [(0, 0), (0.09, 0), (-0.09, 0), (0.1, 1), (-0.1, -1), (0.5, 2), (-1.4, -2), (1.5, 3), (-99, -3)],
)
def test_levels_of_change(change, strength):
    assert level(change) == strength


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def full():
    """Everything that a page can show, with text that wants to be markup."""
    logps = (
        [(" <b>", -1.0, -3.0), ("", -1.0, -1.5), (" é", -2.0, -1.75), (ANSWER_END, -0.5, -0.45)],
        [(" B & co", -5.0, -4.7), (ANSWER_END, -1.0, -0.2)],
    )
    first = PromptResult(
        ScoredAnswer("Is <i>it</i>?", "odd & even", "<b> é", "stop", 4, 0.5),
        ScoredAnswer("Is <i>it</i>?", "odd & even", "B & co", "stop", 2, 1.75),
        Judgement(("b", "b"), ('{"verdict": "2"} <u>', '{"verdict": "1"}')),
        logps,
    )
    second = PromptResult(
        ScoredAnswer("And?", "", "cut of", "length", 2, -1.0), ScoredAnswer("And?", "", "", "stop", 1, -1.0),
        Judgement(("a", "b"), ("x", "y")), ([(" cut", -1.0, -1.0)], [(ANSWER_END, -1.0, -1.0)]), (" of", ""),
    )  # fmt: skip
    return Comparison(("runs/a", "runs/b@<3>"), [first, second], "a scorer", "gpt-judge", "greedy")


def test_same_comparison_gives_the_same_bytes(full):
    assert render_comparison(full) == render_comparison(full)


def test_page_says_what_the_records_say(full):
    page = render_comparison(full)
    text = html.unescape(re.sub(r"<[^>]+>", "", page[page.index("</head>") :]))
    for words in (
        "runs/b@<3> against runs/a", "odd & even", "Other prompts", "Is <i>it</i>?", "reward B - A +1.250", "reward 1.750",
        "judge: B", "judge: tie (with A first A, with B first B)", '{"verdict": "2"} <u>', "cut at the token limit", "cut of",
        "4 tokens", "a scorer", "gpt-judge", "50.0 % (", "change in log p -2.200",
    ):  # fmt: skip
        assert words in text, words


def test_every_token_has_its_number_and_its_colour(full):
    page = render_comparison(full)
    cells = re.findall(r'<span class="token (\w*)" title="([^"]+)">(.*?)</span>', page)
    assert cells[:3] == [
        ("d3", "-2.000 nats: log p -1.000 under A, -3.000 under B", "&lt;b&gt;"),
        ("d1", "-0.250 nats: log p -3.000 under A, -3.250 under B", " é"),  # two tokens are one character
        ("", "+0.050 nats: log p -0.500 under A, -0.450 under B", '<span class="end">[end]'),
    ]
    assert [c[0] for c in cells[3:5]] == ["u1", "u2"]
    assert '<span class="token u1">+(0.1 to 0.5)</span>' in page


def test_page_without_extras_shows_answers_only():
    silent = ScoredAnswer("Question 1?", "g", "", "stop", 1)
    plain = Comparison(("a", "b"), [row(0, None, None), PromptResult(silent, row(1, None, None).b)])
    page = render_comparison(plain)
    for absent in ("reward", "judge", "log p", 'class="bar"', 'class="facts"', 'class="legend"'):
        assert absent not in page.split("</style>")[1]
    assert "answer a0" in page
    assert '<div class="answer"><i>nothing</i></div>' in page
    assert {r[0]: r[1:] for r in model_rows(plain.summary())}["mean length, tokens"] == ("5.5", "10.0")


def test_page_asks_the_network_for_nothing(full):
    page = render_comparison(full)
    links = re.findall(r'(?:src|href|url|@import)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert [x for x in links if not x.startswith("#")] == []
    assert "<script" not in page
    assert "@media print" in page
    assert "light-dark(" in page


def test_a_line_of_the_output_can_be_read_back(full):
    record = json.loads(json.dumps(full.rows[0].record()))
    assert record["prompt"] == "Is <i>it</i>?"
    assert (record["a"]["answer"], record["b"]["reward"]) == ("<b> é", 1.75)
    assert record["reward_difference"] == 1.25
    assert record["judge"]["orders"] == ["b", "b"]
    assert record["a"]["logps"][0] == [" <b>", -1.0, -3.0]


@pytest.mark.parametrize("width", [1100, 380])
def test_browser_draws_it_without_a_request_or_a_complaint(full, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page, shot, log = tmp_path / "page.html", tmp_path / "page.png", tmp_path / "net.json"
    page.write_text(render_comparison(full), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    flags += [f"--window-size={width},900", f"--log-net-log={log}"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    assert shot.stat().st_size > 10_000
    assert ":CONSOLE(" not in done.stderr
    events = json.loads(log.read_text())["events"]
    starts = [e["params"] for e in events if "initiator" in e.get("params", {})]
    assert [p["url"] for p in starts if p["initiator"] != "not an origin"] == []  # the browser's own have no origin
