"""Answers on a GPU: those of the processor, and of steps that are not recorded. Run with tests/test_gpu.py."""

import functools
import warnings

import pytest
import torch

from reference import random_model
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.generation import engine
from tunesmith.generation import token_graph as decoding
from tunesmith.generation.engine import decode
from tunesmith.generation.sampling import Sampling
from tunesmith.models.gpt2 import GPTConfig

needs_card = pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device is visible; where one is: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu*.py",
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=64, vocab_size=6144, block_size=256)
HALF = [torch.float16, torch.bfloat16]


def test_greedy_answers_are_those_of_the_processor():
    tokenizer = Tokenizer.load(SAMPLE)
    model = random_model(SHAPE)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [9]]
    answers = []
    for device in (CPU, CUDA):
        rows = [[] for _ in prompts]
        for row, token, _ in decode(model.to(device), tokenizer, prompts, Sampling(temperature=0), 20):
            rows[row].append(token)
        answers.append(rows)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("recorded", [True, False])
def test_prompts_of_any_lengths_may_leave_the_batch_in_any_order(monkeypatch, dtype, recorded):
    """The memory-efficient kernel reads the mask by 16 bytes: from an unaligned column on it would lose the CUDA context."""
    if not recorded:
        monkeypatch.setattr(decoding, "recorder", lambda *_: None)
    model, generator = random_model(SHAPE).to(CUDA, dtype), torch.Generator().manual_seed(2)
    lengths = [3, 8, 1, 1, 2, 51, 77, 180, 203, 238, 241, 249]
    prompts = [torch.randint(0, 6144, (n,), generator=generator).tolist() for n in lengths]
    rows = [[] for _ in prompts]
    for row, token, _ in decode(model, Tokenizer.load(SAMPLE), prompts, Sampling(temperature=0), 90):
        rows[row].append(token)
    torch.cuda.synchronize()
    assert all(0 < len(row) <= min(90, 256 - n) for row, n in zip(rows, lengths, strict=True))


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [9], [10, 11]]


def decoded(model, sampling, n):
    """Tokens of the answers to PROMPTS."""
    rows, tokenizer = [[] for _ in PROMPTS], Tokenizer.load(SAMPLE)
    for row, token, _ in decode(model, tokenizer, PROMPTS, sampling, n):
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(1.0, 0.95), Sampling(1.0, 1.0, 20)], ids=str)
def test_answers_from_recorded_steps_are_those_of_plain_ones(sampling, monkeypatch):
    """Over a bound of the columns, by the weights of each call, no failure told. Float64: rounding must not tip a draw."""
    recordings = []

    def counting(device):
        record = decoding_graphs(device)
        return lambda work: (recordings.append(1), record(work))[1]

    decoding_graphs = decoding.cuda_graphs
    monkeypatch.setattr(decoding, "cuda_graphs", counting)
    model = random_model(SHAPE, dtype=torch.float64).to(CUDA)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recorded = decoded(model, sampling, 200)
        assert len(recordings) == 2
        with monkeypatch.context() as without:
            without.setattr(decoding, "recorder", lambda *_: None)
            assert decoded(model, sampling, 200) == recorded
        recordings.clear()
        with torch.no_grad():
            model.h[1].mlp.c_fc.weight.mul_(0.5)


def begun(model):
    """A cache that holds PROMPTS, and the logits after them."""
    cache = model.new_cache([len(p) for p in PROMPTS], 155)
    with torch.no_grad():
        return cache, engine._read(model, cache, PROMPTS, CUDA)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_replayed_logits_are_near_the_plain_ones_and_no_replay_waits_for_the_card(dtype, near):
    model = random_model(SHAPE).to(CUDA, dtype)
    (plain, expected), (cache, logits) = begun(model), begun(model)
    next_logits = functools.partial(engine._next, model)
    steps = decoding.FixedSteps(next_logits, cache, logits, decoding.cuda_graphs(CUDA))
    for step in range(100):
        scale = expected.abs().max().item()
        torch.testing.assert_close(logits, expected, rtol=near, atol=near * scale)
        tokens = expected.argmax(1)
        if step == 20:
            stay = torch.tensor(plain.drop([1]), device=CUDA)
            cache.drop([1])
            tokens = tokens[stay]
        expected = next_logits(tokens, plain)
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
        try:
            logits = steps(tokens, 150 - step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert steps.replay is not None
