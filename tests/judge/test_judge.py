"""The judge against a real HTTP server: both orders, every failure of an endpoint, and what it costs."""

import json
import socket
import time

import pytest

from judge_server import Reply, longer, serving, verdict
from tunesmith.errors import UsageError, UserError
from tunesmith.judge.endpoint import Endpoint, retry_after
from tunesmith.judge.language_model import Judge, parse_verdict, question

PAIRS = [("Why?", "short", "a longer answer"), ("How?", "a longer answer", "short"), ("When?", "now", "yes")]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge(server, *, kept=None, parallel=2, **options):
    return Judge(Endpoint(server.url, "m", **{"wait": 0.01, **options}), parallel=parallel, kept=kept)


def fair(_number, first, second):
    return longer(first, second)


def verdicts(judged):
    return [j.verdict for j in judged]


# ---- verdicts ------------------------------------------------------------------------------------------------------


def test_a_fair_judge_names_the_same_side_in_both_orders():
    with serving(fair) as server:
        found = judge(server).compare(PAIRS)
    assert [j.orders for j in found] == [("b", "b"), ("a", "a"), ("tie", "tie")]
    assert verdicts(found) == ["b", "a", "tie"]
    assert json.loads(found[0].replies[0])["verdict"] == "2"
    assert json.loads(found[0].replies[1])["verdict"] == "1"


def test_swapped_models_give_the_mirrored_verdicts():
    with serving(fair) as server:
        found = judge(server).compare([(p, b, a) for p, a, b in PAIRS])
    assert verdicts(found) == ["a", "b", "tie"]


def test_a_judge_that_always_prefers_the_first_gives_only_ties_and_never_agrees():
    with serving(lambda *_: verdict("1")) as server:
        found = judge(server).compare(PAIRS)
    assert [j.orders for j in found] == [("a", "b")] * 3
    assert verdicts(found) == ["tie"] * 3


def test_a_tie_in_one_order_is_a_tie():
    with serving(lambda n, first, _: verdict("tie" if first == "short" else "1")) as server:
        found = judge(server).compare(PAIRS[:1])
    assert (found[0].orders, found[0].verdict) == (("tie", "b"), "tie")


def test_equal_answers_are_ties_and_cost_nothing():
    with serving(fair) as server:
        found = judge(server).compare([("Why?", "same", " same\n"), *PAIRS[:1]])
        assert len(server.asked) == 2
    assert [(j.verdict, j.asked) for j in found] == [("tie", False), ("b", True)]


def test_what_is_sent(monkeypatch):
    with serving(fair) as server:
        judge(server, key=" sk-secret\n").compare(PAIRS[:1])
        headers, body = server.asked[0]
    assert server.paths == ["/v1/chat/completions"] * 2
    assert headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["temperature"]) == ("m", 0)
    contents = [asked["messages"][1]["content"] for _, asked in server.asked]
    assert ["<message>\nWhy?\n</message>" in c for c in contents] == [True, True]
    assert contents[0].index("short") < contents[0].index("a longer answer")
    assert contents[1].index("short") > contents[1].index("a longer answer")


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"reason": "x", "verdict": "1"}', "1"), ('```json\n{"verdict": "tie",\n "reason": "x"}\n```', "tie"),
        ("{'verdict': 2}", "2"), ("**Verdict: 1**", "1"), (" Tie. ", "tie"), ("2", "2"),
        ('<think>"verdict": "1"?\n</think>{"verdict": "2"}', "2"), ('{"verdict": "TIE"}', "tie"),
        ("Answer 1 is better.", None), ('{"verdict": "3"}', None), ('{"verdict": "1 or 2"}', None), ("", None),
        ('{"verdict": 12}', None), ('{"verdict": "1"} or {"verdict": "2"}', None),
    ],
)  # fmt: skip
def test_verdicts_are_read_or_refused(reply, found):
    assert parse_verdict(reply) == found


# ---- replies without a verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [Reply("Both are fine."), Reply(body=b"<html>busy"), Reply(body=b'{"choices": []}')])
def test_a_reply_without_a_verdict_is_asked_once_more(bad):
    with serving(lambda n, a, b: bad if n == 0 else longer(a, b)) as server:
        found = judge(server).compare(PAIRS[:1])
        assert len(server.asked) == 3
        again = server.asked[1][1]["messages"]
    assert verdicts(found) == ["b"]
    assert len(again) == (4 if bad.text else 2)  # its own words and what is missing, where it said any


