"""`tunesmith compare` as a user runs it, and its log-probabilities against a plain forward pass."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.style import Style

from judge_server import Reply, longer, serving, verdict
from reference import random_model
from tunesmith.__main__ import main
from tunesmith.commands.compare import COLOURS, coloured, with_logps
from tunesmith.data.token_bytes import ByteRuns
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.answers import ANSWER_END, ScoredAnswer
from tunesmith.files.names import SAMPLE, load
from tunesmith.files.reward_models import save_reward_model
from tunesmith.files.weights import save_model
from tunesmith.generation.logprobs import encode_answers, logps_of_both, token_texts
from tunesmith.judge.two_models import PromptResult
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.reward_head import RewardModel
from tunesmith.stats import Interval

FEW = ["--device", "cpu", "--limit", "6", "--generate.max_new_tokens", "12"]


def directory(path, seed, tokenizer=None, block_size=256, **shape):
    """A small random model on disk."""
    tokenizer = tokenizer or Tokenizer.load(SAMPLE)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, block_size=block_size, **shape)
    save_model(random_model(config, seed), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models and a reward model, all random."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.load(SAMPLE)
    a, b = directory(path / "a", 1), directory(path / "b", 2)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, block_size=256)
    scorer = RewardModel(random_model(config, 3))
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(0))
    save_reward_model(scorer, tokenizer, path / "scorer")
    return a, b, path / "scorer"


@pytest.fixture
def compare(tmp_path, capfd):
    """Run the command; returns its summary, records, page and what it printed."""

    def run(a, b, *options, code=0):
        out = tmp_path / "out.jsonl"
        argv = ["compare", a, b, *FEW, "--out", out, "--html", tmp_path / "page.html", *options]
        found = main([str(word) for word in argv])
        printed = capfd.readouterr()
        assert found == code, printed.err
        if code:
            assert len(printed.err.splitlines()) == 1
        records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text()) if out.exists() else {}
        page = (tmp_path / "page.html").read_text() if out.exists() else ""
        return summary, records, page, printed

    return run


def holds(record, value):
    return value in Interval(**record)


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def plain_logps(model, tokenizer, prompt, answer, stopped):
    """One sequence, one forward pass, full logits: log p of every token of the answer, and of its end."""
    before = tokenizer.encode(f"\n\nHuman: {prompt}\n\nAssistant:")
    ids = tokenizer.encode(f" {answer}") if answer else []
    targets = ids + ([tokenizer.end_of_text] if stopped else [])
    with torch.no_grad():
        logps = model.lm_head(model(torch.tensor([before + ids])))[0].log_softmax(1)
    return [logps[len(before) - 1 + i, target].item() for i, target in enumerate(targets)]


ANSWERS = [
    ("What is love?", "A strong feeling, they say.", True, "No idea", False),
    ("Why is the sky blue?", "", True, "Because of 散乱 — scattering! 🙂", True),
    ("And?", "one", False, "", False),
    ("How long is a long answer to a question that goes on for a while?", "very " * 60, True, "short", True),
]


def both(row):
    prompt, a, a_stopped, b, b_stopped = row
    reasons = {True: "stop", False: "length"}
    return ScoredAnswer(prompt, "", a, reasons[a_stopped], 1), ScoredAnswer(prompt, "", b, reasons[b_stopped], 1)


@pytest.mark.parametrize("budget", [4096, 64])
def test_token_logps_are_those_of_a_plain_forward_pass(models, monkeypatch, budget):
    monkeypatch.setattr("tunesmith.generation.logprobs.BATCH_TOKENS", budget)
    for name in models[:2]:
        model, tokenizer = load(str(name), device="cpu")
        pairs = [encode_answers(tokenizer, *both(row)) for row in ANSWERS]
        found = logps_of_both(model, pairs, tokenizer.end_of_text)
        for (prompt, a, a_stopped, b, b_stopped), (of_a, of_b) in zip(ANSWERS, found, strict=True):
            assert of_a == pytest.approx(plain_logps(model, tokenizer, prompt, a, a_stopped), abs=1e-4)
            assert of_b == pytest.approx(plain_logps(model, tokenizer, prompt, b, b_stopped), abs=1e-4)


def test_tokens_beyond_the_models_positions_are_left_out_at_the_end(tmp_path):
    model, tokenizer = load(str(directory(tmp_path / "short", 1, block_size=32)), device="cpu")
    pairs = [encode_answers(tokenizer, *both(ANSWERS[3]))]
    ((of_a, of_b),) = logps_of_both(model, pairs, tokenizer.end_of_text)
    room = 32 - len(pairs[0].prompt)
    assert (len(of_a), len(of_b)) == (room, len(pairs[0].answers[1]) + 1)
    assert room < len(pairs[0].answers[0])


def test_what_no_model_has_positions_for_is_shown_without_colour(tmp_path):
    name = str(directory(tmp_path / "short", 1, block_size=32))
    answers = both(ANSWERS[3])
    (row,) = with_logps((name, name), load(name, device="cpu")[1], [PromptResult(*answers)], "cpu")
    assert row.unscored[0].startswith(" very very")
    assert row.unscored[1] == ""
    for logps, rest, answer in zip(row.logps, row.unscored, answers, strict=True):
        assert coloured(logps, rest).plain.removesuffix("[end]") == answer.answer


def test_log_probabilities_are_of_the_conversation_that_the_models_read(compare, models, tmp_path):
    """Of a talk that is longer than the model can read the first turns are left out, for its answer and for the figures."""
    turns = [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": [*turns, {"role": "user", "content": "What is love?"}]}, {"prompt": "What is love?"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (long, short), *_ = compare(*models[:2], "--logprobs", "--prompts", str(tmp_path / "p.jsonl"))
    for side in ("a", "b"):
        assert long[side]["answer"] == short[side]["answer"]
        assert [t[1:] for t in long[side]["logps"]] == [pytest.approx(t[1:], abs=1e-4) for t in short[side]["logps"]]


def test_texts_of_the_tokens_are_the_answer_and_characters_stay_whole(tokenizer):
    for row in ANSWERS:
        for text, answer in zip(token_texts(tokenizer, encode_answers(tokenizer, *both(row))), both(row), strict=True):
            end = ANSWER_END if answer.finish_reason == "stop" else ""
            assert "".join(text) == (f" {answer.answer}" if answer.answer else "") + end
            assert not any("\ufffd" in piece for piece in text)
    cut = tokenizer.encode("🙂")[:-1]
    assert "".join(ByteRuns(tokenizer).pieces(cut)) == tokenizer.decode(cut) != ""


def test_the_command_writes_the_change_of_every_token(compare, models):
    summary, records, page, printed = compare(*models[:2], "--logprobs")
    a, b = (load(str(name), device="cpu") for name in models[:2])
    for record in records:
        for side in ("a", "b"):
            x = record[side]
            for (model, tokenizer), column in ((a, 1), (b, 2)):
                plain = plain_logps(model, tokenizer, record["prompt"], x["answer"], x["finish_reason"] == "stop")
                assert [token[column] for token in x["logps"]] == pytest.approx(plain, abs=1e-4)
    changes = [sum(t[2] - t[1] for t in r["b"]["logps"]) for r in records]
    assert summary["logprobs"]["b"]["change"]["mean"] == pytest.approx(sum(changes) / len(changes), abs=1e-4)
    assert changes[0] > 0  # B finds its own answer likelier than A does
    first = records[0]["a"]["logps"][0]
    assert f"{first[2] - first[1]:+.3f} nats: log p {first[1]:.3f} under A, {first[2]:.3f} under B" in page
    assert "+(0.5 to 1.5)" in printed.out
    assert "log p_B - log p_A" in page


def test_equal_models_change_nothing(compare, models):
    summary, records, *_ = compare(models[0], models[0], "--logprobs")
    assert summary["logprobs"]["a"]["change"] == {"mean": 0, "low": 0, "high": 0, "n": 6}
    assert all(t[1] == t[2] for r in records for t in r["a"]["logps"])


def test_colours_of_the_terminal():
    logps = [(" up", -3.0, -1.0), (" down", -1.0, -1.75), (" same", -1.0, -1.0), ("", -1.0, -0.875), (" é", -1.0, -0.875),
             (ANSWER_END, -1.0, -1.5)]  # fmt: skip
    text = coloured(logps, " rest")
    assert text.plain == "up down same é[end] rest"
    spans = {text.plain[s.start : s.end]: s.style for s in text.spans}
    assert spans == {"up": COLOURS[3], " down": COLOURS[-2], " é": COLOURS[1], "[end]": COLOURS[-2]}


def test_colours_differ_in_more_than_hue():
    """Orange and blue at like strength; a reader who sees neither still sees light from dark."""
    light = {n: sum(Style.parse(c).bgcolor.get_truecolor()) for n, c in COLOURS.items()}
    for weaker, stronger in (*pairwise((1, 2, 3)), *pairwise((-1, -2, -3))):
        assert light[weaker] > light[stronger] + 50


def test_different_tokenizers_are_told_before_anything_is_generated(compare, models, tokenizer, tmp_path):
    other = directory(tmp_path / "gpt2", 1, tokenizer)
    *_, printed = compare(models[0], other, "--logprobs", code=1)
    for part in ("--logprobs", str(models[0]), "6,144", "50,257", "different tokenizers", "leave --logprobs out"):
        assert part in printed.err
    assert printed.out == ""
    summary, *_ = compare(models[0], other)
    assert summary["prompts"] == 6


def test_a_tokenizer_that_is_written_differently_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path, 1024)
    again = json.loads((tmp_path / "tokenizer.json").read_text())
    again["decoder"]["trim_offsets"] = not again["decoder"]["trim_offsets"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(again))
    other = Tokenizer.load(tmp_path)
    assert other.fingerprint != tokenizer.fingerprint
    assert other.same_tokens(tokenizer)
    assert not Tokenizer.load(SAMPLE).same_tokens(tokenizer)


# ---- rewards -------------------------------------------------------------------------------------------------------


def test_equal_models_win_half_the_time(compare, models):
    summary, records, page, printed = compare(models[0], models[0], "--reward", models[2])
    assert summary["reward"]["wins"] == {"wins": 0, "ties": 6, "losses": 0}
    assert holds(summary["reward"]["win_rate"], 0.5)
    assert holds(summary["reward"]["difference"], 0)
    assert all(r["a"] == r["b"] and r["reward_difference"] == 0 for r in records)
    assert "50.0 %" in printed.out
    assert "50.0 %" in page


def test_swapped_order_is_the_mirrored_table(compare, models):
    a, b, scorer = models
    there, of_there, *_ = compare(a, b, "--reward", scorer)
    back, of_back, *_ = compare(b, a, "--reward", scorer)
    one, other = there["reward"], back["reward"]
    assert one["wins"]["wins"] + one["wins"]["losses"] > 0
    assert (one["wins"]["wins"], one["wins"]["losses"]) == (other["wins"]["losses"], other["wins"]["wins"])
    assert one["win_rate"]["mean"] == pytest.approx(1 - other["win_rate"]["mean"])
    assert one["win_rate"]["low"] == pytest.approx(1 - other["win_rate"]["high"])
    assert one["difference"]["mean"] == pytest.approx(-other["difference"]["mean"])
    assert one["difference"]["low"] == pytest.approx(-other["difference"]["high"], rel=0.1)
    assert [(r["a"], r["b"]) for r in of_there] == [(r["b"], r["a"]) for r in of_back]
    assert there["a"] == back["b"]


def test_rewards_are_the_scorers_own(compare, models):
    from tunesmith.judge.scorers import load_scorer

    _, records, page, printed = compare(*models[:2], "--reward", models[2])
    scorer = load_scorer(str(models[2]), device="cpu")
    for side in ("a", "b"):
        own = scorer.score([r["prompt"] for r in records], [r[side]["answer"] for r in records])
        assert [r[side]["reward"] for r in records] == pytest.approx(own, abs=1e-5)
    assert f"reward {records[0]['a']['reward']:.3f}" in page
    assert re.search(r"reward: all\s", printed.out)
    assert "mean reward" in printed.out


def test_without_extras_it_is_a_table_of_answers(compare, models):
    summary, records, page, printed = compare(*models[:2])
    assert set(summary) == {"prompts", "settings", "a", "b"}
    assert records[0]["a"]["reward"] is None
    assert "ended by themselves" in printed.out
    assert "interval" not in printed.out
    assert page.count("<article") == 6


# ---- the judge -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def test_a_judge_is_asked_and_told(compare, models):
    with serving(lambda n, a, b: Reply(status=429) if n == 3 else longer(a, b)) as server:
        summary, records, page, printed = compare(*models[:2], "--judge", server.url, "--judge-model", "m")
        assert {h["Authorization"] for h, _ in server.asked} == {"Bearer sk-test"}
        assert len(server.asked) == 13
    lengths = [(len(r["a"]["answer"].strip()), len(r["b"]["answer"].strip())) for r in records]
    assert [r["judge"]["verdict"] for r in records] == ["tie" if x == y else "ab"[y > x] for x, y in lengths]
    assert summary["judge"]["agreement"]["mean"] == 1
    assert summary["judge"]["wins"]["wins"] == sum(y > x for x, y in lengths)
    assert json.loads(records[0]["judge"]["replies"][0])["reason"] == "so it is"
    for place in (printed.out, page):
        assert "100.0 %" in place
        assert "sk-test" not in place
    assert "judge: m" not in page
    assert "Replies of the judge" in page


def test_a_judge_with_a_taste_for_the_first_finds_only_ties(compare, models):
    with serving(lambda *_: verdict("1")) as server:
        summary, *_ = compare(*models[:2], "--judge", server.url, "--judge-model", "m")
    assert summary["judge"]["wins"] == {"wins": 0, "ties": 6, "losses": 0}
    assert (summary["judge"]["agreement"]["mean"], summary["judge"]["first_position"]["mean"]) == (0, 1)
    assert holds(summary["judge"]["win_rate"], 0.5)


def test_swapped_order_mirrors_the_judge_and_equal_models_need_none(compare, models):
    with serving(lambda n, a, b: longer(a, b)) as server:
        options = ("--judge", server.url, "--judge-model", "m")
        there, *_ = compare(*models[:2], *options)
        asked = len(server.asked)
        back, *_ = compare(models[1], models[0], *options)
        assert len(server.asked) == asked  # the same questions: both orders are paid for already
        same, *_ = compare(models[0], models[0], *options)
        assert len(server.asked) == asked
    assert there["judge"]["wins"]["wins"] == back["judge"]["wins"]["losses"]
    assert there["judge"]["win_rate"]["low"] == pytest.approx(1 - back["judge"]["win_rate"]["high"])
    assert there["judge"]["agreement"] == back["judge"]["agreement"]
    assert (same["judge"]["same_answers"], same["judge"]["agreement"]) == (6, None)
    assert holds(same["judge"]["win_rate"], 0.5)


def test_a_judge_that_fails_costs_no_answers_and_goes_on_where_it_stopped(compare, models, tmp_path):
    with serving(lambda n, a, b: longer(a, b) if n < 5 else Reply(status=401, body=b'{"error": "gone"}')) as server:
        options = ("--judge", server.url, "--judge-model", "m", "--judge-parallel", "1")
        summary, records, page, printed = compare(*models[:2], *options, code=1)
        port = int(server.url.split(":")[2].removesuffix("/v1"))
    for part in ("401 (gone)", "OPENAI_API_KEY", "out.jsonl.judge.jsonl", "continues from there"):
        assert part in printed.err
    assert "sk-test" not in printed.err + printed.out
    assert len(records) == 6
    assert "judge" not in summary
    assert "<article" in page
    with serving(lambda n, a, b: longer(a, b), port) as server:
        summary, *_ = compare(*models[:2], *options)
        assert len(server.asked) == 7
    assert sum(summary["judge"]["wins"].values()) == 6


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--judge-model", "m"], 2, ["--judge_model", "add --judge URL"]),
        (["--judge_parallel", "2"], 2, ["--judge_parallel", "add --judge URL"]),
        (["--judge", "http://x/v1"], 2, ["--judge_model NAME"]),
        (["--judge", "x", "--judge_model", "m"], 2, ["expected the base URL"]),
        (["--judge", "http://x/v1", "--judge_model", "m", "--judge_timeout", "0"], 2, ["--judge_timeout is 0", "more than 0"]),
        (["--judge", "http://x/v1", "--judge_model", "m", "--judge_parallel", "0"], 2, ["--judge_parallel is 0", "more than 0"]),
        (["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m"], 1, ["127.0.0.1:9", "cannot be reached", "start the server"]),
        (["--reward", "sample"], 1, ["tunesmith: sample is a language model, not a reward model", "tunesmith reward"]),
        (["--rewrad", "x"], 2, ["unknown option --rewrad", "Did you mean --reward?"]),
        (["--html", "/dev/null/x.html"], 1, ["/dev/null: File exists"]),
    ],
)  # fmt: skip
def test_what_users_get_wrong(compare, models, options, code, told):
    *_, printed = compare(*models[:2], *options, code=code)
    missing = [part for part in told if part not in printed.err]
    assert not missing, printed.err


def test_a_switch_may_stand_before_the_models(capfd, models):
    """And hyphens are as good as underscores."""
    argv = ["compare", "--logprobs", *map(str, models[:2]), "--judge-model=m-1", "--limit", "1", "--print_config"]
    with pytest.raises(SystemExit):
        main(argv)
    printed = capfd.readouterr().out
    assert "logprobs: true" in printed
    assert "judge_model: m-1" in printed


def test_commands_of_the_page_on_judging_are_valid(capfd):
    """Those on comparing; what they do is tested above."""
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text()
    lines = [line.partition("  #")[0] for line in page.replace("\\\n", "").splitlines()]
    shown = [shlex.split(line)[1:] for line in lines if line.startswith("tunesmith compare")]
    assert len(shown) >= 4
    for argv in shown:
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--print_config"])
        assert ended.value.code == 0


def test_help_names_the_variable_of_the_key(capfd):
    with pytest.raises(SystemExit):
        main(["compare", "--help", "all"])
    assert "OPENAI_API_KEY" in capfd.readouterr().out


def test_markup_in_answers_and_names_is_text(compare, models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[bold]hi[/bold] :smile: <b>&</b>\n")
    _, records, page, printed = compare(*models[:2], "--prompts", prompts, "--generate.max_new_tokens", "3")
    assert "[bold]hi[/bold]" in printed.out
    assert ":smile:" in printed.out
    assert "[bold]hi[/bold] :smile: &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert len(records) == 1
