"""Every family against transformers' own model of it, and against itself another way; the cases are in tests/families.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from families import CASES, here, in_transformers, random_ids
from made_pairs import END, batches_of, random_pairs
from reference import silent
from tensors_made import kept_by_autograd
from tunesmith.data.batch import Batch
from tunesmith.generation.engine import decode
from tunesmith.generation.sampling import Sampling
from tunesmith.models.attention import Documents
from tunesmith.models.known import FAMILIES, config_from_hf
from tunesmith.models.lora import apply_lora, find_targets, lora_layers, merge
from tunesmith.plan.memory import Work, activation_bytes, adapted_layers, predict_memory
from tunesmith.train.optim import build_optimizer
from tunesmith.train.pair_loss import PreferenceLoss, dpo_loss_sum
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum

cases = pytest.mark.parametrize("case", CASES)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
FLOAT64 = 1e-10


def logits(model, ids, documents=None):
    return model.lm_head(model(ids, documents))


def everything(ids):
    """A batch of whole rows in which every token but the last is learnt from."""
    b, t = ids.shape
    rows = torch.arange(b * t).view(b, t)[:, :-1].flatten()
    return Batch(ids, rows, ids[:, 1:].flatten(), Documents.from_rows([[t]] * b))


# ---- against transformers --------------------------------------------------------------------------------------------


@cases
def test_logits_loss_and_every_gradient_are_those_of_transformers(case):
    theirs = in_transformers(case)
    ours, ids = here(theirs).train(), random_ids(3, 40)
    torch.testing.assert_close(logits(ours, ids), theirs(ids).logits, **CLOSE)
    batch = everything(ids)
    loss, expected = nll_sum(ours, batch) / batch.count, theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    keys, right = ours.family.keys, dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = keys.turned(name, right.pop(keys.module(name)).grad)
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=2e-5 * grad.abs().max().item(), msg=name)
        assert p.grad.any(), name
    assert not right, "transformers has weights that we have not"


@cases
def test_ten_steps_of_adamw_have_the_losses_of_a_plain_loop_over_transformers_model(case):
    theirs = in_transformers(case, seed=2)
    ours = here(theirs).train()
    optimizer, plain = (
        build_optimizer(ours, "adamw", lr=3e-3, weight_decay=0.0),
        AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.0),
    )
    steps = [everything(random_ids(2, 24, seed=seed)) for seed in range(10)]
    found = [optimizer_step(ours, [b], lambda b: nll_sum(ours, b), optimizer, max_norm=0.0).loss for b in steps]
    expected = []
    for batch in steps:
        loss = theirs(batch.input_ids, labels=batch.input_ids).loss
        loss.backward()
        plain.step()
        plain.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=2e-5)


@cases
def test_greedy_answers_are_those_of_transformers_and_of_reading_everything_anew(case):
    theirs = in_transformers(case, seed=3)
    ours = here(theirs)
    prompts, answers = [random_ids(n, seed=n).tolist() for n in (4, 2, 7, 1)], [[] for _ in range(4)]
    for row, token, _ in decode(ours, silent(), prompts, Sampling(temperature=0), 12):
        answers[row].append(token)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        said = theirs.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
        assert said[0].tolist() == prompt + answer
        for token in answer:
            assert int(logits(ours, ids)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert len({tuple(answer) for answer in answers}) > 1


# ---- against itself --------------------------------------------------------------------------------------------------


@cases
def test_a_text_is_computed_packed_as_alone_and_its_answers_as_after_their_prompt(case):
    ours = here(in_transformers(case), torch.float64)
    ids = random_ids(2, 30)
    documents = Documents.from_rows([[9, 6, 15], [12, 18]], parents=[-1, 0, -1, -1, -1])
    packed = logits(ours, ids, documents)
    texts = {(0, 0, 9): ids[0, :9], (0, 9, 15): ids[0, :15], (0, 15, 30): ids[0, 15:]}
    texts |= {(1, 0, 12): ids[1, :12], (1, 12, 30): ids[1, 12:]}
    for (row, begin, end), text in texts.items():
        alone = logits(ours, text[None])[0, begin - end :]
        torch.testing.assert_close(packed[row, begin:end], alone, rtol=0, atol=FLOAT64)


@cases
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_with_shared_prompts_has_loss_and_gradients_of_plain_sequences(case, lora):
    theirs = in_transformers(case)
    shared, plain = (here(theirs, torch.float64) for _ in range(2))
    if lora:
        for model in (shared, plain):
            apply_lora(model, "all-linear", rank=2, alpha=8, seed=1)
            for i, layer in enumerate(lora_layers(model).values()):
                torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(i))
    pairs = random_pairs([(5, 3, 9), (1, 1, 1), (12, 20, 4), (3, 6, 25)], 2, 60)
    held = torch.linspace(-90, -60, 8, dtype=torch.float64).view(4, 2)
    batch = batches_of(pairs, block_size=48, batch_size=4).rows.assemble(range(len(pairs)))
    found = dpo_loss_sum(shared, batch, held, PreferenceLoss(0.1))[0]

    def logp(prompt, answer):
        logps = logits(plain, torch.tensor([prompt + answer]))[0].log_softmax(1)
        return logps[len(prompt) - 1 :].gather(1, torch.tensor([*answer, END])[:, None]).sum()

    policy = torch.stack([torch.stack([logp(p, chosen), logp(p, rejected)]) for p, chosen, rejected in pairs])
    margin = (policy - held) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    expected = -F.logsigmoid(0.1 * margin).sum()
    torch.testing.assert_close(found, expected, rtol=FLOAT64, atol=FLOAT64)
    found.backward()
    expected.backward()
    right = dict(plain.named_parameters())
    for name, p in shared.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, right[name].grad, rtol=FLOAT64, atol=FLOAT64, msg=name)


@cases
@pytest.mark.parametrize("mode", [True, "selective"])
def test_memory_modes_change_not_one_bit(case, mode):
    theirs, grads = in_transformers(case), {}
    for checkpointing in (False, mode):
        model = here(theirs).train()
        model.activation_checkpointing = checkpointing
        model(random_ids(1, 40), Documents.from_rows([[25, 15]])).square().sum().backward()
        grads[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads[False]) > 10
    for name, grad in grads[False].items():
        assert torch.equal(grad, grads[mode][name]), name


@cases
@pytest.mark.parametrize("mode", [False, "selective"])
@pytest.mark.parametrize("targets", [None, "all-linear", "late"])
def test_its_activations_are_what_autograd_keeps(case, targets, mode):
    model = here(in_transformers(case)).train()
    model.activation_checkpointing = mode
    shape, documents = model.config, Documents.from_rows([[20, 44], [64]])
    if targets == "late":
        targets = ",".join(sorted(model.family.late_layers(shape)))
    if targets:
        apply_lora(model, targets, rank=3, alpha=6)
    adapters = {"rank": 3, "targets": adapted_layers(shape, targets)} if targets else {}
    counted = Work(128, checkpointing=mode, **adapters)
    kept = kept_by_autograd(model, random_ids(2, 64), documents)
    once = [*model.for_blocks(documents.positions), *documents._masks.values()]  # for all blocks
    assert activation_bytes(shape, counted) + sum(t.nbytes for t in once) == kept
    assert predict_memory(shape, counted).parameters == 4 * sum(p.numel() for p in model.parameters())


@cases
def test_layers_and_weights_are_those_that_the_family_lists(case):
    model = here(in_transformers(case))
    shape, family = model.config, model.family
    listed, blocks = family.linear_layers(shape), family.keys.blocks
    assert find_targets(model, "all-linear") == [f"{blocks}.{i}.{name}" for i in range(shape.depth) for name in listed]
    for name, (inputs, outputs, bias) in listed.items():
        layer = model.blocks[0].get_submodule(name)
        assert (layer.in_features, layer.out_features, layer.bias is not None) == (inputs, outputs, bias)
    assert sorted(family.tensor_sizes(shape)) == sorted(p.numel() for p in model.parameters())


@cases
def test_a_shape_survives_config_json(case):
    config = here(in_transformers(case)).config
    assert config_from_hf({"model_type": config.family.name, **config.family.to_hf(config)}) == config
    assert FAMILIES[case.partition(" ")[0]] is config.family


@cases
def test_merged_adapters_compute_the_same_and_leave_a_tied_embedding_alone(case):
    model, ids = here(in_transformers(case)), random_ids(1, 20)
    apply_lora(model, "all-linear,lm_head", rank=2, alpha=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    embedding, before = model.embedding.weight.clone(), logits(model, ids)
    merge(model)
    torch.testing.assert_close(logits(model, ids), before, **CLOSE)
    assert torch.equal(model.embedding.weight, embedding)