def test_a_second_reply_without_one_is_no_verdict_and_the_other_questions_go_on():
    def answer(_number, first, second):
        return Reply("Hm.") if first == "now" else longer(first, second)

    with serving(answer) as server:
        found = judge(server).compare(PAIRS)
        assert len(server.asked) == 7
    assert verdicts(found) == ["b", "a", None]
    assert found[2].orders == (None, "tie")
    assert found[2].replies[0] == "Hm."


def test_no_verdict_at_all_is_an_error_that_shows_a_reply():
    with (
        serving(lambda *_: Reply("I like both.")) as server,
        pytest.raises(UserError, match=r"I like both.*judge_model"),
    ):
        judge(server).compare(PAIRS)


# ---- an endpoint with troubles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(status):
    with serving(lambda n, a, b: Reply(status=status) if n < 3 else longer(a, b)) as server:
        assert verdicts(judge(server).compare(PAIRS)) == ["b", "a", "tie"]
        assert len(server.asked) == 9


def test_waiting_grows_and_retry_after_lengthens_it():
    waits = []
    with serving(lambda n, a, b: Reply(status=429, headers={"Retry-After": "0.3"} if n == 0 else {})) as server:
        asker = judge(server, retries=3)
        real = asker.endpoint.stop.wait
        asker.endpoint.stop.wait = lambda seconds: waits.append(seconds) or real(0)
        with pytest.raises(UserError, match="in 4 tries"):
            asker.compare(PAIRS)
    assert waits[0] == 0.3
    assert 0.02 <= waits[1] <= 0.025
    assert 0.04 <= waits[2] <= 0.05


def test_retry_after_dates_and_endless_waits():
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3000))
    assert 2000 < retry_after(later) <= 3000
    assert retry_after(None) == 0
    waits = []
    with serving(lambda *_: Reply(status=503, headers={"Retry-After": "86400"})) as server:
        asker = judge(server, retries=1)
        asker.endpoint.stop.wait = waits.append
        with pytest.raises(UserError):
            asker.compare(PAIRS)
    assert waits == [120.0]


def test_a_time_out_is_tried_again():
    with serving(lambda n, a, b: Reply(delay=0.6 if n == 0 else 0, text=longer(a, b).text)) as server:
        assert verdicts(judge(server, timeout=0.3, retries=50).compare(PAIRS[:1])) == ["b"]
        assert len(server.asked) >= 3  # more on a busy machine, where others are late too


def test_time_outs_without_end_are_told_with_the_ways_out():
    with (
        serving(lambda *_: Reply(delay=0.3)) as server,
        pytest.raises(UserError, match=r"2 tries.*no reply within 0\.1 s"),
    ):
        judge(server, timeout=0.1, retries=1).compare(PAIRS)


def test_a_connection_cut_in_the_middle_is_tried_again():
    def answer(number, first, second):
        cut = {"Content-Length": "999"} if number == 0 else {}
        return Reply(longer(first, second).text, headers=cut)

    with serving(answer) as server:
        assert verdicts(judge(server, timeout=0.3, retries=50).compare(PAIRS[:1])) == ["b"]


@pytest.mark.parametrize(
    ("reply", "key", "told"),
    [
        (Reply(status=401, body=b'{"error": {"message": "no key"}}'), None, ["401 (no key)", "set OPENAI_API_KEY"]),
        (Reply(status=401, body=b'{"error": {"message": "bad key sk-1"}}'), "sk-1", ["[key]", "refuses the key in OPENAI_API_KEY"]),
        (Reply(status=404, body=b'{"error": "no such model"}'), None, ["404 (no such model)", "no model 'm'", "/v1"]),
        (Reply(status=404, body=b"<html>Not here</html>"), None, ["404: it has"]),
        (Reply(status=400, body=b'{"message": "too long"}'), None, ["400 (too long)", "rejects the request"]),
        (Reply(status=302, body=b"", headers={"Location": "http://else.where/v1"}), "sk-1", ["moved to http://else.where/v1"]),
    ],
)  # fmt: skip
def test_a_refusal_ends_it_at_once_with_the_way_out(reply, key, told):
    with serving(lambda *_: reply) as server:
        with pytest.raises(UserError) as caught:
            judge(server, key=key).compare(PAIRS)
        assert len(server.asked) == 1
    assert [part for part in told if part not in str(caught.value)] == []
    assert "sk-1" not in str(caught.value)


