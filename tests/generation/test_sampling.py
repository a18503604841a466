"""Sampling against numpy: which tokens are kept, and at what probabilities."""

import numpy as np
import pytest
import torch

from reference import kept_tokens
from tunesmith.generation.sampling import Sampling, sample_tokens, stream_of

GRID = 4000


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize(
    ("top_k", "vocabulary", "spread"), [(0, 40, 2), (1, 40, 2), (7, 40, 2), (99, 40, 1), (0, 700, 0.5), (300, 700, 1)]
)
def test_top_k_and_top_p_keep_exactly_the_right_tokens_at_the_right_probabilities(top_k, vocabulary, spread, top_p):
    """Every token gets its share of the numbers in [0, 1), and a token that is not kept gets none."""
    rng = np.random.default_rng(0)
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    for temperature in (0.5, 1.0, 1.7):
        logits = spread * rng.normal(size=vocabulary)
        expected = kept_tokens(logits, temperature, top_k, top_p)
        tokens = sample_tokens(
            torch.from_numpy(logits).expand(GRID, -1), uniform, Sampling(temperature, top_p, top_k)
        ).tolist()
        assert set(tokens) <= set(expected)
        for token in range(vocabulary):
            assert tokens.count(token) / GRID == pytest.approx(expected.get(token, 0.0), abs=1.5 / GRID)


def test_greedy_takes_the_most_likely_token_of_each_row():
    logits = torch.randn(20, 50)
    assert torch.equal(
        sample_tokens(logits, torch.rand(20, dtype=torch.float64), Sampling(temperature=0)), logits.argmax(1)
    )


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_give_tokens_that_have_mass(u):
    logits = torch.tensor([[-1e9, 2.0, 1.0, 0.0, -1e9]])
    for sampling in (Sampling(1.0, 1.0), Sampling(1.0, 0.95), Sampling(1.0, 1.0, 4)):
        assert sample_tokens(logits, torch.tensor([u], dtype=torch.float64), sampling).item() in (1, 2, 3)


def test_a_flat_row_beside_a_peaked_one_and_wider_than_all_first_looks_gets_its_own_nucleus():
    rng, grid = np.random.default_rng(0), 500
    flat, peaked = 0.1 * rng.normal(size=6000), 3 * rng.normal(size=6000)
    peaked[17] += 12
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    logits = torch.from_numpy(np.stack([flat, peaked])).repeat(grid, 1)
    tokens = sample_tokens(logits, uniform.repeat_interleave(2), Sampling(1.0, 0.9)).view(grid, 2)
    for row, column in ((flat, tokens[:, 0]), (peaked, tokens[:, 1])):
        kept = kept_tokens(row, 1.0, 0, 0.9)
        edges = np.cumsum(list(kept.values()))
        assert column.tolist() == [list(kept)[i] for i in np.searchsorted(edges, uniform.numpy(), side="right")]


def test_a_stream_is_made_of_the_seed_the_prompts_tokens_and_the_number_of_the_answer():
    """As the help of `generate.seed` says: the place of a prompt among others is nothing to it."""
    stream = stream_of(Sampling(seed=1), 0, [5, 6, 7], 4).tolist()
    assert stream_of(Sampling(seed=1), 0, (5, 6, 7), 4).tolist() == stream
    others = [
        stream_of(Sampling(seed=s), n, tokens, 4).tolist()
        for s, n, tokens in ((2, 0, [5, 6, 7]), (1, 1, [5, 6, 7]), (1, 0, [5, 6]))
    ]
    assert all(set(other).isdisjoint(stream) for other in others)
