"""Packed pairs that share their prompts against plain sequences one by one: losses, log-probabilities, gradients, metrics."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from made_pairs import END, batches_of, random_pairs
from reference import random_model
from tensors_made import largest
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.head import sequence_loss_sum
from tunesmith.models.lora import apply_lora, lora_layers
from tunesmith.train import pair_loss
from tunesmith.train.optim import build_optimizer
from tunesmith.train.pair_loss import PreferenceLoss, answer_logps, dpo_loss_sum, estimate_dpo
from tunesmith.train.step import optimizer_step

FLOAT64 = 1e-10
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=61, block_size=32)
PAIRS = random_pairs([(5, 3, 9), (1, 1, 1), (12, 20, 4), (7, 2, 2), (3, 6, 25), (9, 8, 1), (2, 14, 13)], 2, 60)
KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.2)]
SETTINGS = [PreferenceLoss(0.7, loss, smoothing) for loss, smoothing in KINDS]


def model_of(seed=1, lora=False, shape=SHAPE):
    model = random_model(shape, seed=seed, dtype=torch.float64)
    if lora:
        apply_lora(model, "all-linear,lm_head", rank=2, alpha=4.0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64))
    return model


def plain_logp(model, prompt, answer):
    """log p(answer and its end | prompt): one sequence, full logits."""
    logps = model.lm_head(model(torch.tensor([prompt + answer])))[0].log_softmax(1)
    wanted = torch.tensor([*answer, END])
    return logps[len(prompt) - 1 :].gather(1, wanted[:, None]).sum()


def plain_logps(model, pairs):
    return torch.stack([torch.stack([plain_logp(model, p, answer) for answer in (c, r)]) for p, c, r in pairs])


def plain_loss(policy, reference, settings):
    """Losses of pairs by torch's plain functions; both arguments (pairs, 2)."""
    margin = (policy - reference) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    beta, s = settings.beta, settings.label_smoothing
    kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return {
        "sigmoid": (1 - s) * kept + s * flipped,
        "ipo": (margin - 0.5 / beta) ** 2,
        "hinge": (1 - beta * margin).clamp(min=0),
        "robust": ((1 - s) * kept - s * flipped) / (1 - 2 * s),
    }[settings.loss]


with torch.no_grad():
    HELD = plain_logps(model_of(seed=2), PAIRS)  # the reference's


