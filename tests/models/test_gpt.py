"""GPT-2 against transformers' GPT2LMHeadModel, and the laws of packing."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from reference import in_transformers, oriented, random_model
from tunesmith.data.encoding import IGNORE_INDEX
from tunesmith.errors import UserError
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT, GPTConfig
from tunesmith.models.head import head_nll_sum
from tunesmith.models.known import SIZES
from tunesmith.train.optim import build_optimizer
from tunesmith.train.step import optimizer_step

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=24)
SHAPES = {
    "tied": TINY,
    "deeper": replace(TINY, n_layer=3, n_head=3, n_embd=48, n_inner=80),
    "untied": replace(TINY, tied_head=False, layer_norm_epsilon=1e-3),
}


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def labelled_batch(seed: int, rows: int = 3, width: int = 17):
    """Ids, and labels as transformers wants them (not shifted), a third of them ignored, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (rows, width), generator=generator)
    ignored = torch.rand(rows, width, generator=generator) < torch.linspace(0, 0.7, rows)[:, None]
    return ids, ids.masked_fill(ignored, IGNORE_INDEX)


@dataclass(frozen=True)
class Labelled:
    """A micro-batch for `optimizer_step`: targets shifted by hand."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self):
        return torch.cat([self.labels[:, 1:], torch.full((len(self.labels), 1), IGNORE_INDEX)], 1).flatten()

    @property
    def count(self):
        return int((self.targets != IGNORE_INDEX).sum())

    def nll_sum(self, model):
        rows = torch.nonzero(self.targets != IGNORE_INDEX)[:, 0]
        return head_nll_sum(model(self.ids, rows=rows), model.lm_head.weight, self.targets[rows])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_equal_transformers(shape, attention, dtype):
    ours = random_model(SHAPES[shape], dtype=dtype)
    theirs = in_transformers(ours, attention)
    ids, labels = labelled_batch(1)
    batch, tolerance = Labelled(ids, labels), TOLERANCE[dtype]

    logits = theirs(input_ids=ids).logits
    close(ours.lm_head(ours(ids)), logits, tolerance)

    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    our_loss = batch.nll_sum(ours) / batch.count
    close(our_loss, their_loss, tolerance)
    close(our_loss.float(), theirs(input_ids=ids, labels=labels).loss.float(), TOLERANCE[torch.float32])

    their_loss.backward()
    our_loss.backward()
    ours_by_name = dict(ours.named_parameters())
    compared = 0
    for name, p in theirs.named_parameters():
        close(oriented(name, ours_by_name[name.removeprefix("transformer.")].grad), p.grad, tolerance)
        compared += p.numel()
    assert compared == ours.parameter_count()


def test_ten_adamw_losses_equal_a_plain_loop_over_transformers():
    ours = random_model(TINY)
    theirs = in_transformers(ours)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer = build_optimizer(ours, "adamw", lr=1e-3, weight_decay=0.0)
    our_losses, their_losses = [], []
    for step in range(10):
        ids, labels = labelled_batch(step % 3)
        loss = theirs(input_ids=ids, labels=labels).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        their_losses.append(loss.item())
        stats = optimizer_step(ours, [Labelled(ids, labels)], lambda batch: batch.nll_sum(ours), optimizer)
        our_losses.append(stats.loss)
    assert our_losses == pytest.approx(their_losses, rel=0, abs=1e-5)
    assert their_losses[9] < their_losses[0] - 0.1  # the ten steps did move the weights


PACKING = [[5, 3, 9, 7], [24], [1, 22, 1]]  # lengths of the documents in each of three rows


def packed_ids(seed: int = 3) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (3, 24), generator=torch.Generator().manual_seed(seed))


def places():
    """(row, start, stop) of every document of PACKING."""
    for row, lengths in enumerate(PACKING):
        start = 0
        for n in lengths:
            yield row, start, start + n
            start += n


def test_packed_rows_equal_their_documents_one_by_one_forward_and_backward():
    packed, single = random_model(TINY, dtype=torch.float64), random_model(TINY, dtype=torch.float64)
    ids, documents = packed_ids(), Documents.from_rows(PACKING)
    weight = torch.randn(3, 24, 32, dtype=torch.float64)
    hidden = packed(ids, documents)
    (hidden * weight).sum().backward()
    for row, a, b in places():
        alone = single(ids[row : row + 1, a:b])
        torch.testing.assert_close(hidden[row, a:b], alone[0], rtol=0, atol=1e-10)
        (alone[0] * weight[row, a:b]).sum().backward()
    for (name, p), q in zip(packed.named_parameters(), single.parameters(), strict=True):
        if name != "lm_head.weight":
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_neighbours_in_a_packed_row_do_not_change_a_documents_states_at_all():
    model, documents = random_model(TINY), Documents.from_rows(PACKING)
    before, other = packed_ids(3), packed_ids(4)
    for row, a, b in places():
        after = other.clone()
        after[row, a:b] = before[row, a:b]
        assert torch.equal(model(before, documents)[row, a:b], model(after, documents)[row, a:b])


def test_a_loss_on_one_document_gives_its_neighbours_no_gradient():
    model = random_model(replace(TINY, tied_head=False))
    ids = torch.arange(24)[None]  # every token occurs once
    model(ids, Documents.from_rows([[5, 3, 9, 7]]))[0, 8:17].sum().backward()
    touched = set(torch.nonzero(model.wte.weight.grad.abs().sum(1))[:, 0].tolist())
    assert touched == set(range(8, 17))


def test_document_numbers_say_the_same_as_a_documents_object():
    model = random_model(TINY)
    numbers = torch.tensor([[7] * 5 + [2] * 3 + [7] * 9 + [0] * 7, [0] * 24, [0] + [5] * 22 + [0]])
    asked, made = Documents.from_ids(numbers), Documents.from_rows(PACKING)
    assert asked.lengths == made.lengths
    assert torch.equal(asked.positions, made.positions)
    assert torch.equal(asked.cu_seqlens, made.cu_seqlens)
    assert torch.equal(model(packed_ids(), numbers), model(packed_ids(), made))


def test_boundaries_for_kernels_are_the_documents_followed_by_the_end():
    documents = Documents.from_rows(PACKING)
    assert documents.cu_seqlens[:9].tolist() == [0, 5, 8, 17, 24, 48, 49, 71, 72]
    assert set(documents.cu_seqlens[9:].tolist()) <= {72}
    assert documents.longest >= 24


def test_rows_of_unequal_width_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        Documents.from_rows([[3, 2], [4]])


@pytest.mark.parametrize("documents", [None, Documents.from_rows(PACKING)], ids=["rows", "packed"])
def test_asking_for_rows_equals_selecting_them_afterwards(documents):
    a, b = random_model(TINY, dtype=torch.float64), random_model(TINY, dtype=torch.float64)
    rows = torch.tensor([70, 3, 4, 24, 55, 0])
    weight = torch.randn(6, 32, dtype=torch.float64)
    early, late = a(packed_ids(), documents, rows=rows), b(packed_ids(), documents).flatten(0, 1)[rows]
    torch.testing.assert_close(early, late, rtol=0, atol=1e-12)
    (early * weight).sum().backward()
    (late * weight).sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_recomputes_the_blocks_and_gives_equal_gradients(dropout):
    gradients, passes = [], []
    for on in (False, True):
        model = random_model(replace(TINY, dropout=dropout)).train()
        model.activation_checkpointing = on
        calls = []
        for block in model.h:
            block.ln_1.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        torch.manual_seed(5)
        model(packed_ids(), Documents.from_rows(PACKING), rows=torch.tensor([1, 5, 60])).square().sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if name != "lm_head.weight"])
        passes.append(len(calls))
    assert passes == [2, 4]
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


@pytest.mark.parametrize("documents", [None, Documents.from_rows(PACKING)], ids=["rows", "packed"])
def test_dropout_acts_in_training_only(documents):
    model, plain = random_model(replace(TINY, dropout=0.2)), random_model(TINY)
    ids = packed_ids()
    assert torch.equal(model(ids, documents), plain(ids, documents))
    model.train()
    plain.train()
    assert not torch.equal(model(ids, documents), model(ids, documents))
    assert torch.equal(plain(ids, documents), plain(ids, documents))


@pytest.mark.parametrize("documents", [None, Documents.from_rows(PACKING)], ids=["rows", "packed"])
def test_dropout_acts_on_the_attention_weights_too(documents, monkeypatch):
    model = random_model(replace(TINY, dropout=0.2)).train()
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)  # all but the attention's own
    assert not torch.equal(model(packed_ids(), documents), model(packed_ids(), documents))


@pytest.mark.parametrize(
    ("name", "tied", "count"),
    [
        ("gpt2", True, 124_439_808),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
        ("gpt2", False, 163_037_184),
        ("gpt2-medium", False, 406_286_336),
    ],
)
def test_parameter_counts_of_the_published_sizes(name, tied, count):
    with torch.device("meta"):
        assert GPT(replace(SIZES[name], tied_head=tied)).parameter_count() == count


@pytest.mark.parametrize("documents", [None, Documents.from_rows([[25]]), torch.zeros(1, 25, dtype=torch.int64)])
def test_a_document_longer_than_the_positions_is_a_users_error_with_both_numbers(documents):
    with pytest.raises(UserError, match=r"25 tokens.*24"):
        random_model(TINY)(torch.zeros(1, 25, dtype=torch.int64), documents)


def test_a_packed_row_may_be_longer_than_the_positions():
    model, ids = random_model(TINY), torch.arange(48)[None] % 61
    hidden = model(ids, Documents.from_rows([[24, 24]]))
    torch.testing.assert_close(hidden[0, 24:], model(ids[:, 24:])[0], rtol=1e-5, atol=1e-5)


def test_every_impossible_shape_is_named_at_once():
    with pytest.raises(UserError) as caught:
        GPTConfig(n_layer=0, n_head=5, n_embd=32, dropout=1.0)
    assert all(part in str(caught.value) for part in ("n_layer = 0", "n_head = 5", "dropout = 1.0"))


def test_new_weights_have_gpt2s_scales_and_depend_on_the_seed_only():
    a, b, c = (GPT(replace(TINY, n_embd=64, n_layer=8)) for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        model.init_weights(torch.Generator().manual_seed(seed))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    for name, p in a.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "ln_" in name:
            assert bool((p == 1).all())
        else:  # Radford et al. 2019, section 2.3: residual projections scaled by 1 / sqrt(number of residual layers)
            assert p.std().item() == pytest.approx(0.02 / 4 if "c_proj" in name else 0.02, rel=0.1), name


@pytest.mark.parametrize("head_used", [True, False])
def test_a_tied_embeddings_gradient_added_into_the_heads_is_that_of_two_matrices(head_used):
    """Against autograd's own sum of both; tokens that come several times, two micro-batches, and a loss without the head."""
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    models = [GPT(shape).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for tokens in torch.tensor([[[1, 1, 4, 1, 10, 0, 3]], [[2, 1, 0, 0, 9, 9, 9]]]):
        targets, rows = torch.tensor([3, 1, 1]), torch.tensor([1, 4, 6])
        hidden, weight = models[0].states_and_head(tokens, rows=rows)
        plain = models[1](tokens, rows=rows)
        for states, head in ((hidden, weight), (plain, models[1].lm_head.weight)):
            loss = head_nll_sum(states, head, targets, chunk=2) if head_used else states.square().sum()
            loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}")
    assert models[0].wte.weight.grad[2].abs().sum() > 0  # looked up in the second batch only


def test_without_gradients_or_a_tied_head_the_loss_takes_the_heads_own_weight():
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    tokens = torch.tensor([[1, 2]])
    tied, apart = GPT(shape), GPT(replace(shape, tied_head=False))
    with torch.no_grad():
        assert tied.states_and_head(tokens)[1] is None
    assert apart.states_and_head(tokens)[1] is None
    assert torch.equal(tied.states_and_head(tokens)[0], tied(tokens))


def test_with_several_threads_a_tied_embeddings_gradient_is_the_same_at_every_run():
    """Threads that add to one row in the order in which they come round differently each time: no run could be repeated."""
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=50, block_size=1024)
    model, tokens = GPT(shape), torch.randint(50, (4, 1024), generator=torch.Generator().manual_seed(0))
    model.init_weights(torch.Generator().manual_seed(0))

    def gradient():
        model.zero_grad()
        states, head = model.states_and_head(tokens)
        (states @ head.t()).square().mean().backward()
        return model.wte.weight.grad.clone()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(30))
    finally:
        torch.set_num_threads(threads)
