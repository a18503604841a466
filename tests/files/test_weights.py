"""Models on disk: what transformers saves and loads, and what is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference import in_transformers, oriented, random_model
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import empty_model, load_model, save_model
from tunesmith.models.gpt2 import GPT, GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=6144, block_size=24)
IDS = torch.randint(0, 6144, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small_tokenizer():
    return Tokenizer.load(SAMPLE)


@pytest.fixture
def saved(tmp_path, small_tokenizer) -> Path:
    """A good model directory, for a test to spoil."""
    save_model(random_model(SHAPE), small_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    return model.lm_head(model(IDS))


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})


# What transformers saves


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_loads_what_transformers_saves(tmp_path, tied, shard_size):
    theirs = in_transformers(random_model(replace(SHAPE, tied_head=tied)))
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    loaded = load_model(tmp_path)
    assert loaded.config.tied_head == tied
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_become_float32_weights_of_the_same_value(tmp_path, dtype):
    ours = random_model(SHAPE)
    in_transformers(ours).to(dtype).save_pretrained(tmp_path)
    loaded = load_model(tmp_path).state_dict()
    for name, value in ours.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.to(dtype).float()), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_loads_the_old_pytorch_bin_with_its_causal_masks(saved, prefix, zipped):
    """The published gpt2 files: no prefix, and buffers h.N.attn.bias that are no weights."""
    ours, state = random_model(SHAPE), {}
    for name, p in ours.named_parameters():
        state[prefix + name] = oriented(name, p.detach()).contiguous()
    for i in range(2):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    (saved / "model.safetensors").unlink()
    torch.save(state, saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(load_model(saved)), logits(ours))


# What transformers loads


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tmp_path, small_tokenizer, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = random_model(replace(SHAPE, tied_head=tied, n_inner=72, layer_norm_epsilon=1e-3))
    save_model(ours, small_tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(ours), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    text = "\n\nHuman: naïve 🙂  words\n\nAssistant:"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == small_tokenizer.encode(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saving_and_loading_gives_back_every_bit(tmp_path, small_tokenizer, dtype):
    ours = random_model(replace(SHAPE, dropout=0.1)).to(dtype)
    save_model(ours, small_tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = load_model(tmp_path)
    assert again.config == ours.config
    for (name, p), q in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.float(), q), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tmp_path, small_tokenizer, tied):
    model = random_model(replace(SHAPE, tied_head=tied))
    save_model(model, small_tokenizer, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert sum(v.numel() for v in stored.values()) == model.parameter_count()
    loaded = load_model(tmp_path)
    assert (loaded.lm_head.weight is loaded.wte.weight) == tied


def test_saved_files_can_be_read_by_those_who_may_read_the_folder(saved):
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert len(set(modes.values())) == 1, modes


# What is refused


def test_a_stored_head_equal_to_the_tied_embedding_is_fine(saved):
    change_weights(saved, lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"].clone()}))
    assert torch.equal(logits(load_model(saved)), logits(random_model(SHAPE)))


@pytest.mark.parametrize("order", [["lm_head", "wte"], ["wte", "lm_head"]], ids="-".join)
def test_a_stored_head_that_differs_from_the_tied_embedding_is_refused(saved, order):
    state = load_file(saved / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    (saved / "model.safetensors").unlink()
    torch.save(dict(sorted(state.items(), key=lambda i: order[0] not in i[0])), saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lm_head.weight differs from wte.weight"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("transformer.h.1.ln_2.bias"), ["missing weight", "h.1.ln_2.bias"]),
        (lambda s: s.update({"transformer.h.7.ln_2.bias": torch.ones(32)}), ["unknown weight", "h.7.ln_2.bias"]),
        (
            lambda s: s.update({"transformer.wpe.weight": torch.ones(25, 32)}),
            ["wpe.weight", "(25, 32)", "(24, 32)"],
        ),
        (
            lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            ["h.0.mlp.c_fc.weight"],
        ),
        (lambda s: [s.pop(k) for k in list(s) if "h.1." in k], ["missing weight h.1.attn", "and 9 more"]),
    ],
    ids=["missing", "unknown", "misshapen", "transposed", "many"],
)
def test_wrong_weights_are_named(saved, change, told):
    change_weights(saved, change)
    with pytest.raises(UserError) as caught:
        load_model(saved)
    assert all(part in str(caught.value) for part in [str(saved), *told])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"n_head": 5}, "n_embd = 32 is not a multiple of n_head = 5"),
    ],
    ids=str,
)
def test_models_that_we_would_compute_wrongly_are_refused(saved, changes, told):
    change_config(saved, **changes)
    with pytest.raises(UserError, match=told):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "gpt2"}', "\xff"])
def test_a_broken_config_is_a_users_error(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(saved)


class TouchesAFile:
    """Unpickled by the book, it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "before torch 1.6", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(saved, tmp_path, how):
    marker, file = tmp_path / "was here", saved / "pytorch_model.bin"
    (saved / "model.safetensors").unlink()
    state = {"transformer.wte.weight": TouchesAFile(marker)}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_model(saved)
    assert not marker.exists()
    with file.open("rb") as stream:  # the trap is a real one
        torch.load(stream, weights_only=False) if how != "plain pickle" else pickle.load(stream)
    assert marker.exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(3)], {"transformer.wte.weight": 3}, torch.ones(3)], ids=["list", "number", "tensor"]
)
def test_a_pickle_without_named_weights_is_refused(saved, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_model(saved)


def test_every_truncation_of_a_weight_file_is_refused(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            load_model(saved)


@pytest.mark.parametrize("at", [0, 5, 8, 60])
def test_a_corrupt_header_is_refused(saved, at):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError):
        load_model(saved)


def test_a_missing_shard_is_named(tmp_path):
    in_transformers(random_model(SHAPE)).save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_model(tmp_path)


def test_a_directory_without_weights_is_told_what_was_looked_for(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors .* nor pytorch_model\.bin"):
        load_model(saved)


def test_a_model_to_be_filled_draws_nothing():
    before = torch.get_rng_state()
    found = empty_model(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.lm_head.weight is found.wte.weight
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in GPT(SHAPE).named_parameters()}
