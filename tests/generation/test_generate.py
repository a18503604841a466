"""Decoding with a cache against reading everything anew; what ends an answer; what fits."""

import contextlib
import itertools
import warnings

import numpy as np
import pytest
import torch

import tunesmith as ts
from reference import chi_square, greedy, in_transformers, kept_tokens, random_model, saying, scripted_model, silent
from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import Note, UserError
from tunesmith.files.names import SAMPLE
from tunesmith.generation import engine
from tunesmith.generation.context import read_prompts
from tunesmith.generation.engine import PACK_STEPS, decode, generate, generate_answers, prepare, stream
from tunesmith.generation.sampling import Sampling, sample_tokens
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.linear import packable

SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=96)
GREEDY = Sampling(temperature=0)
READ = engine._read
QUESTIONS = ["Hi", "What is love?", "Name three rivers of Asia, and say where they end.", "Why?", "And now, " * 9]


def user(text):
    return [{"role": "user", "content": text}]


PROMPTS = [user(q) for q in QUESTIONS] + [[*user("Hello"), {"role": "assistant", "content": "Hi!"}, *user("Bye")]]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.load(SAMPLE)


@pytest.fixture(scope="module")
def model():
    """Float64, so that another order of summation cannot tip a close decision."""
    return random_model(SHAPE, 10, dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(tok):
    return [encode_prompt(tok, p) for p in PROMPTS]


def decoded(model, tok, prompts, sampling, n):
    rows = [[] for _ in prompts]
    for row, token, _ in decode(model, tok, prompts, sampling, n):
        rows[row].append(token)
    return rows


# The cache


def test_cached_decoding_equals_reading_everything_anew(model, tok, prompts):
    expected = [greedy(model, p, 40, tok.end_of_text) for p in prompts]
    assert len({token for row in expected for token in row}) > 20  # no model that says one thing for ever
    assert [decoded(model, tok, [p], GREEDY, 40)[0] for p in prompts] == expected
    assert decoded(model, tok, prompts, GREEDY, 40) == expected


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_do_not_depend_on_batch_size_order_or_company(model, tok, temperature):
    def answers(prompts, batch_size):
        return ts.generate(
            model, tok, prompts, max_new_tokens=12, temperature=temperature, top_p=0.95, batch_size=batch_size
        )

    alone = [answers([p], 1)[0] for p in PROMPTS]
    assert len(set(alone)) == len(alone)
    for batch_size in (1, 2, 4, 64):
        assert answers(PROMPTS, batch_size) == alone
        assert answers(PROMPTS[::-1], batch_size) == alone[::-1]
    assert answers([], 4) == []


def test_greedy_tokens_are_those_of_transformers_in_one_padded_batch(model, tok, prompts):
    theirs, end, width = in_transformers(model, "sdpa"), tok.end_of_text, max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    answers = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=end
    )[:, width:]
    expected = [row[: row.index(end) + 1] if end in row else row for row in answers.tolist()]
    assert decoded(model, tok, prompts, GREEDY, 30) == expected


def test_rows_leave_the_batch_as_they_end_and_the_others_do_not_notice(monkeypatch):
    """A token that a random model says now and then is made the end of text."""
    model = random_model(SHAPE, dtype=torch.float64)
    prompts = [torch.randint(0, 6144, (3 + 7 * i % 11,)).tolist() for i in range(24)]
    endless = [greedy(model, p, 30, -1) for p in prompts]
    end = max(range(6144), key=lambda t: len({row.index(t) for row in endless if t in row}))
    expected = [greedy(model, p, 30, end) for p in prompts]
    assert len({len(row) for row in expected}) > 4
    sizes = []
    monkeypatch.setattr(engine, "sample_tokens", lambda x, *a: (sizes.append(len(x)), sample_tokens(x, *a))[1])
    assert decoded(model, silent(end), prompts, GREEDY, 30) == expected
    assert sizes == [sum(len(row) > step for row in expected) for step in range(max(map(len, expected)))]


