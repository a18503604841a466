"""Recorded decoding steps against plain ones. What stands for a CUDA graph is as strict as one: see taped.py."""

import pytest
import torch

from reference import greedy, random_model, silent
from taped import Tape
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.generation import engine
from tunesmith.generation import token_graph as decoding
from tunesmith.generation.engine import decode, generate_answers
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.token_graph import ENOUGH_STEPS, FixedSteps, recorder
from tunesmith.models.gpt2 import GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=96)
GREEDY, SAMPLED = Sampling(temperature=0), Sampling(1.0, 0.95)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16], [16], [17, 18]]
ENDLESS = silent()


class Recorder:
    """Records as `token_graph.cuda_graphs` does, and remembers: (rows, columns read, replays) of every recording."""

    def __init__(self, fail_at=None):
        self.made, self.tried, self.fail_at = [], 0, fail_at

    def __call__(self, work):
        self.tried += 1
        work()
        if self.tried == self.fail_at:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        tape = Tape()
        play = tape.record(work)
        (mask,) = {out.shape for operator, _, _, out in tape.calls if "masked_fill_" in str(operator)}
        found = {"rows": mask[0], "extent": mask[3], "replays": 0}
        self.made.append(found)

        def replay():
            assert self.made[-1] is found  # they share memory: only the latest may be replayed
            found["replays"] += 1
            play()

        return replay


@pytest.fixture(scope="module")
def model():
    """Float64, so that another order of summation cannot tip a close decision."""
    return random_model(SHAPE, 10, dtype=torch.float64)


@pytest.fixture
def recorded(monkeypatch):
    """From here on `decode` records, with this."""
    recorder = Recorder()
    monkeypatch.setattr(decoding, "recorder", lambda device, steps: recorder if steps > ENOUGH_STEPS else None)
    return recorder


def decoded(model, tokenizer, prompts, sampling, n):
    rows = [[] for _ in prompts]
    for row, token, _ in decode(model, tokenizer, prompts, sampling, n):
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(1.0, 1.0, 7)], ids=["greedy", "top_p", "top_k"])
@pytest.mark.parametrize("columns", [16, 32, 128])
def test_answers_are_those_of_plain_steps(model, sampling, columns, recorded, monkeypatch):
    plain = [decoded(model, ENDLESS, [p], sampling, ENOUGH_STEPS)[0] for p in PROMPTS]  # too few to be recorded
    assert not recorded.tried
    with monkeypatch.context() as without:
        without.setattr(decoding, "recorder", lambda *_: None)
        plain = [decoded(model, ENDLESS, [p], sampling, 60)[0] for p in PROMPTS]
    monkeypatch.setattr(decoding, "COLUMNS", columns)
    assert decoded(model, ENDLESS, PROMPTS, sampling, 60) == plain
    assert len(plain[2]) == 60
    assert len({token for row in plain for token in row}) > 30
    assert [decoded(model, ENDLESS, [p], sampling, 60)[0] for p in PROMPTS] == plain
    assert recorded.made


def test_several_answers_to_a_prompt_and_stop_texts(model, recorded):
    tokenizer = Tokenizer.load(SAMPLE)
    conversations = [[{"role": "user", "content": text}] for text in ("Hi", "What is love?", "Name three rivers.")]
    sampling = Sampling(1.3, 1.0, sample=2)
    found = generate_answers(model, tokenizer, conversations, sampling, 24, samples=3)
    assert len(recorded.made) == 1
    assert recorded.made[0]["rows"] == 9
    expected = [
        generate_answers(model, tokenizer, [c], Sampling(1.3, 1.0, sample=2 + n), 24)[0]
        for c in conversations
        for n in range(3)
    ]
    assert found == expected
    prompt = encode_prompt(tokenizer, conversations[1])
    assert decoded(model, tokenizer, [prompt], GREEDY, 24)[0] == greedy(model, prompt, 24, tokenizer.end_of_text)


def test_rows_end_at_different_steps_and_a_recording_outlives_them(model, recorded, monkeypatch):
    """24 rows; a token that a random model says now and then is made the end of text. Steps are few beside the rows'."""
    monkeypatch.setattr(decoding, "ENOUGH_STEPS", 4)
    prompts = [torch.randint(0, 6144, (3 + 7 * i % 11,)).tolist() for i in range(24)]
    endless = [greedy(model, p, 40, -1) for p in prompts]
    end = max(range(6144), key=lambda t: len({row.index(t) for row in endless if t in row}))
    expected = [greedy(model, p, 40, end) for p in prompts]
    assert len({len(row) for row in expected}) > 4
    assert decoded(model, silent(end), prompts, GREEDY, 40) == expected
    assert recorded.made[0]["rows"] == sum(len(row) > 1 for row in expected) > 20
    ends = {len(row) for row in expected if 1 < len(row) <= recorded.made[0]["replays"]}
    assert len(ends) > 3


