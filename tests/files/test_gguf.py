"""GGUF files as MODELs: what was written is read back, as transformers reads it; what cannot be read is one clear line."""

import os
import shutil
import sys

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.integrations.gguf import dequant

import gguf_made as made
import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.errors import Note, UserError
from tunesmith.files import converted
from tunesmith.files.names import find_model, load_plain
from tunesmith.files.run import Run
from tunesmith.jsontext import read_json
from tunesmith.models.known import FAMILIES

KINDS = [kind for kind in made.CONFIGS if kind.partition(",")[0] in FAMILIES]
THEIRS_TOO = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt2")  # architectures that transformers reads from GGUF
IDS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))
TYPES = gguf.GGMLQuantizationType
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
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
    wanted, close = model.state_dict(), {"atol": 1e-4, "rtol": 1e-4}
    assert wanted.keys() == converted.state_dict().keys()
    for name, value in converted.state_dict().items():
        if kind == "gemma3_text" and "norm" in name:  # stored as 1 + w, which keeps fewer bits of w
            assert torch.allclose(value, wanted[name], atol=1e-6), name
        else:
            assert torch.equal(value, wanted[name]), name
    torch.testing.assert_close(ours(file), theirs(converted), **close)
    torch.testing.assert_close(
        ours(file), theirs(model), **close if kind != "gemma3_text" else {"atol": 1e-3, "rtol": 1e-3}
    )


@pytest.mark.parametrize("kind", [k for k in KINDS if k in THEIRS_TOO])
def test_logits_are_those_of_transformers_own_reading(kind, tmp_path):
    file = made.write_model(tmp_path / "model.gguf", made.model_of(kind), kind=TYPES.Q8_0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    torch.testing.assert_close(ours(file), theirs(model), atol=1e-4, rtol=1e-4)


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
    tokenizer = made.byte_tokens() | {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.eot_token_id": 1}
    file = made.write_model(tmp_path / "model.gguf", made.model_of("gpt2"), tokenizer=tokenizer)
    model, own = ts.load(str(file), device="cpu")
    assert model.config.vocab_size == 300
    assert own.vocab_size == 262  # the unused rest is no token
    assert own.stops >= {0, 1}
    assert own.encode("the hello") == [ord("t") - 33 + 2, 258, 222, 258, 259, ord("o") - 33 + 2]
    read = transformers.AutoTokenizer.from_pretrained(find_model(str(file)))
    assert read.chat_template == TEMPLATE
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


def test_of_two_that_convert_at_once_the_second_takes_what_the_first_made(own_cache, tmp_path, monkeypatch):
    file, plain, times = write_gpt2(tmp_path / "model.gguf"), converted.convert, []

    def overtaken(source, aside):
        plain(source, aside)
        times.append(None)
        if len(times) == 1:  # another process begins and ends while this one writes
            made = find_model(str(file))
            times.append((made / "model.safetensors").stat())

    monkeypatch.setattr(converted, "convert", overtaken)
    directory = find_model(str(file))
    assert len(times) == 3
    assert (directory / "model.safetensors").stat() == times[-1]
    assert not list(own_cache.glob(".*"))


def test_nothing_half_written_stays(own_cache, tmp_path, monkeypatch):
    file = write_gpt2(tmp_path / "model.gguf")
    old, new = own_cache / ".writing-old", own_cache / ".writing-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))

    def killed(source, aside):
        (aside / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converted, "convert", killed)
        with pytest.raises(KeyboardInterrupt):
            find_model(str(file))
    assert list(own_cache.iterdir()) == [new]  # of a process that may be writing there
    assert find_model(str(file)).is_dir()


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to the cache.*set TUNESMITH_CACHE"):
        find_model(str(write_gpt2(tmp_path / "model.gguf")))


def test_without_the_package_the_way_out_is_named(tmp_path, monkeypatch):
    file = write_gpt2(tmp_path / "model.gguf")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="package gguf, which is not installed: pip install gguf"):
        find_model(str(file))


def test_a_name_that_leads_nowhere_is_answered_with_the_nearest(tmp_path, monkeypatch):
    write_gpt2(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file. Did you mean model.gguf\?"):
        find_model("modle.gguf")
    with pytest.raises(UserError, match=r"name the file in it: .*model.gguf"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match=r"Did you mean smollm2\?"):
        find_model("smolm2")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("small") / "small.gguf", kind=TYPES.Q8_0)


def test_an_adapter_on_a_gguf_file_opens_in_peft_and_here_and_resumes(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"lora__rank": 4, "data__block_size": 64, "data__max_rows": 40}
    ts.sft(tiny_config(small, tmp_path / "whole", **options))
    ts.sft(tiny_config(small, tmp_path / "parts", train__steps=3, **options))
    ts.sft(tiny_config(small, tmp_path / "parts", resume=True, **options))
    checkpoint = Run(tmp_path / "whole").checkpoint(6)
    tuned = load_file(checkpoint / "adapter_model.safetensors")
    again = load_file(Run(tmp_path / "parts").checkpoint(6) / "adapter_model.safetensors")
    assert all(torch.equal(tuned[name], again[name]) for name in tuned)
    assert any(value.abs().max() > 0 for name, value in tuned.items() if "lora_B" in name)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(theirs(model), ours(checkpoint), atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours(checkpoint), ours(small))


def test_an_adapter_finds_its_base_in_another_cache(small, own_cache, tmp_path, monkeypatch):
    options = {"lora__rank": 4, "data__block_size": 64, "data__max_rows": 40, "train__steps": 3}
    monkeypatch.chdir(tmp_path)
    run = ts.sft(tiny_config(small, tmp_path / "run", **options))
    recorded = read_json(run.best_checkpoint() / "adapter_config.json")["base_model_name_or_path"]
    assert recorded == str(find_model(str(small)).resolve())  # a cache stays where it is, wherever PEFT is started
    before = ours(tmp_path / "run")
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"Name its directory with --model.base"):
        find_model_of_adapter(tmp_path / "run")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "elsewhere"))
    assert torch.equal(ours(tmp_path / "run"), before)


def find_model_of_adapter(run):
    return load_plain(find_model(str(run)))


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "FILE", "sample", "--data.max_rows", "4"],
        ["plan", "--model", "FILE", "--device", "t4"],
        ["data", "sample", "--tokenizer", "FILE"],
    ],
    ids=lambda argv: argv[0],
)
def test_commands_take_a_gguf_file(argv, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(small) if word == "FILE" else word for word in argv]) == 0, capsys.readouterr().err
