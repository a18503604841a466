"""Attention to the last tokens only: packed, behind a prompt that answers share, token by token and recorded."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

from stretches import HEADS, WIDTH, gradients, laid_out, one_by_one
from taped import Tape
from tunesmith.generation import engine, token_graph
from tunesmith.models import attention as module
from tunesmith.models.attention import Documents, attend_documents
from tunesmith.models.gemma3 import FULL, SLIDING, Gemma3, Gemma3Config
from tunesmith.models.gpt2 import GPT, GPTConfig

FLOAT64 = 1e-12
some_rows = st.lists(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3),
    min_size=1,
    max_size=2,
)


def scores_of(q, k, window):
    """Of the queries (n, H, D) that end a text of the keys (m, H, D): (H, n, m), -inf where a token does not see."""
    at, key = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    seen = (key <= at) & (key > at - window)
    return (torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5).masked_fill(~seen, -torch.inf)


def kernel(q, k, v, cu, cu_keys, longest, longest_keys, *, window_size):
    """What `varlen_attn` says of its arguments, in plain torch: tokens before and after, counted from the last key."""
    before, after = window_size
    assert after == 0
    assert max(cu.diff().max(), cu_keys.diff().max()) <= min(longest, longest_keys)
    parts = []
    for a, b, c, d in zip(cu[:-1], cu[1:], cu_keys[:-1], cu_keys[1:], strict=True):
        weights = scores_of(q[a:b], k[c:d], before + 1 if before >= 0 else len(k)).softmax(2)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(parts)


def assert_equal(ours, theirs):
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("path", ["stretches", "varlen"])
@settings(max_examples=60, derandomize=True)
@given(rows=some_rows, window=st.integers(1, 12), together=st.integers(1, 5))
def test_every_token_sees_the_last_ones_of_its_own_text(path, rows, window, together):
    lengths, parents = laid_out(rows)
    documents = Documents.from_rows(lengths, parents=parents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_ROWS", together)
        patch.setattr(module, "attention_path", lambda *_: path)
        patch.setattr(varlen, "varlen_attn", kernel)
        ours = gradients(lambda *z: attend_documents(*z, documents, window=window), rows)
    assert_equal(ours, gradients(lambda *z: one_by_one(*z, lengths, parents, window), rows))


def test_a_window_that_no_text_reaches_costs_nothing(monkeypatch):
    attend, calls = F.scaled_dot_product_attention, []

    def spied(q, k, v, mask=None, *rest, **more):
        calls.append((q.shape, k.shape, None if mask is None else mask.shape))
        return attend(q, k, v, mask, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    documents = Documents.from_rows([[6, 3, 4, 2]], parents=[-1, 0, 0, -1])
    q, k, v = torch.randn(3, 1, 15, HEADS, WIDTH)
    plain = attend_documents(q, k, v, documents)
    without, calls[:] = list(calls), []
    assert torch.equal(attend_documents(q, k, v, documents, window=10), plain)
    assert calls == without
    assert not torch.equal(attend_documents(q, k, v, documents, window=9), plain)


def test_a_long_text_costs_what_its_windows_do_and_its_masks_are_shared(monkeypatch):
    attend, read, masks = F.scaled_dot_product_attention, [], set()

    def spied(q, k, v, mask=None, *rest, **more):
        read.append(q.shape[2] * k.shape[2])
        masks.add(None if mask is None else mask.data_ptr())
        return attend(q, k, v, mask, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    n, window = 4096, 128
    documents = Documents.from_rows([[n]])
    for z in torch.randn(2, 3, 1, n, 1, 8):
        attend_documents(*z, documents, window=window)
    assert sum(read) / 2 < n * (window + module.WINDOW_ROWS)
    assert len(masks) == 3, "none, and one for whole parts and for the last"


# ---- token by token ----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16], [17, 18], list(range(20, 61))]
ORDER = (SLIDING, FULL, SLIDING)
SHAPE = Gemma3Config(80, 32, 24, 3, 4, 2, 8, max_position_embeddings=128, sliding_window=11, layer_types=ORDER)


def random_gemma(shape=SHAPE, dtype=torch.float64):
    model = Gemma3(shape).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def begun(model):
    cache = model.new_cache([len(p) for p in PROMPTS], 64)
    for held in (*cache.keys, *cache.values):
        held[:, :, cache.end :] = float("nan")
    with torch.no_grad():
        return cache, engine._read(model, cache, PROMPTS, torch.device("cpu"))


def recorder(work):
    work()
    tape = Tape()
    return tape.record(work)


@pytest.mark.parametrize("window", [1, 11, 40])
@pytest.mark.parametrize("steps", ["plain", "recorded"])
def test_every_step_is_what_reading_everything_anew_gives(steps, window, monkeypatch):
    """Windows that all, some and no prompts reach; sequences leave on the way, the longest among them."""
    monkeypatch.setattr(token_graph, "COLUMNS", 16)
    model = random_gemma(Gemma3Config(**{**vars(SHAPE), "sliding_window": window}))
    cache, logits = begun(model)

    def next_logits(tokens, held):
        return engine._next(model, tokens, held)

    taken = token_graph.FixedSteps(next_logits, cache, logits, recorder) if steps == "recorded" else None
    rows, leaving = list(range(len(PROMPTS))), {3: [1], 20: [3], 40: [0]}
    texts, given_by = [list(p) for p in PROMPTS], [[] for _ in PROMPTS]
    for step in range(60):
        for row, made, token in zip(rows, logits.clone(), logits.argmax(1).tolist(), strict=True):
            given_by[row].append(made)
            texts[row].append(token)
        tokens = logits.argmax(1)
        if step in leaving:
            stay = cache.drop(leaving[step])
            tokens, rows = tokens[stay], [rows[i] for i in stay]
        logits = taken(tokens, 60 - step) if taken else next_logits(tokens, cache)
    for text, made in zip(texts, given_by, strict=True):
        with torch.no_grad():
            anew = model.lm_head(model(torch.tensor([text])))[0]
        torch.testing.assert_close(torch.stack(made), anew[-len(made) - 1 : -1], rtol=0, atol=1e-11)
    assert [len(made) for made in given_by] == [41, 4, 60, 21, 60]
    assert taken is None or taken.replay is not None


def test_masks_under_a_window_lie_where_the_memory_efficient_kernel_reads_them(monkeypatch):
    attend, begins = F.scaled_dot_product_attention, set()

    def spied(q, k, v, attn_mask=None, *rest, **more):
        if attn_mask is not None:
            assert attn_mask.shape == (len(q), 1, 1, k.shape[2])
            assert [z.data_ptr() % 16 for z in (attn_mask, k, v)] == [0, 0, 0]
            assert [stride % 16 for stride in attn_mask.stride()[:-1]] == [0, 0, 0]
            begins.add(attn_mask.storage_offset())
        return attend(q, k, v, attn_mask, *rest, **more)

    model = random_gemma(dtype=torch.float32)
    cache, logits = begun(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    for _ in range(30):
        logits = engine._next(model, logits.argmax(1), cache)
    assert begins == {0, 16, 32}


def test_what_is_far_behind_changes_nothing_and_what_is_near_does():
    shape = Gemma3Config(**{**vars(SHAPE), "layer_types": (SLIDING,) * 3})
    model, ids = random_gemma(shape), torch.arange(60)[None]
    after = ids.clone()
    after[0, 5] = 70
    reach = 5 + 3 * (shape.sliding_window - 1)  # each layer carries a token's influence so far
    for documents in (None, Documents.from_rows([[60]])):
        moved = (model(ids, documents) != model(after, documents)).any(2)[0]
        assert moved.tolist() == [5 <= t <= reach for t in range(60)]


def test_rows_that_are_longer_than_the_window_are_windowed_in_every_model_that_has_one():
    model = random_gemma()
    for n in (SHAPE.sliding_window, SHAPE.sliding_window + 1, 30):
        ids = torch.randint(80, (2, n))
        torch.testing.assert_close(model(ids), model(ids, Documents.from_rows([[n], [n]])), rtol=0, atol=1e-12)
    assert GPT(GPTConfig(1, 1, 8, 11, 16)).window is None