def test_a_batch_that_has_shrunk_to_a_quarter_is_recorded_anew(model, recorded):
    """16 prompts near the end of the positions beside four short ones: those end together, and leave positions behind."""
    long = [torch.randint(0, 6144, (86,)).tolist() for _ in range(16)]
    prompts = [*long[:9], *PROMPTS[:4], *long[9:]]
    expected = [greedy(model, p, min(60, 96 - len(p)), -1) for p in prompts]
    assert decoded(model, ENDLESS, prompts, GREEDY, 60) == expected
    assert [(m["rows"], m["extent"]) for m in recorded.made] == [(20, 128), (4, 128), (4, 160)]
    assert [m["replays"] for m in recorded.made] == [9, 33, 17]


def test_rows_without_an_answer_to_make_keep_within_the_models_positions(model, recorded):
    """Fewer than three quarters of the rows have ended: they go through the model until the others end."""
    prompts = [torch.randint(0, 6144, (90,)).tolist(), *PROMPTS, torch.randint(0, 6144, (93,)).tolist()]
    expected = [greedy(model, p, min(70, 96 - len(p)), -1) for p in prompts]
    assert decoded(model, ENDLESS, prompts, SAMPLED, 70) != expected
    assert decoded(model, ENDLESS, prompts, GREEDY, 70) == expected
    assert {m["rows"] for m in recorded.made} == {7, 5}  # 5 when more columns are needed


def test_a_long_answer_crosses_the_bounds_and_nothing_is_recorded_between(recorded):
    """The sizes that are in force: 128 columns at a time, all of a step's shapes fixed in between."""
    model = random_model(GPTConfig(**{**vars(SHAPE), "block_size": 512}), dtype=torch.float64)
    seen = []
    model.wte.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    prompts = [PROMPTS[0], PROMPTS[1]]
    found = decoded(model, ENDLESS, prompts, GREEDY, 504)
    assert [len(row) for row in found] == [504, 504]
    assert [m["extent"] for m in recorded.made] == [128, 256, 384, 512]
    assert sum(m["replays"] for m in recorded.made) == 503
    assert seen == [(1, 11), *[(2, 1)] * 8]  # the prompts, then twice for each recording: Python saw no other step
    for prompt, row in zip(prompts, found, strict=True):
        read = model.lm_head(model(torch.tensor([prompt + row[:-1]])))[0, len(prompt) - 1 :].argmax(1)
        assert read.tolist() == row


def test_the_last_steps_are_plain_where_a_recording_would_not_pay(model, recorded, monkeypatch):
    monkeypatch.setattr(decoding, "COLUMNS", 16)
    expected = [greedy(model, p, 40, -1) for p in PROMPTS[:2]]
    assert decoded(model, ENDLESS, PROMPTS[:2], GREEDY, 40) == expected
    assert [(m["extent"], m["replays"]) for m in recorded.made] == [(32, 24)]  # from column 8; 15 steps are left at 32


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_logits_of_every_step_are_those_of_plain_steps(dtype, near):
    """The same tokens for both, rows leaving on the way; started from memory that holds no numbers."""
    model = random_model(SHAPE).to(dtype)

    def begun():
        cache = model.new_cache([len(p) for p in PROMPTS], 64)
        for held in (*cache.keys, *cache.values):
            held[:, :, cache.end :] = float("nan")
        with torch.no_grad():
            return cache, engine._read(model, cache, PROMPTS, torch.device("cpu"))

    def next_logits(tokens, cache):
        return engine._next(model, tokens, cache)

    (plain, expected), (cache, logits) = begun(), begun()
    steps, leaving = FixedSteps(next_logits, cache, logits, Recorder()), {3: [1], 10: [0, 2], 30: [1]}
    for step in range(60):
        torch.testing.assert_close(logits, expected, rtol=near, atol=near)
        tokens = expected.argmax(1)
        if step in leaving:
            stay = plain.drop(leaving[step])
            assert cache.drop(leaving[step]) == stay
            tokens = tokens[stay]
        expected, logits = next_logits(tokens, plain), steps(tokens, 60 - step)
    assert len(tokens) == 1
    assert steps.replay is not None


