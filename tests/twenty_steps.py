"""Twenty steps of a small model on packed rows, in any of the memory modes: what two trainings are compared by."""

import torch

from reference import pack_batch, random_model
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.lora import apply_lora
from tunesmith.train.optim import OneByOne, build_optimizer, set_learning_rate
from tunesmith.train.step import optimizer_step
from tunesmith.train.token_loss import nll_sum
from tunesmith.train.trainee import store_in_bf16

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=128, block_size=32)
STEPS = 20
PLAIN = ("adamw", "adam", "sgd", "sgd-momentum", "sgd-nesterov")


def batches():
    """20 packed batches of 2 x 32 tokens in three documents, loss on two thirds of them; the texts can be learnt."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        starts = torch.randint(0, 128, (3,), generator=generator).tolist()
        a, b, c = ([(s + 3 * i) % 128 for i in range(n)] for s, n in zip(starts, (12, 20, 32), strict=True))
        yield pack_batch([[a, b], [c]], lambda document, t: t % 3 < 2)


def train(
    *, checkpointing=False, in_backward=False, bf16=False, lora=None, name="adamw", precision="fp32", dropout=0.0, max_norm=0.0,
    prepare=lambda model: None, seen_by=lambda optimizer: None,
):  # fmt: skip
    """20 steps from the same weights: the model, and what each step saw."""
    torch.manual_seed(11)
    model = random_model(GPTConfig(**{**vars(SHAPE), "dropout": dropout}))
    prepare(model)
    if lora:
        apply_lora(model, lora, rank=3, alpha=6, seed=1)
    if bf16:
        store_in_bf16(model)
    model.train().activation_checkpointing = checkpointing
    optimizer = build_optimizer(model, name, lr=0.0)
    if in_backward or bf16:
        optimizer = OneByOne(optimizer, in_backward=in_backward)
    seen = []
    for number, batch in enumerate(batches()):
        set_learning_rate(optimizer, 1e-2 / (1 + number))
        seen.append(
            optimizer_step(model, [batch], lambda b: nll_sum(model, b, precision), optimizer, max_norm=max_norm)
        )
    seen_by(optimizer)
    return model, seen


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(one, other):
    for name, p in weights(one).items():
        assert torch.equal(p, weights(other)[name]), name


def losses(seen):
    return [s.loss for s in seen]
