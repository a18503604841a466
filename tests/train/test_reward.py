"""Reward models against transformers' GPT2ForSequenceClassification: scores, gradients, files; and what a run of them leaves."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification

import tunesmith as ts
from interrupted_runs import assert_same_end, interrupted
from reference import oriented, random_model
from tiny_runs import last_digest, tiny_config, train_losses
from tunesmith.__main__ import main
from tunesmith.data.epochs import BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.adapters import CONFIG, WEIGHTS
from tunesmith.files.names import SAMPLE
from tunesmith.files.reward_models import save_reward_model
from tunesmith.files.weights import save_model
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.models.reward_head import RewardModel
from tunesmith.options.training import PairDataOptions, RewardConfig
from tunesmith.train.losses import bradley_terry_loss
from tunesmith.train.pair_loss import OBSERVED, pair_scores, reward_loss_sum
from tunesmith.train.splits import load_splits

FLOAT32, FLOAT64 = 1e-5, 1e-10
SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=256)
FEW = {"train__steps": 4, "optimizer__lr": 1e-2, "eval__every": 2, "checkpoint__every": 2, "data__block_size": 200}
LORA = {"lora__rank": 4, "lora__dropout": 0.1, "lora__targets": "c_attn,mlp.c_fc"}
TEXTS = [torch.randint(1, 6144, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 1, 40, 17)]


def train(model, out, **options):
    return ts.train_reward_model(tiny_config(model, out, RewardConfig, **{**FEW, **options}))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(SAMPLE)


@pytest.fixture(scope="module")
def run(tiny_directory, tmp_path_factory):
    """Four steps on all weights."""
    return train(tiny_directory, tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def light(tiny_directory, tmp_path_factory):
    """Four steps on adapters and score layer."""
    return train(tiny_directory, tmp_path_factory.mktemp("runs") / "lora", **LORA)


def random_reward_model(shape=SHAPE, seed=0, dtype=torch.float32):
    model = RewardModel(random_model(shape, seed, dtype))
    torch.nn.init.normal_(model.score.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def loaded(name):
    return ts.load_reward(str(name), device="cpu")[0]


def scores(model):
    """Of TEXTS, packed into one row."""
    lengths = [len(t) for t in TEXTS]
    ids = torch.tensor([[token for text in TEXTS for token in text]])
    with torch.no_grad():
        return model(ids, Documents.from_rows([lengths]), rows=torch.tensor(lengths).cumsum(0) - 1)


def their_scores(model, pad=0):
    """Of TEXTS one by one, and in a batch padded on the right, which must agree."""
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in TEXTS])
    with torch.no_grad():
        single = torch.cat([model(torch.tensor([text])).logits[:, 0] for text in TEXTS])
        close(model(ids, attention_mask=mask).logits[:, 0], single)
    return single


def close(ours, theirs, tolerance=FLOAT32):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def by_their_names(model):
    return {name.replace("trunk.", "transformer."): p for name, p in model.named_parameters()}


def in_transformers(model):
    """The same model as transformers' classifier, weight by weight."""
    c = model.trunk.config
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, num_labels=1,
        tie_word_embeddings=c.tied_head, bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    theirs = GPT2ForSequenceClassification(config).to(model.score.weight.dtype).eval()
    ours = by_their_names(model)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(oriented(name, ours[name]))
    return theirs