@pytest.mark.parametrize("steps", ["plain", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_masks_keys_and_values_where_the_memory_efficient_kernel_can(
    monkeypatch, request, dtype, steps
):
    """From multiples of 16 bytes on, mask rows a multiple of 16 numbers apart: torch takes them as they are, and the
    kernel does not check. The longest prompts leave first, where the model's positions end, another on the way."""
    if steps == "recorded":
        request.getfixturevalue("recorded")
    attend, begun = torch.nn.functional.scaled_dot_product_attention, []

    def spied(q, k, v, attn_mask=None, *rest, **more):
        if attn_mask is not None:
            assert q.shape[2] == 1
            assert attn_mask.shape == (len(q), 1, 1, k.shape[2])
            assert [z.data_ptr() % 16 for z in (attn_mask, k, v)] == [0, 0, 0]
            assert [stride % 16 for stride in attn_mask.stride()[:-1]] == [0, 0, 0]
            assert attn_mask.stride(-1) == 1
            begun.append(attn_mask.storage_offset())
        return attend(q, k, v, attn_mask, *rest, **more)

    model = random_model(SHAPE, 10, dtype=torch.float64)
    prompts = [*PROMPTS, list(range(20, 71)), list(range(30, 107))]  # of 3, 8, 1, 1, 2, 51 and 77 tokens
    expected = [greedy(model, p, min(60, 96 - len(p)), -1) for p in prompts]
    end = -1
    if dtype is torch.float32:  # an answer ends by itself too; in bf16 tokens may differ
        end = next(t for t in expected[0][5:] if t not in [*expected[5], *expected[6]])
        expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    found = decoded(model.to(dtype), silent(end), prompts, GREEDY, 60)
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert found == expected or dtype is not torch.float32
    first = (
        {0, 64} if steps == "recorded" else {0, 16, 64}
    )  # the first columns hold 0, 26 and 69; recorded steps read all
    assert set(begun) == first


@pytest.mark.parametrize("fail_at", [1, 2])
def test_where_recording_fails_steps_are_plain_and_one_line_says_so(model, recorded, monkeypatch, fail_at):
    monkeypatch.setattr(decoding, "COLUMNS", 16)
    recorded.fail_at = fail_at
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .CUDA error: operation not permitted") as told:
        found = decoded(model, ENDLESS, PROMPTS, GREEDY, 70)
    assert found == [greedy(model, p, 70, -1) for p in PROMPTS]
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert recorded.tried == fail_at
    assert len(recorded.made) == fail_at - 1


def test_the_cause_is_told_and_not_the_complaint_that_follows_it():
    def record(work):
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("capture has ended badly")

    steps, _ = started(record)
    with pytest.warns(UserWarning, match="the cause"):
        steps(torch.tensor([1]), 50)


def test_another_error_than_torchs_comes_out():
    def record(work):
        raise KeyError("a mistake of ours")

    steps, _ = started(record)
    with pytest.raises(KeyError):
        steps(torch.tensor([1]), 50)


def started(record):
    model = random_model(SHAPE)
    cache = model.new_cache([1], 60)
    with torch.no_grad():
        logits = engine._read(model, cache, [[3]], torch.device("cpu"))
    return FixedSteps(lambda tokens, held: engine._next(model, tokens, held), cache, logits, record), cache


def test_weights_that_were_trained_between_two_calls_answer(recorded):
    """In place, as an optimizer does it, and put in the place of others, as the merging of adapters does."""
    model = random_model(SHAPE, dtype=torch.float64)
    first = decoded(model, ENDLESS, PROMPTS[:1], GREEDY, 30)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(0.5)
        model.h[1].attn.c_attn.weight = torch.nn.Parameter(0.5 * model.h[1].attn.c_attn.weight)
    second = decoded(model, ENDLESS, PROMPTS[:1], GREEDY, 30)
    assert second == [greedy(model, PROMPTS[0], 30, -1)] != first
    assert len(recorded.made) == 2


def test_a_model_in_training_is_left_in_training_and_answers_without_dropout(recorded):
    shape = GPTConfig(**{**vars(SHAPE), "dropout": 0.5})
    model = random_model(shape, dtype=torch.float64).train()
    found = decoded(model, ENDLESS, PROMPTS[:2], GREEDY, 30)
    assert model.training
    assert recorded.made[0]["replays"] == 29
    assert found == [greedy(model.eval(), p, 30, -1) for p in PROMPTS[:2]]


def test_two_batches_taken_in_turn_do_not_disturb_each_other(model, monkeypatch):
    monkeypatch.setattr(decoding, "recorder", lambda *_: Recorder())
    both = [decode(model, ENDLESS, [p], GREEDY, 30) for p in PROMPTS[:2]]
    rows = [[], []]
    for pair in zip(*both, strict=True):
        for row, (_, token, _) in zip(rows, pair, strict=True):
            row.append(token)
    assert rows == [greedy(model, p, 30, -1) for p in PROMPTS[:2]]


def test_the_tape_is_as_strict_as_a_graph():
    place, number = torch.zeros(2), [1.0]
    play = Tape().record(lambda: place.add_(number[0]))
    assert place.tolist() == [0.0, 0.0], "recorded, not done"
    number[0] = 5.0
    play()
    play()
    assert place.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="capturing"), Tape():
        place[0].item()


def test_nothing_is_recorded_without_a_card_for_few_steps_or_under_autocast():
    assert recorder(torch.device("cpu"), 1000) is None
    assert recorder(torch.device("mps"), 1000) is None
    assert recorder(torch.device("cuda"), ENOUGH_STEPS) is None
    torch.set_autocast_enabled("cuda", True)
    try:
        assert recorder(torch.device("cuda"), 1000) is None
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_card_records_where_steps_are_enough(monkeypatch):
    monkeypatch.setattr(decoding, "cuda_graphs", lambda device: device)
    assert recorder(torch.device("cuda", 1), ENOUGH_STEPS + 1) == torch.device("cuda", 1)
