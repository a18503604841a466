"""GGUF files as MODELs: what was written is read back, as transformers reads it; what cannot be read is one clear line."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf import dequant

import gguf_made as made
import tunesmith as ts
from tunesmith.errors import Note, UserError
from tunesmith.files.names import find_model, load_plain
from tunesmith.models.known import FAMILIES

KINDS = [kind for kind in made.CONFIGS if kind.partition(",")[0] in FAMILIES]
THEIRS_TOO = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2")  # architectures that transformers reads from GGUF
IDS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))
TYPES = gguf.GGMLQuantizationType
pytestmark = pytest.mark.filterwarnings("ignore::tunesmith.errors.Note")


def ours(name):
    model = load_plain(find_model(str(name)))
    with torch.no_grad():
        return model.lm_head(model(IDS))


def theirs(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_read_back_equal(kind, tmp_path):
    model = made.model_of(kind)
    file = made.write_model(tmp_path / "model.gguf", model)
    converted = transformers.AutoModelForCausalLM.from_pretrained(find_model(str(file)))
    wanted = model.state_dict()
    assert wanted.keys() == converted.state_dict().keys()
    for name, value in converted.state_dict().items():
        close = model.config.model_type == "gemma3_text" and "norm" in name  # 1 + w has fewer bits of w
        assert torch.allclose(value, wanted[name], atol=1e-6) if close else torch.equal(value, wanted[name]), name
    torch.testing.assert_close(ours(file), theirs(model), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(theirs(converted), theirs(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k in THEIRS_TOO])
def test_logits_are_those_of_transformers_own_reading(kind, tmp_path):
    file = made.write_model(tmp_path / "model.gguf", made.model_of(kind), kind=TYPES.Q8_0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    torch.testing.assert_close(ours(file), theirs(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_those_that_the_file_stands_for(type, tmp_path):
    model = made.model_of("gpt2")
    file = made.write_model(tmp_path / "model.gguf", model, kind=TYPES[type])
    weights = load_plain(find_model(str(file))).state_dict()
    wanted = model.state_dict()["transformer.h.1.mlp.c_fc.weight"].T.contiguous()
    plain = gguf.quants.dequantize(gguf.quants.quantize(wanted.numpy(), TYPES[type]), TYPES[type])
    assert np.array_equal(weights["h.1.mlp.c_fc.weight"].numpy(), plain)
    assert torch.allclose(weights["h.1.mlp.c_fc.weight"], wanted, atol=0.15)
    assert not torch.equal(weights["h.1.mlp.c_fc.weight"], wanted)


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_kinds_that_only_llama_cpp_writes_are_read_as_transformers_reads_them(type, tmp_path):
    """The package cannot write them: blocks of random bytes, with a scale of 1/1024 in every 16-bit place that holds one."""
    model, (numbers, size) = made.model_of("gpt2"), gguf.GGML_QUANT_SIZES[TYPES[type]]
    blocks = np.random.default_rng(0).integers(0, 256, (300 * 256 // numbers, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2**-10).tobytes(), np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(type, (0,)):
        blocks[:, place : place + 2] = scale
    config = transformers.GPT2Config(**made.SIZES_GPT2 | {"n_embd": 256, "n_layer": 1})
    model = transformers.GPT2LMHeadModel(config)
    file = made.write_model(
        tmp_path / "model.gguf", model, tensors={"token_embd.weight": (blocks.reshape(300, -1), TYPES[type])}
    )
    wanted = dequant.dequantize(torch.from_numpy(blocks.reshape(-1)), int(TYPES[type])).reshape(300, 256)
    weights = load_plain(find_model(str(file))).state_dict()
    torch.testing.assert_close(weights["lm_head.weight"], wanted, atol=1e-6, rtol=1e-6)
    assert wanted.std() > 1e-3


def test_tokens_template_and_ends_come_from_the_file(tmp_path):
    tokenizer = made.byte_tokens() | {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eot_token_id": 1}
    file = made.write_model(tmp_path / "model.gguf", made.model_of("gpt2"), tokenizer=tokenizer)
    model, own = ts.load(str(file), device="cpu")
    assert model.config.vocab_size == 300
    assert own.vocab_size == 262  # the unused rest is no token
    assert own.stops >= {0, 1}
    assert own.encode("the hello") == [ord("t") - 33 + 2, 258, 222, 258, 259, ord("o") - 33 + 2]
    read = transformers.AutoTokenizer.from_pretrained(find_model(str(file)))
    assert read.chat_template == "{{ messages }}"
    assert read("the hello<|endoftext|>").input_ids == [*own.encode("the hello"), 0]


def write_gpt2(path, **options):
    return made.write_model(path, made.model_of("gpt2"), **options)


def without_merges(path):
    return write_gpt2(path, tokenizer={k: v for k, v in made.byte_tokens().items() if not k.endswith("merges")})


def with_tokenizer(**changes):
    entries = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return lambda path: write_gpt2(path, tokenizer=made.byte_tokens() | entries)


def not_one(path):
    path.write_bytes(b"PK\x03\x04 and so on")
    return path


def cut_at(size):
    def write(path):
        path.write_bytes(write_gpt2(path).read_bytes()[:size])
        return path

    return write


def extra(**entries):
    return lambda path: write_gpt2(path, entries=entries)


BAD = {
    "not a GGUF": (not_one, "is not a GGUF file: it begins with b'PK"),
    "empty": (cut_at(0), "is not a GGUF file"),
    "cut in the header": (cut_at(20), "its 20 bytes are cut off or damaged"),
    "cut in the metadata": (cut_at(3000), "its 3,000 bytes are cut off or damaged"),
    "cut in the weights": (cut_at(100_000), "its 100,000 bytes are cut off or damaged"),
    "unknown architecture": (
        lambda path: made.write_file(path, "mamba", {}, {}),
        "GGUF architecture 'mamba'; tunesmith supports",
    ),
    "one of several parts": (
        lambda path: write_gpt2(path, tokenizer=made.byte_tokens() | {"split.count": 3}),
        "is one of 3 parts of a split GGUF; join them first: llama-gguf-split --merge",
    ),
    "a kind that cannot be dequantised": (
        lambda path: write_gpt2(path, tensors={"blk.0.ffn_up.weight": (np.zeros((256, 64), np.int8), TYPES.I8)}),
        r"blk.0.ffn_up.weight is stored as I8, which the package gguf cannot dequantise",
    ),
    "more tokens than embeddings": (
        lambda path: write_gpt2(
            path, tokenizer=made.byte_tokens(301) | {"tokenizer.ggml.token_type": [3, 4] + [1] * 299}
        ),
        "its vocabulary has 301 tokens, but there are embeddings for 300",
    ),
    "types of fewer tokens": (with_tokenizer(token_type=[1, 1]), "300 tokens, 2 types, 2 scores"),
    "merges of other tokens": (with_tokenizer(merges=["q zz"]), "its vocabulary and merges do not fit together"),
    "no merges": (without_merges, "has no merges"),
    "no tokenizer": (lambda path: write_gpt2(path, tokenizer={}), "holds no tokenizer"),
    "an end that is no token": (with_tokenizer(eos_token_id=300), "eos_token_id is 300, but there are 300 tokens"),
    "another kind of tokenizer": (with_tokenizer(model="bert"), "a tokenizer of the kind 'bert' is not supported"),
    "unknown words": (with_tokenizer(pre="viking"), "cuts text into words by 'viking'"),
    "a missing entry": (
        lambda path: made.write_file(path, "gpt2", {}, made.tensors_of(made.model_of("gpt2"))),
        "gpt2.block_count is missing",
    ),
    "sizes that differ": (extra(**{"attention.head_count": [4, 2]}), r"head_count is \[4, 2\], expected one number"),
    "other arithmetic": (extra(expert_count=8), "asks for expert_count, which tunesmith does not compute"),
    "a weight that is missing": (extra(block_count=3), "does not hold this model: missing weight h.2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_one_clear_line(kind, tmp_path):
    write, said = BAD[kind]
    file = write(tmp_path / "bad.gguf")
    with pytest.raises(UserError, match=said) as error:
        find_model(str(file))
    assert "\n" not in str(error.value)
    assert "bad.gguf" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


ROPES = {
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "rope scaling 'yarn' is not supported"),
    "longrope": ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, "rope scaling 'longrope' is not supported"),
    "factors of another": (
        {},
        {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)},
        "are not those of a Llama 3",
    ),
    "partial": ({"rope.dimension_count": 8}, {}, "rotate 8 of them"),
}


@pytest.mark.skipif("llama" not in FAMILIES, reason="no Llama yet")
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_positions_that_are_not_computed_are_refused(kind, tmp_path):
    entries, tensors, said = ROPES[kind]
    file = made.write_model(tmp_path / "bad.gguf", made.model_of("llama"), entries=entries, tensors=tensors)
    with pytest.raises(UserError, match=said):
        find_model(str(file))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.filterwarnings("always::tunesmith.errors.Note")
def test_a_file_is_converted_once_wherever_it_lies(own_cache, tmp_path):
    file = write_gpt2(tmp_path / "first.gguf")
    with pytest.warns(Note, match=r"first.gguf is converted once, into .*gguf1-"):
        directory = find_model(str(file))
    before = (directory / "model.safetensors").stat()
    moved = file.rename(tmp_path / "moved.GGUF")
    assert find_model(str(moved)) == directory
    assert (directory / "model.safetensors").stat() == before
    write_gpt2(tmp_path / "other.gguf", kind=TYPES.Q8_0)
    assert find_model(str(tmp_path / "other.gguf")) != directory
    assert not list(own_cache.glob(".*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda d: flip(d / "model.safetensors"),
    "cut": lambda d: (d / "model.safetensors").write_bytes(b""),
    "a file gone": lambda d: (d / "tokenizer.json").unlink(),
    "no record": lambda d: (d / "converted.json").unlink(),
    "a broken record": lambda d: (d / "converted.json").write_text("{"),
}


@pytest.mark.filterwarnings("always::tunesmith.errors.Note")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_made_anew(kind, own_cache, tmp_path):
    file = write_gpt2(tmp_path / "model.gguf")
    with pytest.warns(Note, match="is converted once"):
        directory = find_model(str(file))
    weights = (directory / "model.safetensors").read_bytes()
    DAMAGE[kind](directory)
    with pytest.warns(Note, match="is damaged: it is made anew"):
        assert find_model(str(file)) == directory
    assert (directory / "model.safetensors").read_bytes() == weights
    assert (directory / "tokenizer.json").exists()