def test_a_short_prompt_goes_on_when_a_long_one_beside_it_has_filled_the_positions(model, tok, prompts):
    long = prompts[2] * 8
    for pair in ([long[:90], prompts[0]], [prompts[1], long[:95], prompts[0]]):
        expected = [greedy(model, p, min(60, 96 - len(p)), tok.end_of_text) for p in pair]
        assert [len(row) for row in expected][-1] == 60
        assert decoded(model, tok, pair, GREEDY, 60) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_generate_too(tok, prompts, dtype):
    rows = decoded(random_model(SHAPE).to(dtype), tok, prompts, GREEDY, 5)
    assert [len(row) for row in rows] == [5] * len(prompts)


# Several answers to a prompt


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_several_samples_a_prompt_equal_separate_calls_and_read_it_once(model, tok, monkeypatch, batch_size):
    separate = [generate_answers(model, tok, PROMPTS, Sampling(1.0, 0.95, sample=2 + n), 12) for n in range(3)]
    expected = [answers[i] for i in range(len(PROMPTS)) for answers in separate]
    assert len({a.text for a in expected}) == len(expected)
    read = []
    monkeypatch.setattr(engine, "_read", lambda m, c, p, d: (read.extend(p), READ(m, c, p, d))[1])
    sampling = Sampling(1.0, 0.95, sample=2)
    assert generate_answers(model, tok, PROMPTS, sampling, 12, batch_size=batch_size, samples=3) == expected
    if batch_size == 64:
        assert sorted(read) == sorted(encode_prompt(tok, p) for p in PROMPTS)


# Packed weights


def test_answers_on_packed_weights_are_the_same(tok):
    """Float32, which the others are not; a call of many steps packs for its time only."""
    model = random_model(SHAPE)
    plain = [generate_answers(model, tok, [p], GREEDY, 12)[0] for p in PROMPTS]
    assert generate_answers(model, tok, PROMPTS, GREEDY, 12) == plain
    seen = []
    model.ln_f.register_forward_hook(lambda *a: seen.append(model.lm_head.packed is not None))
    assert generate_answers(model, tok, PROMPTS, GREEDY, 12, batch_size=1) == plain
    assert len(PROMPTS) * 12 >= PACK_STEPS
    assert set(seen) == {bool(packable(random_model(SHAPE)))}
    assert model.lm_head.packed is None
    assert generate_answers(prepare(model), tok, PROMPTS, GREEDY, 12) == plain
    assert generate_answers(model, tok, PROMPTS, GREEDY, 12, batch_size=1) == plain


# Sampling


def test_seed_and_sample_number_change_answers_and_nothing_else_does(model, tok):
    def answer(**options):
        return generate_answers(model, tok, [PROMPTS[1]], Sampling(1.0, 1.0, **options), 12)[0].text

    torch.manual_seed(1)
    first = answer(seed=1)
    torch.manual_seed(2)
    assert answer(seed=1) == first
    assert len({answer(seed=s, sample=n) for s in range(3) for n in range(3)}) == 9


def test_drawn_answers_follow_the_models_distribution(tok):
    """Two tokens after each of 1,500 prompts; the model's distribution depends on the position alone."""
    logits = [list(row) for row in np.random.default_rng(0).normal(size=(2, 12))]
    model = scripted_model({2: logits[0], 3: logits[1]}, 8, 12)
    prompts = [list(p) for p in itertools.product(range(12), repeat=3)][:1500]
    drawn = decoded(model, tok, prompts, Sampling(1.0, 1.0), 2)
    for place in (0, 1):
        expected = kept_tokens(np.array(logits[place]), 1.0, 0, 1.0)
        seen = [row[place] for row in drawn if len(row) > place]
        assert chi_square([seen.count(t) for t in range(12)], [expected[t] for t in range(12)]) < 4


