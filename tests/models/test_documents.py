"""Stretches that continue others: two answers read one prompt as if each stood alone with it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import in_transformers, random_model
from stretches import HEADS, WIDTH, gradients, joined, laid_out, one_by_one, variable_length_kernel
from tunesmith.errors import UserError
from tunesmith.models.attention import Documents, attend_documents, attend_rows
from tunesmith.models.gpt2 import GPTConfig

FLOAT64 = 1e-12
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=24)
ROWS = [[(5, 3, 4), (2, 1, 5)], [(6,), (1, 7, 2)], [(20,)]]  # groups: a stretch and those that continue it


def assert_equal(ours, theirs):
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=FLOAT64)


some_rows = st.lists(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, derandomize=True)
@given(rows=some_rows)
def test_attention_and_its_gradients_are_those_of_the_joined_texts_one_by_one(rows):
    lengths, parents = laid_out(rows)
    documents = Documents.from_rows(lengths, parents=parents)
    ours = gradients(lambda *z: attend_documents(*z, documents), rows)
    assert_equal(ours, gradients(lambda *z: one_by_one(*z, lengths, parents), rows))


@settings(max_examples=60, derandomize=True)
@given(rows=some_rows)
def test_what_a_kernel_is_given_describes_exactly_what_each_stretch_sees(rows):
    lengths, parents = laid_out(rows)
    documents = Documents.from_rows(lengths, parents=parents)
    ours = gradients(lambda *z: variable_length_kernel(*z, documents), rows)
    assert_equal(ours, gradients(lambda *z: attend_documents(*z, documents), rows))


@settings(max_examples=60, derandomize=True)
@given(rows=some_rows)
def test_positions_keys_and_bounds_are_those_of_the_joined_texts(rows):
    lengths, parents = laid_out(rows)
    documents = Documents.from_rows(lengths, parents=parents)
    texts, own = joined(lengths, parents)
    positions = [t for text, n in zip(texts, own, strict=True) for t in range(len(text) - n, len(text))]
    assert documents.positions.flatten().tolist() == positions
    assert documents.reach == max(map(len, texts)) <= documents.longest
    if max(parents) < 0:
        assert (documents.key_index, documents.cu_keys, documents.parents) == (None, None, ())
        return
    assert documents.key_index.tolist() == [i for text in texts for i in text]
    borders = [0]
    for text in texts:
        borders.append(borders[-1] + len(text))
    stretches = len(texts)
    assert documents.cu_keys[: stretches + 1].tolist() == borders
    for cu in (documents.cu_seqlens, documents.cu_keys):
        assert cu.dtype == torch.int32
        assert len(cu) == len(documents.cu_seqlens)
        assert set(cu[stretches:].tolist()) == {int(cu[stretches])}, "the tail is stretches of no tokens"


def test_the_number_of_borders_takes_few_values():
    """Else code that is compiled for a shape would be compiled for every batch."""
    sizes = {len(Documents.from_rows([[1] * n], parents=[-1, *[0] * (n - 1)]).cu_keys) for n in range(2, 200)}
    assert len(sizes) <= 8


# ---- in the model ----------------------------------------------------------------------------------------------------


def packed(rows=ROWS, seed=3):
    lengths, parents = laid_out(rows)
    shape = (len(lengths), sum(lengths[0]))
    ids = torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return ids, Documents.from_rows(lengths, parents=parents), *joined(lengths, parents)


def test_logits_are_transformers_own_for_each_prompt_with_each_answer():
    ours = random_model(TINY, dtype=torch.float64)
    theirs = in_transformers(ours)
    ids, documents, texts, own = packed()
    logits = ours.lm_head(ours(ids, documents)).flatten(0, 1)
    for text, n in zip(texts, own, strict=True):
        alone = theirs(input_ids=ids.flatten()[text][None]).logits[0]
        torch.testing.assert_close(logits[text[-n:]], alone[-n:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("chosen", [True, False])
def test_one_answer_never_moves_the_other_nor_the_prompt(chosen):
    model = random_model(TINY)
    documents = Documents.from_rows([[5, 7, 8]], parents=[-1, 0, 0])
    before = torch.arange(20)[None]
    changed = slice(5, 12) if chosen else slice(12, 20)
    after = before.clone()
    after[0, changed] += 30
    states, moved = model(before, documents)[0], model(after, documents)[0]
    rest = [i for i in range(20) if not changed.start <= i < changed.stop]
    assert torch.equal(states[rest], moved[rest])
    assert (states[changed] != moved[changed]).any(1).all()


def test_a_loss_on_one_answer_gives_the_other_and_the_neighbours_no_gradient():
    model = random_model(dataclasses.replace(TINY, tied_head=False))
    documents = Documents.from_rows([[4, 3, 5, 2, 6, 4]], parents=[-1, 0, 0, -1, 3, 3])
    model(torch.arange(24)[None], documents)[0, 7:12].sum().backward()
    touched = set(torch.nonzero(model.wte.weight.grad.abs().sum(1))[:, 0].tolist())
    assert touched == {*range(4), *range(7, 12)}


def test_neighbours_in_the_row_change_nothing_at_all():
    model = random_model(TINY)
    before, documents, texts, own = packed(seed=3)
    other = packed(seed=4)[0]
    for text, n in zip(texts, own, strict=True):
        after = other.clone()
        after.view(-1)[text] = before.view(-1)[text]
        states, moved = (model(ids, documents).flatten(0, 1)[text[-n:]] for ids in (before, after))
        assert torch.equal(states, moved)


def test_a_pair_beyond_the_models_positions_is_a_users_error_with_both_numbers():
    """Every stretch fits, and so does the row's width or not: what counts is the longest prompt with an answer."""
    model = random_model(TINY)
    fits = Documents.from_rows([[20, 4, 2, 10]], parents=[-1, 0, 0, -1])
    assert model(torch.zeros(1, 36, dtype=torch.int64), fits).shape == (1, 36, 32)
    with pytest.raises(UserError, match=r"25 tokens.*24"):
        model(torch.zeros(1, 26, dtype=torch.int64), Documents.from_rows([[20, 5, 1]], parents=[-1, 0, 0]))


