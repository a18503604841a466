"""The preference losses against their formulas, and against trl's own trainer on the same weights and tokens."""

import math

import numpy as np
import pytest
import torch

from made_pairs import END, batches_of, random_pairs
from reference import in_transformers, oriented, random_model
from tunesmith.data.datasets import open_dataset
from tunesmith.data.pairstore import PairStore
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.files.names import SAMPLE
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.options.training import PairDataOptions
from tunesmith.train.losses import dpo_loss
from tunesmith.train.pair_loss import PreferenceLoss, answer_logps, dpo_loss_sum

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # trl's own
FLOAT32 = 1e-5  # relative, of trl's arithmetic
KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.2)]


def formula(margin, beta, loss, smoothing):
    """The losses as their papers write them, float64 numpy."""
    sigmoid = 1 / (1 + np.exp(-beta * margin))
    return {
        "sigmoid": -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid),
        "ipo": (margin - 1 / (2 * beta)) ** 2,
        "hinge": np.maximum(0, 1 - beta * margin),
        "robust": (-(1 - smoothing) * np.log(sigmoid) + smoothing * np.log(1 - sigmoid)) / (1 - 2 * smoothing),
    }[loss]


def four(n=50, scale=10.0, seed=0):
    """Log-probabilities of n pairs: policy's chosen and rejected, reference's chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    return [-scale * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]


# ---- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("loss", "smoothing"), KINDS)
def test_losses_and_rewards_are_the_formulas(loss, smoothing, beta):
    logps = four()
    losses, chosen, rejected = dpo_loss(*logps, beta=beta, loss=loss, label_smoothing=smoothing)
    a, b, c, d = (t.numpy() for t in logps)
    margin = (a - c) - (b - d)
    np.testing.assert_allclose(losses.numpy(), formula(margin, beta, loss, smoothing), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(chosen.numpy(), beta * (a - c), rtol=1e-14)
    np.testing.assert_allclose(rejected.numpy(), beta * (b - d), rtol=1e-14)


@pytest.mark.parametrize(("loss", "smoothing"), KINDS)
def test_the_gradient_is_that_of_the_formula_and_rewards_carry_none(loss, smoothing):
    beta, step = 0.3, 1e-6
    logps = [t.requires_grad_() for t in four()]
    losses, chosen, rejected = dpo_loss(*logps, beta=beta, loss=loss, label_smoothing=smoothing)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    up, down = torch.autograd.grad(losses.sum(), logps[:2])
    margin = ((logps[0] - logps[2]) - (logps[1] - logps[3])).detach().numpy()
    assert (np.abs(1 - beta * margin) > 10 * step).all(), "the hinge's corner has no slope"
    slope = (formula(margin + step, beta, loss, smoothing) - formula(margin - step, beta, loss, smoothing)) / (2 * step)
    np.testing.assert_allclose(up.numpy(), slope, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(down.numpy(), -slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("loss", "start"), [("sigmoid", 0.693147), ("robust", 0.693147), ("ipo", 25.0), ("hinge", 1.0)])  # fmt: skip
def test_where_policy_is_reference_the_losses_are_the_known_numbers(loss, start):
    chosen, rejected, *_ = four()
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, loss=loss)
    torch.testing.assert_close(losses, torch.full_like(losses, start), rtol=0, atol=1e-6)
    assert not any(r.any() for r in rewards)


@pytest.mark.parametrize(("loss", "smoothing"), KINDS)
def test_swapping_chosen_and_rejected_negates_the_margin_and_swaps_the_rewards(loss, smoothing):
    a, b, c, d = four()
    settings = {"beta": 0.3, "loss": loss, "label_smoothing": smoothing}
    _, chosen, rejected = dpo_loss(a, b, c, d, **settings)
    swapped, *rewards = dpo_loss(b, a, d, c, **settings)
    assert torch.equal(torch.stack(rewards), torch.stack([rejected, chosen]))
    margin = (chosen - rejected).numpy() / 0.3
    np.testing.assert_allclose(swapped.numpy(), formula(-margin, 0.3, loss, smoothing), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("loss", "smoothing"), KINDS)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite_forward_and_backward(loss, smoothing, margin, dtype):
    zero = torch.zeros(1, dtype=dtype)
    policy = torch.full((1,), margin, dtype=dtype, requires_grad=True)
    losses, *_ = dpo_loss(policy, zero, zero, zero, beta=1.0, loss=loss, label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(losses.sum(), policy)
    expected = {"ipo": (margin - 0.5) ** 2, "hinge": max(0.0, 1 - margin)}.get(loss)
    if expected is None:  # -log sigmoid is 0 on one side and the margin itself on the other
        share = {"sigmoid": smoothing, "robust": -smoothing / (1 - 2 * smoothing)}[loss]
        kept = {"sigmoid": 1 - smoothing, "robust": (1 - smoothing) / (1 - 2 * smoothing)}[loss]
        expected = share * margin if margin > 0 else -kept * margin
    assert losses.item() == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(slope.item())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"beta": 0.0}, "beta is 0.0"), ({"beta": -1.0}, "beta is -1"), ({"beta": math.nan}, "beta is nan"),
        ({"beta": math.inf}, "beta is inf"),
        ({"loss": "sigmoidal"}, "unknown loss 'sigmoidal'; expected one of sigmoid, ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"), ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "0 for this loss"), ({"loss": "ipo", "label_smoothing": 0.1}, "0 for this loss"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_value_errors(changes, told):
    with pytest.raises(ValueError, match=told):
        dpo_loss(*four(), **({"beta": 0.1} | changes))


@pytest.mark.parametrize("odd", range(4))
def test_unequal_shapes_are_value_errors_and_never_broadcast(odd):
    logps = four()
    logps[odd] = logps[odd][:1]
    with pytest.raises(ValueError, match=r"differ in shape.*\(1,\)"):
        dpo_loss(*logps, beta=0.1)


# ---- trl -----------------------------------------------------------------------------------------------------------

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=61, block_size=40)
PAIRS = random_pairs([(5, 3, 9), (1, 1, 1), (12, 20, 4), (7, 2, 2), (3, 6, 25), (9, 8, 1), (2, 14, 13)], 2, 60)
EQUALLY_LONG = random_pairs([(5, 4, 4), (9, 1, 1), (2, 17, 17)], 3, 60)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """trl's own DPOTrainer around two of our models, for rows of text."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)

    def make(policy, reference, rows, settings):
        args = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False, max_length=None,
            loss_type=[settings.loss], beta=settings.beta, label_smoothing=settings.label_smoothing, disable_tqdm=True,
        )  # fmt: skip
        models = in_transformers(policy), in_transformers(reference)
        return DPOTrainer(*models, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


def through_both(trl_trainer, settings, pairs, ours):
    """Mean losses of trl and of `ours(policy, batch, reference's log-probabilities)`, and trl's metrics; all gradients compared."""
    policy, reference = random_model(SHAPE, seed=1), random_model(SHAPE, seed=2)
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}  # it cannot be made without
    trainer = trl_trainer(policy, reference, [row], settings)
    batch = [{"prompt_ids": p, "chosen_ids": [*c, END], "rejected_ids": [*r, END]} for p, c, r in pairs]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    theirs.backward()
    batch = batches_of(pairs, block_size=32).rows.assemble(range(len(pairs)))
    sums = ours(policy, batch, answer_logps(reference, batch)) / len(pairs)
    sums[0].backward()
    by_name = dict(policy.named_parameters())
    for name, p in trainer.model.named_parameters():
        mine = oriented(name, by_name[name.removeprefix("transformer.")].grad)
        torch.testing.assert_close(mine, p.grad, rtol=10 * FLOAT32, atol=FLOAT32 * p.grad.abs().max().item())
    return sums.tolist(), theirs.item(), {name: values[-1] for name, values in trainer._metrics["eval"].items()}