def packed(steady=False, batching="packed"):
    return batches_of(PAIRS, block_size=32, batch_size=2, steady=steady, batching=batching)


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("steady", [False, True], ids=["exact", "filled"])
@pytest.mark.parametrize("chunk", [1, 9, 1000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_pairs_give_the_loss_and_all_gradients_of_plain_sequences(monkeypatch, settings, chunk, steady, lora):
    """Chunks of logits smaller than an answer, smaller than a pair, and larger than all; in float64."""
    monkeypatch.setattr(pair_loss, "head_chunk", lambda precision: chunk)
    ours, plain = model_of(lora=lora), model_of(lora=lora)
    sums = dpo_loss_sum(ours, packed(steady).rows.assemble(range(len(PAIRS))), HELD, settings)
    sums[0].backward()
    policy = plain_logps(plain, PAIRS)
    expected = plain_loss(policy, HELD, settings)
    expected.sum().backward()
    rewards = settings.beta * (policy.detach() - HELD)
    chosen, rejected = rewards.unbind(1)
    observed = [(chosen > rejected).double(), chosen - rejected, chosen, rejected]
    torch.testing.assert_close(
        sums.detach(), torch.stack([expected.detach().sum(), *(t.sum() for t in observed)]), rtol=FLOAT64, atol=FLOAT64
    )
    assert 0 < int(sums[1]) < len(PAIRS), "some pairs are right and some wrong"
    right = gradients_of(plain)
    assert len(right) > 10
    for name, grad in gradients_of(ours).items():
        torch.testing.assert_close(grad, right[name], rtol=FLOAT64, atol=FLOAT64, msg=name)
        assert grad.any(), name


@pytest.mark.parametrize("chunk", [1, 9, 1000])
@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_log_probabilities_of_each_answer_are_those_of_plain_sequences(monkeypatch, chunk, steady, lora):
    monkeypatch.setattr(pair_loss, "head_chunk", lambda precision: chunk)
    model, batches = model_of(lora=lora), packed(steady)
    with torch.no_grad():
        right = plain_logps(model, PAIRS)
    for batch in batches.fixed():
        torch.testing.assert_close(answer_logps(model, batch), right[list(batch.pairs)], rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loss_of_whole_sequences_equals_autograd_through_full_logits(chunk, size):
    """Any loss of a group of sequences, here one that couples them; its examples come as the slices that they are."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4, 2, 9, 3, 3, 1, 1, 5, 2, 2, 6]
    hidden = torch.randn(sum(lengths) + 3, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 11, (len(hidden),), generator=generator)
    scale = torch.rand(len(lengths) // size, generator=generator, dtype=torch.float64)

    def losses(logps, which):
        return scale[which] * logps.logsumexp(1).square() + logps.prod(1)

    def found(compute):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, logps = compute(*inputs)
        return loss.detach(), logps.detach(), *torch.autograd.grad(3.0 * loss, inputs)

    def plain(x, w):
        each = (x @ w.t()).log_softmax(1).gather(1, targets[:, None])[: sum(lengths), 0]
        logps = torch.stack([part.sum() for part in each.split(lengths)]).view(-1, size)
        return losses(logps, slice(None)).sum(), logps

    ours = found(lambda x, w: sequence_loss_sum(x, w, targets, lengths, losses, size=size, chunk=chunk))
    for mine, right in zip(ours, found(plain), strict=True):
        torch.testing.assert_close(mine, right, rtol=FLOAT64, atol=FLOAT64)


# ---- one step ------------------------------------------------------------------------------------------------------


def step(groups, settings, batching="packed"):
    """One SGD step at rate 1 over the pairs in micro-batches: the weights move by the gradient."""
    model, batches = model_of(), packed(batching=batching)
    before = [p.detach().clone() for p in model.parameters()]
    loss_sum = lambda batch: dpo_loss_sum(model, batch, HELD[list(batch.pairs)], settings)  # noqa: E731
    optimizer = build_optimizer(model, "sgd", lr=1.0, weight_decay=0.0)
    stats = optimizer_step(model, [batches.rows.assemble(group) for group in groups], loss_sum, optimizer)
    return stats, [a - p.detach() for a, p in zip(before, model.parameters(), strict=True)]


@settings(max_examples=25, derandomize=True)
@given(order=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)), kind=st.sampled_from(SETTINGS))
def test_any_split_of_the_pairs_into_micro_batches_is_the_same_step(order, cuts, kind):
    whole, right = step([range(7)], kind)
    groups = [order[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 7])]
    stats, gradient = step(groups, kind)
    assert (stats.count, stats.loss, stats.grad_norm) == (7, pytest.approx(whole.loss), pytest.approx(whole.grad_norm))
    assert stats.observed == pytest.approx(whole.observed, rel=FLOAT64)
    for mine, expected in zip(gradient, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=FLOAT64, atol=FLOAT64)


def test_metrics_of_a_step_are_means_over_all_its_pairs():
    """Six pairs and one: the mean of the two micro-batches' means would be another number."""
    kind = SETTINGS[0]
    with torch.no_grad():
        chosen, rejected = (kind.beta * (plain_logps(model_of(), PAIRS) - HELD)).unbind(1)
    stats, _ = step([range(6), [6]], kind)
    right = [(chosen > rejected).double(), chosen - rejected, chosen, rejected]
    assert stats.observed == pytest.approx([t.mean().item() for t in right], rel=FLOAT64)
    of_means = [(t[:6].mean() + t[6]).item() / 2 for t in right]
    assert all(abs(a - b) > 1e-3 for a, b in zip(stats.observed, of_means, strict=True))


def test_estimates_are_means_over_pairs_without_dropout_and_drift_is_in_nats_an_answer():
    model, kind = model_of(shape=replace(SHAPE, dropout=0.3)).train(), SETTINGS[0]
    batches = packed(batching="padded")
    found, parts = estimate_dpo(model, batches.fixed(), lambda batch: HELD[list(batch.pairs)], kind)
    assert model.training
    with torch.no_grad():
        policy = plain_logps(model_of(), PAIRS)
    drift = policy - HELD
    chosen, rejected = (kind.beta * drift).unbind(1)
    expected = {
        "loss": plain_loss(policy, HELD, kind).mean(),
        "accuracy": (chosen > rejected).double().mean(),
        "margin": (chosen - rejected).mean(), "chosen_reward": chosen.mean(), "rejected_reward": rejected.mean(),
        "drift_chosen": drift[:, 0].mean(), "drift_rejected": drift[:, 1].mean(),
        "sft_loss": -policy[:, 0].sum() / sum(len(chosen) + 1 for _, chosen, _ in PAIRS),
    }  # fmt: skip
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=FLOAT64)
    order = [pair for batch in batches.fixed() for pair in batch.pairs]
    assert [loss for loss, _ in parts] == pytest.approx(plain_loss(policy, HELD, kind)[order].tolist(), rel=FLOAT64)
    assert {count for _, count in parts} == {1}


def test_the_full_logits_never_exist_forward_or_backward(monkeypatch):
    vocabulary, chunk, width = 3000, 16, 8
    monkeypatch.setattr(pair_loss, "head_chunk", lambda precision: chunk)
    pairs = random_pairs([(10, 40, 60)] * 12, vocabulary=vocabulary)
    batch = batches_of(pairs, block_size=128).rows.assemble(range(12))
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=width, vocab_size=vocabulary, block_size=128)
    model = model_of(shape=shape)
    held = torch.zeros(12, 2, dtype=torch.float64)
    targets = sum(batch.lengths)
    assert targets == 12 * 102

    def full(batch):
        return model.lm_head(model(batch.input_ids, batch.documents, rows=batch.rows)).log_softmax(1).sum()

    small = largest(lambda b: dpo_loss_sum(model, b, held, SETTINGS[0])[0], batch)
    assert small <= max(chunk * vocabulary, width * vocabulary, 4 * width * batch.input_ids.numel())
    assert largest(full, batch) >= targets * vocabulary