def test_attention_dropout_acts_on_continuing_stretches_too():
    lengths, parents = laid_out(ROWS)
    documents = Documents.from_rows(lengths, parents=parents)
    q, k, v = (torch.randn(3, 20, HEADS, WIDTH) for _ in range(3))
    plain, dropped = attend_documents(q, k, v, documents), attend_documents(q, k, v, documents, 0.5)
    assert (plain[0, 5:12] != dropped[0, 5:12]).any(2).any(1).all()


def test_moving_documents_moves_every_tensor_and_nothing_else():
    for documents in (packed()[1], Documents.from_rows([[3, 2]])):
        moved = documents.moved(lambda t: t.to("meta"))
        for name, value in vars(documents).items():
            if isinstance(value, torch.Tensor):
                assert getattr(moved, name).device.type == "meta", name
                assert value.device.type == "cpu"
            else:
                assert getattr(moved, name) == value


@pytest.mark.parametrize(
    ("rows", "parents"),
    [
        ([[2, 3, 1]], [-1, 0, 1]),
        ([[2, 3], [4, 1]], [-1, 0, 0, 2]),
        ([[2, 3]], [1, -1]),
        ([[2, 3]], [-1, 1]),
    ],
    ids=["of its own parent", "in another row", "still to come", "itself"],
)
def test_a_parent_that_would_be_read_wrongly_is_refused(rows, parents):
    """Only an earlier stretch of the same row that continues none itself is seen as its docstring says."""
    with pytest.raises(ValueError, match="parent"):
        Documents.from_rows(rows, parents=parents)


@pytest.mark.parametrize("parents", [[-1, 0], [-1, 0, 0, 0]], ids=["too few", "too many"])
def test_parents_must_be_given_for_every_stretch(parents):
    with pytest.raises(ValueError):  # noqa: PT011 (whoever notices first)
        Documents.from_rows([[2, 3, 1]], parents=parents)


@pytest.mark.parametrize("shared", [2, 4])
@pytest.mark.parametrize("parents", [(), (-1, 0, 0, -1, -1)], ids=["texts", "answers"])
def test_heads_that_share_keys_attend_as_if_each_had_a_copy(parents, shared):
    documents = Documents.from_rows([[9, 6, 5], [12, 8]], parents=parents)
    q, few_k, few_v = (
        torch.randn(2, 20, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 4 // shared, 4 // shared)
    )
    k, v = (z.repeat_interleave(shared, 2) for z in (few_k, few_v))
    weight = torch.randn(2, 20, 4, 8, dtype=torch.float64)
    for attend in (lambda *z: attend_documents(*z, documents), attend_rows):
        ours, right = attend(q, few_k, few_v), attend(q, k, v)
        assert_equal([ours], [right])
        grads = [torch.autograd.grad(y, (q, few_k, few_v), weight, retain_graph=True) for y in (ours, right)]
        assert_equal(*grads)