def test_a_model_that_takes_no_temperature_gets_none():
    def answer(_number, first, second):
        refused = "temperature" in server.asked[-1][1]
        return (
            Reply(status=400, body=b'{"error": {"message": "temperature: unsupported"}}')
            if refused
            else longer(first, second)
        )

    with serving(answer) as server:
        assert verdicts(judge(server, parallel=1).compare(PAIRS)) == ["b", "a", "tie"]
        assert len(server.asked) == 7


def test_a_server_that_is_not_there_is_told_without_waiting():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint, waits = Endpoint(f"http://127.0.0.1:{port}/v1", "m"), []
    endpoint.stop.wait = waits.append
    with pytest.raises(UserError, match=r"cannot be reached.*start the server"):
        Judge(endpoint).compare(PAIRS)
    assert waits == []


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://a b/v1", "http://[::1/v1"]
)
def test_what_is_no_url_is_told(url):
    with pytest.raises(UsageError, match="expected the base URL"):
        Endpoint(url, "m")


def test_secrets_stay_secret():
    for url in ("http://me:hunter2@x/v1", "http://me:hunter2@x:port/v1", "http:// x/v1?key=hunter2"):
        with pytest.raises(UsageError) as caught:
            Endpoint(url, "m")
        assert "hunter2" not in str(caught.value)
    with serving(lambda *_: Reply(status=404)) as server:
        endpoint = Endpoint(f"{server.url}?key=hunter2", "m")
        with pytest.raises(UserError) as told:
            endpoint.chat(question("Why?", "one", "two"))
        assert server.paths == ["/v1/chat/completions?key=hunter2"]
    assert "hunter2" not in str(told.value)
    with pytest.raises(UsageError) as caught:
        Endpoint("http://x/v1", "m", key="sk\u200b-1")
    assert "sk" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://x/v1/", "http://x/v1/chat/completions"),
        ("http://x/v1/chat/completions", "http://x/v1/chat/completions"),
        ("https://x/v1?version=2", "https://x/v1/chat/completions?version=2"),
    ],
)
def test_base_urls_and_whole_ones(url, address):
    assert Endpoint(url, "m").address == address


# ---- many at once, and nothing paid for twice ----------------------------------------------------------------------


def test_as_many_requests_at_one_time_as_allowed():
    def answer(_number, first, second):
        return Reply(longer(first, second).text, delay=0.05)

    seen = []
    with serving(answer) as server:
        judge(server, parallel=3).compare(
            [(f"{i}?", "short", "a longer answer") for i in range(8)], lambda *x: seen.append(x)
        )
        assert server.most == 3
    assert seen == [(i, 16) for i in range(1, 17)]


def test_a_cut_comparison_pays_only_for_the_rest(tmp_path):
    kept = tmp_path / "kept.jsonl"
    told = pytest.raises(UserError, match=r"kept\.jsonl: the same command continues")
    with serving(lambda n, a, b: longer(a, b) if n < 3 else Reply(status=401)) as server, told:
        judge(server, kept=kept, parallel=1).compare(PAIRS)
    kept.write_bytes(kept.read_bytes() + b'{"question": "cut in the mid')
    with serving(fair, int(server.url.split(":")[2].removesuffix("/v1"))) as server:
        assert verdicts(judge(server, kept=kept).compare(PAIRS)) == ["b", "a", "tie"]
        assert len(server.asked) == 3
        found = judge(server, kept=kept).compare(PAIRS)
        assert len(server.asked) == 3
    assert verdicts(found) == ["b", "a", "tie"]
    assert json.loads(found[0].replies[0]) == {"reason": "so it is", "verdict": "2"}


def test_another_model_or_another_answer_is_asked_anew(tmp_path):
    kept = tmp_path / "kept.jsonl"
    with serving(fair) as server:
        judge(server, kept=kept).compare(PAIRS[:1])
        assert len(server.asked) == 2
        judge(server, kept=kept).compare(PAIRS[:1])
        assert len(server.asked) == 2
        Judge(Endpoint(server.url, "another"), kept=kept).compare(PAIRS[:1])
        assert len(server.asked) == 4
        judge(server, kept=kept).compare([("Why?", "short", "another long answer")])
        assert len(server.asked) == 6