@pytest.mark.parametrize(("loss", "smoothing"), [k for k in KINDS if k[0] != "ipo" and k != ("sigmoid", 0.2)])
def test_loss_metrics_and_every_gradient_are_those_of_trl(trl_trainer, loss, smoothing):
    """The same weights and tokens through trl's DPOTrainer, which knows no smoothing with sigmoid."""
    kind = PreferenceLoss(0.7, loss, smoothing)
    (ours, *observed), theirs, seen = through_both(
        trl_trainer, kind, PAIRS, lambda policy, batch, held: dpo_loss_sum(policy, batch, held, kind)
    )
    assert ours == pytest.approx(theirs, rel=FLOAT32)
    names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    assert observed == pytest.approx([seen[name] for name in names], rel=FLOAT32)
    assert 0 < observed[0] < 1


def test_ipo_is_trls_but_on_sums_where_trl_takes_means_over_tokens(trl_trainer):
    """With answers of n tokens, (margin / n - 1 / 2 beta)^2 is our loss at beta / n, over n^2."""

    def ours(policy, batch, held):
        total = torch.zeros(5)
        for i, (_, chosen, _) in enumerate(EQUALLY_LONG):
            n = len(chosen) + 1
            one = batches_of(EQUALLY_LONG, block_size=32).rows.assemble([i])
            total = total + dpo_loss_sum(policy, one, held[i : i + 1], PreferenceLoss(0.7 / n, "ipo")) / n**2
        return total

    mine, theirs, _ = through_both(trl_trainer, PreferenceLoss(0.7, "ipo"), EQUALLY_LONG, ours)
    assert mine[0] == pytest.approx(theirs, rel=FLOAT32)


def test_trl_makes_the_same_tokens_of_the_same_texts(trl_trainer):
    """The sample's pairs as plain strings through trl's own tokenising."""
    tokenizer = Tokenizer.load(SAMPLE)
    store = PairStore(tokenise(open_dataset(PairDataOptions(name="sample")), "test", tokenizer, form="pairs"))
    ours = [[part.tolist() for part in store.tokens(i)] for i in range(len(store))]
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(tokenizer.decode, parts), strict=True)) for parts in ours]
    small = random_model(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=6144, block_size=8))
    trainer = trl_trainer(small, small, rows, PreferenceLoss())
    assert len(rows) == 40
    for (prompt, *answers), theirs in zip(ours, trainer.train_dataset, strict=True):
        with_ends = [[*answer, tokenizer.end_of_text] for answer in answers]
        assert [theirs[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] == [prompt, *with_ends]