# Files


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_scores_of_what_is_saved_here(tmp_path, tokenizer, tied):
    ours = random_reward_model(replace(SHAPE, tied_head=tied, n_inner=72, layer_norm_epsilon=1e-3))
    save_reward_model(ours, tokenizer, tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (theirs.config.num_labels, theirs.config.pad_token_id) == (1, tokenizer.end_of_text)
    close(scores(ours), their_scores(theirs, tokenizer.end_of_text))
    assert scores(ours).std() > 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_gives_its_scores_here(tmp_path, tokenizer, tied):
    theirs = in_transformers(random_reward_model(replace(SHAPE, tied_head=tied), seed=11))  # as no other test has
    theirs.save_pretrained(tmp_path)
    shutil.copy(SAMPLE / "tokenizer.json", tmp_path)
    ours, found = ts.load_reward(str(tmp_path), device="cpu")
    close(scores(ours), their_scores(theirs))
    assert found.fingerprint == tokenizer.fingerprint
    assert not ours.training


def test_a_run_is_a_reward_model_here_and_in_transformers(run):
    theirs = GPT2ForSequenceClassification.from_pretrained(run.checkpoint(4)).eval()
    close(scores(loaded(f"{run.path}@4")), their_scores(theirs))
    assert (scores(loaded(f"{run.path}@4")) - scores(loaded(f"{run.path}@0"))).abs().max() > 0.1
    assert torch.equal(scores(loaded(run.path)), scores(loaded(run.best_checkpoint())))


def test_adapters_and_score_of_a_run_give_its_scores_in_peft(light, tiny_directory):
    checkpoint = light.checkpoint(4)
    config = json.loads((checkpoint / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = GPT2ForSequenceClassification.from_pretrained(tiny_directory, num_labels=1, pad_token_id=0)
    expected = their_scores(peft.PeftModel.from_pretrained(theirs, checkpoint).eval())
    close(scores(loaded(checkpoint)), expected)
    alone = peft.AutoPeftModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).eval()
    alone.config.pad_token_id = 0
    assert torch.equal(their_scores(alone), expected)
    assert (expected - scores(loaded(f"{light.path}@0"))).abs().max() > 0.1


def made_by_peft(base, directory, labels=1):
    """A classifier's adapter of PEFT's with random values, on disk."""
    model = GPT2ForSequenceClassification.from_pretrained(base, pad_token_id=0, num_labels=labels)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=9, fan_in_fan_out=True)
    model, generator = peft.get_peft_model(model, config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def test_a_classifiers_adapter_made_by_peft_gives_its_scores_here(tmp_path, tokenizer):
    save_model(random_model(SHAPE), tokenizer, tmp_path / "base")
    theirs = made_by_peft(tmp_path / "base", tmp_path / "adapter")
    close(scores(loaded(tmp_path / "adapter")), their_scores(theirs))


# Computation


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Eight pairs of the sample in one row, and their sixteen sequences; some prompts have lost their beginning."""
    splits = load_splits(PairDataOptions(name="sample", max_rows=8), tokenizer, pairs=True)
    store = PairStore(splits.train)
    rows = PairRows(store, splits.train_rows, BatchLayout("packed", block_size=100, batch_size=1))
    packed, sequences = rows.assemble(range(len(rows))), []
    for cut in rows.pairs:
        prompt, *answers = store.tokens(cut.pair)
        sequences += [torch.from_numpy(np.concatenate([prompt[cut.start :], answer]))[None] for answer in answers]
    assert {cut.start > 0 for cut in rows.pairs} == {True, False}
    assert packed.tokens == packed.input_ids.numel() < sum(s.numel() for s in sequences)
    return packed, sequences


def test_pair_scores_and_every_gradient_equal_two_plain_sequences_in_transformers(batch):
    packed, sequences = batch
    model = random_reward_model(dtype=torch.float64)
    theirs, ours = in_transformers(model), by_their_names(model)
    single = torch.cat([theirs(s).logits[:, 0] for s in sequences]).view(-1, 2)
    close(pair_scores(model, packed), single, FLOAT64)
    margins = single[:, 0] - single[:, 1]
    expected = -torch.log(torch.sigmoid(margins)).sum()
    loss, *seen = reward_loss_sum(model, packed)
    close(loss, expected, FLOAT64)
    shown = [(margins > 0).double().sum(), margins.sum(), single[:, 0].sum(), single[:, 1].sum()]
    close(torch.stack(seen).detach(), torch.stack(shown).detach(), FLOAT64)
    assert 0 < shown[0] < packed.count
    expected.backward()
    loss.backward()
    for name, p in theirs.named_parameters():
        close(oriented(name, ours.pop(name).grad), p.grad, FLOAT64)
    assert not ours


def test_the_loss_is_minus_log_sigmoid_of_the_difference():
    chosen, rejected = torch.randn(2, 500, dtype=torch.float64).mul(20).unbind()
    loss, swapped = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
    np.testing.assert_allclose(loss, np.logaddexp(0, rejected.numpy() - chosen.numpy()), rtol=FLOAT64)
    close(loss - swapped, rejected - chosen, FLOAT64)
    close(bradley_terry_loss(chosen, chosen), torch.full_like(chosen, math.log(2)), FLOAT64)
    far = torch.tensor([1e4, -1e4])
    assert bradley_terry_loss(far, -far).tolist() == [0.0, 2e4]


def test_a_new_score_layer_is_small_random_and_its_seeds():
    a, b, c = (random_reward_model(replace(SHAPE, n_embd=512, n_layer=1, vocab_size=8)) for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        model.init_score(seed)
    assert torch.equal(a.score.weight, b.score.weight)
    assert not torch.equal(a.score.weight, c.score.weight)
    assert a.score.weight.std().item() == pytest.approx(0.02, rel=0.15)


# Runs


def test_a_run_tells_losses_accuracies_margins_and_rewards(run):
    lines, estimates = run.metrics("train"), run.metrics("eval")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"loss", *OBSERVED, "pairs", "tokens", "lr", "grad_norm"} <= line.keys()
        assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"], abs=FLOAT32)
        assert 0 <= line["accuracy"] <= 1
    assert [line["pairs"] for line in lines] == sorted({line["pairs"] for line in lines})
    assert [line["step"] for line in estimates] == [0, 2, 4]
    told = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "validation_margin"}
    assert all(told <= line.keys() for line in estimates)


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_k_steps_and_resume_equal_n_steps_bit_for_bit(tiny_directory, tmp_path, lora):
    options = {**lora, "model__dropout": 0.1, "train__accumulate": 2, "optimizer__schedule": "linear"}
    whole = train(tiny_directory, tmp_path / "whole", **options)
    assert (whole.checkpoint(4) / (WEIGHTS if lora else "model.safetensors")).exists()
    for step in (2, 0):
        cut = interrupted(whole, tmp_path / f"from-{step}", step)
        assert last_digest(cut) != last_digest(whole)
        train(tiny_directory, cut.path, **options, resume=True)
        assert_same_end(cut, whole)


@pytest.mark.parametrize("lora", [{}, {"lora__rank": 4}], ids=["full", "lora"])
def test_a_step_split_into_micro_batches_is_the_same_step(tiny_directory, tmp_path, lora):
    options = {**lora, "data__batching": "padded", "eval__at_start": False, "optimizer__lr": 1e-3}
    one = train(tiny_directory, tmp_path / "one", **options, train__batch_size=4)
    four = train(tiny_directory, tmp_path / "four", **options, train__batch_size=1, train__accumulate=4)
    assert train_losses(four) == pytest.approx(train_losses(one), rel=1e-6)
    assert len(set(train_losses(one))) == 4
    assert [line["pairs"] for line in four.metrics("train")] == [4, 8, 12, 16]


def wilson(k, n, z=1.96):
    """95 % interval of a share (Wilson 1927)."""
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (p + z * z / (2 * n) - half) / d, (p + z * z / (2 * n) + half) / d


def test_the_embedded_sample_trains_a_model_that_prefers_better_answers_it_has_not_seen(tmp_path):
    """From a seed whose untrained score layer prefers the worse ones."""
    argv = ["reward", "--model.name", "sample", "--data.name", "sample", "--data.block_size", "256", "--train.steps", "40",
            "--optimizer.lr", "3e-4", "--train.precision", "fp32", "--train.device", "cpu", "--train.seed", "2",
            "--eval.every", "40", "--eval.iters", "40", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    before, after = ts.Run(tmp_path / "run").metrics("eval")
    n = 40  # test pairs of the sample; 40 estimates hold them all
    right = [line["validation_accuracy"] * n for line in (before, after)]
    assert right == pytest.approx([round(k) for k in right])
    low, high = wilson(right[1], n)
    told = f"{right[0]:.0f} of {n} before, {right[1]:.0f} after training: 95 % interval {low:.2f} to {high:.2f}"
    assert low > 0.5 > right[0] / n, told
    assert after["validation_loss"] < 0.4 < math.log(2) < before["validation_loss"], told


# What is refused


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reward_model_writes_no_text_and_every_command_says_so_in_one_line(run, light, capfd, kind):
    checkpoint = str((run if kind == "full" else light).checkpoint(4))
    with pytest.raises(UserError, match=r"reward model: it gives scores, not text"):
        ts.load(checkpoint, device="cpu")
    for argv in (["chat"], ["sft", "--data.name", "sample", "--model.name"]):
        assert main([*argv, checkpoint]) == 1
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1
        assert all(part in err for part in ("tunesmith: ", checkpoint, "gives scores, not text"))


def test_a_language_model_or_its_adapter_has_no_score(tiny_directory, tmp_path):
    lora = ts.sft(tiny_config(tiny_directory, tmp_path / "run", lora__rank=2, train__steps=1, eval__iters=1))
    for name in ("sample", tiny_directory, lora.path):
        with pytest.raises(UserError, match=r"language model.*(no scores|not a reward model)"):
            loaded(name)


@pytest.mark.parametrize(("labels", "told"), [(2, "score"), (3, "gives 3 numbers per text")])
def test_a_classifier_of_several_classes_is_refused(tmp_path, tokenizer, labels, told):
    save_model(random_model(SHAPE), tokenizer, tmp_path / "base")
    made = made_by_peft(tmp_path / "base", tmp_path / "adapter", labels)
    made.merge_and_unload().save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"adapter.*score"):
        loaded(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"whole.*{told}"):
        loaded(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("score.weight"), r"score\.weight"),
        (lambda s: s.update({"score.weight": torch.ones(1, 7)}), r"score\.weight"),
        (lambda s: s.pop("transformer.h.1.ln_2.bias"), r"missing weight h\.1\.ln_2\.bias"),
    ],
    ids=["no score", "misshapen", "missing"],
)
def test_wrong_weights_of_a_reward_model_are_named(run, tmp_path, change, told):
    directory = shutil.copytree(run.checkpoint(4), tmp_path / "model")
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=told):
        loaded(directory)


def test_adapters_that_lost_their_score_are_not_resumed_from_and_named(light, tiny_directory, tmp_path):
    cut = interrupted(light, tmp_path / "cut", 2)
    file = cut.checkpoints()[-1][1] / WEIGHTS
    save_file({name: value for name, value in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(UserError, match=r"step-00000002.*score"):
        train(tiny_directory, cut.path, **LORA, resume=True)


@pytest.mark.parametrize("targets", ["lm_head", "all-linear,lm_head"])
def test_an_adapter_on_the_head_that_a_reward_model_has_not_is_refused(tiny_directory, tmp_path, targets):
    with pytest.raises(UserError, match="lm_head"):
        train(tiny_directory, tmp_path / "run", lora__rank=2, lora__targets=targets)