WRONG = [("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("seed", -1), ("max_new_tokens", 0)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_settings_out_of_range_are_named(model, tok, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}"):
        ts.generate(model, tok, PROMPTS[:1], **{name: value})


def test_no_samples_are_refused(model, tok):
    with pytest.raises(UserError, match="samples is 0"):
        generate_answers(model, tok, PROMPTS[:1], GREEDY, samples=0)


@pytest.mark.parametrize("prompt", [[{"role": "pirate", "content": "x"}], [{"role": "user"}], "What is love?"])
def test_a_prompt_that_is_no_conversation_is_a_users_error(model, tok, prompt):
    with pytest.raises(UserError, match="not a conversation"):
        ts.generate(model, tok, [prompt])


# What ends an answer


def end(tok):
    return [tok.end_of_text]


def letters(tok, text):
    """A text byte by byte: nothing that BPE would ever make, and yet the same text."""
    return [i for character in text for i in tok.encode(character)]


@pytest.mark.parametrize(
    ("said", "text", "reason", "tokens"),
    [
        (lambda t: [*t.encode(" Hello there."), *end(t), *t.encode(" more")], "Hello there.", "stop", None),
        (lambda t: t.encode(" Hello there.\n\nHuman: and more"), "Hello there.", "stop", None),
        (lambda t: letters(t, " Fine.\n\nAssistant: more"), "Fine.", "stop", 6 + len("\n\nAssistant:")),
        (lambda t: letters(t, " Fine.\n\nSystem: more"), "Fine.", "stop", 6 + len("\n\nSystem:")),
        (lambda t: letters(t, " A\n\nHumans: we"), "A\n\nHumans: we", "length", 14),
        (lambda t: letters(t, "  two\n\nspaces \n"), " two\n\nspaces \n", "length", 15),
        (lambda t: end(t), "", "stop", 1),
    ],
    ids=["end of text", "human", "assistant", "system", "no marker", "spaces", "empty"],
)
def test_an_answer_ends_at_end_of_text_or_before_a_role_marker(tok, said, text, reason, tokens):
    prompt = user("Hi")
    ids = said(tok)
    model = saying(ids, len(encode_prompt(tok, prompt)))
    (answer,) = generate_answers(model, tok, [prompt], GREEDY, len(ids))
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert answer.tokens == (tokens or answer.tokens)
    assert answer.tokens < len(ids) or reason == "length" or text == ""
    assert "".join(stream(model, tok, prompt, GREEDY, len(ids))) == text


# Prompts that do not fit


def test_a_prompt_without_room_for_an_answer_is_named(model, tok):
    prompts = [PROMPTS[0], user("word " * 90)]
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens.*96.*cut_front"):
        ts.generate(model, tok, prompts)


def test_cut_front_answers_the_end_of_the_question_and_says_what_it_left_out(model, tok):
    long = "word " * 90 + "and?"
    with pytest.warns(Note, match=r"1 of 2 prompts are longer than the 76 tokens.*1 question.*prompt 2"):
        _, answer = ts.generate(model, tok, [PROMPTS[0], user(long)], temperature=0, max_new_tokens=20, cut_front=True)
    kept = next(
        ids for n in range(len(long)) if len(ids := encode_prompt(tok, user(long[n:]))) <= 96 - 20
    )  # the longest end of the question that leaves the answer its room
    assert answer == tok.decode(greedy(model, kept, 20, tok.end_of_text)).removeprefix(" ")


@pytest.mark.parametrize("limit", [1, 8, 64, 10_000])
@pytest.mark.parametrize("words", range(1, 120, 7))
def test_no_prompt_leaves_an_answer_less_than_its_room(model, tok, words, limit):
    """Just below the positions an answer had one to three tokens, and above them a prompt had one."""
    asked = []
    for too_long in ("cut", "refuse"):
        with contextlib.suppress(UserError), warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            asked += read_prompts(tok, [user("word " * words)], positions=96, max_new_tokens=limit, too_long=too_long)
    assert asked
    assert all(len(ids) <= 96 - min(limit, 24) for ids in asked)
    assert all(len(ids) > 48 for ids in asked) or words < 70


def test_scoring_leaves_out_whole_turns_with_a_note_and_refuses_half_a_question(model, tok):
    talk = [*user("word " * 40), {"role": "assistant", "content": "yes " * 40}, *user("And now?")]
    with pytest.warns(Note, match=r"1 of 1 prompts .*; left out: 2 early turns \(prompt 1\)"):
        (answer,) = generate_answers(model, tok, [talk], GREEDY, 12, too_long="turns")
    assert answer == generate_answers(model, tok, [user("And now?")], GREEDY, 12)[0]
    with pytest.raises(UserError, match=r"prompt 1 has \d+ tokens.*its last question alone is too long. Shorten it"):
        generate_answers(model, tok, [user("word " * 90)], GREEDY, 12, too_long="turns")


def test_an_answer_that_reaches_the_last_position_says_so(tok):
    prompt = user("Hi")
    read = len(encode_prompt(tok, prompt))
    ids = tok.encode(" one two three four five six seven eight")
    model = saying(ids, read, block_size=read + len(ids))
    reasons = [generate_answers(model, tok, [prompt], GREEDY, n)[0].finish_reason for n in (4, len(ids), 100)]
    assert reasons == ["length", "length", "context"]


@pytest.mark.parametrize("length", [94, 95])
def test_decoding_ends_where_the_positions_end(model, tok, length):
    ids = (encode_prompt(tok, user("word " * 90)))[-length:]
    assert decoded(model, tok, [ids], GREEDY, 50) == [greedy(model, ids, 96 - length, tok.end_of_text)]


# Streaming


def test_pieces_joined_equal_generate(model, tok):
    """A random model says much that is no UTF-8."""
    for sample, prompt in itertools.product(range(8), PROMPTS):
        sampling = Sampling(1.0, 1.0, sample=sample)
        (answer,) = generate_answers(model, tok, [prompt], sampling, 12)
        pieces = list(stream(model, tok, prompt, sampling, 12))
        assert "".join(pieces) == answer.text
        assert all(pieces)


@pytest.mark.parametrize("text", [" naïve 🙂🙃 日本", " one\n\nHum, two\n\nAssistant", " a\n\n\nb"])
def test_pieces_come_as_they_are_made_and_hold_whole_characters(tok, text):
    prompt, ids = user("Hi"), letters(tok, text)
    model = saying([*ids, tok.end_of_text], len(encode_prompt(tok, prompt)))
    shown, most_held = "", 0
    for piece in stream(model, tok, prompt, GREEDY, 60):
        assert text[1:].startswith(shown + piece)
        most_held = max(most_held, len(piece))
        shown += piece
    assert shown == text[1:]
    assert most_held <= len("\n\nAssistant")


# What it leaves behind


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_random_state_are_left_as_found_also_by_a_stream_that_is_dropped(tok, training):
    model = random_model(SHAPE).train(training)
    state = torch.get_rng_state()
    ts.generate(model, tok, PROMPTS, max_new_tokens=3)
    pieces = stream(model, tok, PROMPTS[0], Sampling(), 30)
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert (model.training, torch.is_grad_enabled()) == (training, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_streams_of_a_training_model_do_not_disturb_each_other(tok):
    model = random_model(GPTConfig(**{**vars(SHAPE), "dropout": 0.5})).train()
    alone = [list(stream(model, tok, p, Sampling(1.0), n)) for p, n in ((PROMPTS[0], 6), (PROMPTS[1], 24))]
    both = [stream(model, tok, p, Sampling(1.0), n) for p, n in ((PROMPTS[0], 6), (PROMPTS[1], 24))]
    pieces = [[], []]
    for pair in itertools.zip_longest(*both):
        for mine, piece in zip(pieces, pair, strict=True):
            mine += [piece] if piece is not None else []
    assert pieces == alone
    assert (model.training, torch.is_grad_enabled()) == (True, True)


def test_the_public_name_stays_a_function_whatever_was_imported_before():
    assert ts.generate is ts.generate is generate


def test_messages_and_dictionaries_are_the_same_prompt(tok):
    as_messages = [Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "Bye")]
    assert encode_prompt(tok, as_messages) == encode_prompt(tok, PROMPTS[-1])


def test_a_limit_beyond_the_positions_costs_no_memory(model, tok):
    """Random numbers were drawn for every token that was allowed: with a limit that means none, for more than memory holds."""
    assert generate_answers(model, tok, [user("Hi")], GREEDY, 10**18) == generate_answers(
        model, tok, [user("Hi")], GREEDY, 96
    )


def test_a_question_is_cut_where_the_marks_of_a_turn_take_half_of_a_small_model(tok):
    marks = len(encode_prompt(tok, user("")))
    positions = 2 * marks + 4
    (ids,) = read_prompts(tok, [user("word " * 90)], positions=positions, max_new_tokens=4, too_long="cut")
    assert marks < len(ids) <= positions - 4
    with pytest.raises(UserError, match=r"the marks of a turn take .* use a model with more positions"):
        read_prompts(tok, [user("word " * 90)], positions=marks, max_new_tokens=1, too_long="cut")
