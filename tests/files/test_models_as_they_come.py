"""Models and tokenizers as people have them: what transformers loads loads here, encodes the same, stops the same."""

import itertools
import json
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tunesmith as ts
from reference import marked
from tiny_runs import tiny_config
from tokenizer_kinds import KINDS, TEXTS, change_json
from tunesmith.__main__ import main
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import encode_rows
from tunesmith.data.hh_template import HH
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import Note, UserError, note
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import load_model
from tunesmith.jsontext import read_json

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 6144, "n_positions": 128}
IDS = torch.randint(0, 6144, (2, 24), generator=torch.Generator().manual_seed(0))
ASKED = [{"role": "user", "content": "What is fog?"}]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A GPT-2 as transformers saves it, with the sample's tokenizer."""
    path = tmp_path_factory.mktemp("published")
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    shutil.copy(SAMPLE / "tokenizer.json", path)
    return path


@pytest.fixture
def saved(published, tmp_path):
    """The same, for a test to change."""
    return shutil.copytree(published, tmp_path / "saved")


def theirs(path):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits


def ours(path):
    model = load_model(path)
    with torch.no_grad():
        return model.lm_head(model(IDS))


# Weights and shapes


def test_weights_that_a_gpt2_does_not_use_are_left_out_with_a_note(saved, published):
    state = load_file(saved / "model.safetensors")
    state |= {
        "v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1),
        "multiple_choice_head.summary.weight": torch.ones(1, 32), "lm_head.decoder.weight": torch.ones(6144, 32),
        "transformer.h.0.attn.rotary.inv_freq": torch.ones(8),
    }  # fmt: skip
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    with pytest.warns(Note, match=r"saved also holds .* and 2 more, which a GPT-2 does not use"):
        assert torch.equal(ours(saved), ours(published))
    torch.testing.assert_close(ours(saved), theirs(saved), rtol=1e-5, atol=1e-5)


def test_a_note_on_the_command_line_is_one_line_without_a_place_in_our_code(monkeypatch, capfd):
    import tunesmith.__main__ as command_line

    def command(argv):
        warnings.showwarning = shown  # pytest has its own
        note("something to know")
        warnings.warn("something else", stacklevel=1)

    def shown(message, category, filename, lineno, *_):
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr, end="")

    monkeypatch.setattr(warnings, "showwarning", shown)
    monkeypatch.setitem(command_line.COMMANDS, "chat", ("", command))
    before = warnings.formatwarning
    assert main(["chat"]) == 0
    first, *others = capfd.readouterr().err.splitlines()
    assert first == "note: something to know"
    assert "UserWarning: something else" in others[0]
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
        | dict.fromkeys(["n_embd", "n_layer", "n_head", "n_positions", "n_ctx"]),
        {"model_type": None},
        {"model_type": None, "architectures": None},
        {"architectures": ["GPT2DoubleHeadsModel"]},
        {"eos_token_id": [0, 3]},
        {"activation_function": "gelu_fast"},
    ],
    ids=["general names", "no model_type", "only sizes", "two heads", "two ends", "tanh by another name"],
)
def test_configs_that_mean_the_same_model_load(saved, published, changes):
    change_json(saved / "config.json", changes)
    torch.testing.assert_close(ours(saved), ours(published), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layer": "2"}, "n_layer = '2'"), ({"n_layer": 2.5}, "n_layer = 2.5"), ({"n_head": 0}, "n_head = 0"),
        ({"n_embd": [32]}, r"n_embd = \[32\]"), ({"vocab_size": True}, "vocab_size = True"),
        ({"n_positions": -1, "n_ctx": None}, "n_positions = -1"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small'"), ({"resid_pdrop": 2}, "resid_pdrop = 2"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"), ({"n_inner": {}}, "n_inner = {}"),
        ({"n_layer": 10**40}, "n_layer = 1000"), ({"scale_attn_weights": 1.5}, "scale_attn_weights"),
        ({"model_type": ["gpt2"]}, "model_type"), ({"activation_function": ["gelu_new"]}, "activation_function"),
        ({"eos_token_id": "0"}, "eos_token_id is '0'"), ({"eos_token_id": [0, True]}, "eos_token_id is"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_values_in_a_config_are_one_clear_line(saved, changes, told):
    change_json(saved / "config.json", changes)
    (saved / "generation_config.json").unlink()
    with pytest.raises(UserError, match=told) as caught:
        ts.load(str(saved), device="cpu")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"n_layer": 10**6}, {"n_positions": 10**9, "n_ctx": None}, {"n_embd": 2 * 10**6}], ids=str
)
def test_a_shape_that_no_machine_could_build_is_refused_before_it_is_built(saved, changes):
    change_json(saved / "config.json", changes)
    with pytest.raises(UserError, match=r"config\.json asks for .* blocks .* but the weights have"):
        load_model(saved)


def test_one_name_for_a_tied_head_and_embedding_is_enough(saved, published):
    """`safetensors.torch.save_model` keeps the first in the alphabet."""
    state = load_file(saved / "model.safetensors")
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    assert torch.equal(ours(saved), ours(published))


def test_null_where_a_size_belongs_is_named(saved):
    text = (saved / "config.json").read_text().replace('"n_layer": 2', '"n_layer": null')
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match="n_layer = None"):
        load_model(saved)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"n_layer": ' + "1" * 6000 + "}"], ids=["deep", "6,000 digits"])
def test_json_that_python_cannot_read_is_one_clear_line(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_model(saved)


# Tokenizers: the same ids and the same special tokens as in transformers, also of what we write


@pytest.fixture
def made(saved):
    def make(kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](saved)
        return saved

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_special_tokens_are_those_of_transformers_and_so_is_what_we_write(made, tmp_path, kind):
    path = made(kind)
    mine, other = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert mine.end_of_text == other.eos_token_id
    (tmp_path / "written").mkdir()
    mine.save(tmp_path / "written", 128)
    again, back = AutoTokenizer.from_pretrained(tmp_path / "written"), Tokenizer.load(tmp_path / "written")
    for text in TEXTS:
        expected = other(text, add_special_tokens=False)["input_ids"]
        assert mine.encode(text) == back.encode(text) == expected, text
        assert again(text, add_special_tokens=False)["input_ids"] == expected, text
    for role in ("eos", "pad", "bos"):
        assert getattr(again, f"{role}_token") == getattr(other, f"{role}_token")
        assert getattr(again, f"{role}_token_id") == getattr(other, f"{role}_token_id")
    assert set(again.all_special_tokens) == set(other.all_special_tokens)
    assert again.get_vocab() == other.get_vocab()
    assert (back.fingerprint, back.end_of_text) == (mine.fingerprint, mine.end_of_text)
    assert mine.stops <= back.stops


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_letters(made, kind):
    """Only ours: transformers makes tokens of them, which is how a text ends an answer that it only talks about."""
    tokenizer = Tokenizer.load(made(kind))
    for text in tokenizer.special.texts:
        ids = tokenizer.encode(f"a {text} b")
        assert tokenizer.decode(ids).strip() == f"a {text} b"
        assert tokenizer._backend.token_to_id(text) not in ids
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_row_are_encoded_as_the_whole_is_and_marked_exactly(made, kind):
    """With a space before a text only its first piece has it; added tokens do not shift the borders of the rows after them."""
    tokenizer = Tokenizer.load(made(kind))
    said = ["hello", "<user> again", "you're <bot>", "a  b ", "\nline", "\u00e9\U0001f600", "x"]
    talks = [
        [Message("user", a), Message("assistant", b), Message("user", b), Message("assistant", a)]
        for a, b in itertools.product(said, said)
    ]
    rows = [tokenizer.begun(HH.segments(talk, False)) for talk in talks]
    assert bool(tokenizer.opening) == rows[0][0].text.startswith(" ")
    ids, flags, counts = encode_rows(rows, tokenizer)
    expected = [marked(row, tokenizer) for row in rows]
    assert counts.tolist() == [len(row) for row, _ in expected]
    assert ids.tolist() == list(itertools.chain.from_iterable(row for row, _ in expected))
    assert flags.tolist() == list(itertools.chain.from_iterable(marks for _, marks in expected))
    plain = [Message("user", "hello"), Message("assistant", "good day"), Message("user", "and you?")]
    pieces = tokenizer.encode_segments(tokenizer.begun(HH.segments(plain, False)))
    assert list(itertools.chain.from_iterable(pieces)) == tokenizer.encode(HH.text(plain))


def test_a_pad_token_that_has_no_embedding_is_harmless(made, published):
    path = made("pad beyond")
    model, tokenizer = ts.load(str(path), device="cpu")
    assert torch.equal(model.wte.weight, ts.load(str(published), device="cpu")[0].wte.weight)
    assert max(tokenizer.encode("[PAD] x")) < 6144
    assert tokenizer.pad(6144) == tokenizer.end_of_text


def test_added_words_without_an_embedding_become_letters(made):
    _, tokenizer = ts.load(str(made("words added")), device="cpu")
    assert max(tokenizer.encode("<user>hi<bot>")) < 6144
    assert tokenizer.decode(tokenizer.encode("<user>hi<bot>")) == "<user>hi<bot>"


def test_an_end_of_text_without_an_embedding_is_refused_with_the_way_out(made):
    with pytest.raises(UserError, match=r"<\|im_end\|>, is token 6,144, .* 6,144\. .*resize_token_embeddings"):
        ts.load(str(made("chatml")), device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", {"eos_token": 5}), ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("special_tokens_map", {"pad_token": {"text": "p"}}), ("added_tokens", {"<a>": "many"}), ("added_tokens", {"<a>": 9000}),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_beside_a_tokenizer_is_one_clear_line(saved, name, content):
    (saved / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"saved") as caught:
        Tokenizer.load(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_keeps_what_its_start_knew(made, tmp_path):
    """Of the model that the public bug report had: tokens in two files beside an old pair."""
    path = made("old pair, tokens in two files")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    theirs.resize_token_embeddings(6148)
    theirs.save_pretrained(path)
    quick = {"train__steps": 1, "eval__iters": 1, "data__max_rows": 20, "data__block_size": 64, "lora__rank": 2}
    run = ts.sft(tiny_config(path, tmp_path / "run", **quick))
    other = AutoTokenizer.from_pretrained(run.best_checkpoint())
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (6144, 6145, 6146)
    assert other("<user>", add_special_tokens=False)["input_ids"] == [6147]
    settings = read_json(run.best_checkpoint() / "generation_config.json")
    assert (settings["eos_token_id"], settings["pad_token_id"], settings["bos_token_id"]) == ([6145, 0], 6146, 6144)
    assert ts.load(str(run.path), device="cpu")[1].stops == {6145, 0}


# Ends of an answer


def always_says(path, token):
    """Change a model on disk so that it says one token whatever it reads."""
    model = AutoModelForCausalLM.from_pretrained(path, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[token] = 1
    model.save_pretrained(path)


def lengths(path):
    """Tokens of a greedy answer here and in transformers."""
    from tunesmith.generation.engine import generate_answers
    from tunesmith.generation.sampling import Sampling

    model, tokenizer = ts.load(str(path), device="cpu")
    (answer,) = generate_answers(model, tokenizer, [ASKED], Sampling(0, 1, 0, 1), 6)
    prompt = torch.tensor([encode_prompt(tokenizer, ASKED)])
    other = AutoModelForCausalLM.from_pretrained(path)
    said = other.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return answer, said.shape[1] - prompt.shape[1]


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"eos_token_id": 5}, {}), ({"eos_token_id": [7, 5]}, {"eos_token_id": 0}), (None, {"eos_token_id": 5}),
        (None, {"eos_token_id": [5, 6]}),
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_ends_where_transformers_ends_it(saved, generation, config):
    always_says(saved, 5)
    assert lengths(saved)[0].finish_reason == "length"
    change_json(saved / "config.json", config)
    (saved / "generation_config.json").unlink()
    if generation:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    answer, theirs = lengths(saved)
    assert (answer.tokens, answer.finish_reason, theirs) == (1, "stop", 1)


def test_an_end_that_the_tokenizer_names_stops_an_answer_and_is_not_in_it(made):
    path = made("chatml")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(6146)
    model.config.eos_token_id = model.generation_config.eos_token_id = 6144
    model.save_pretrained(path)
    always_says(path, 6144)
    answer, theirs = lengths(path)
    assert (answer.text, answer.tokens, answer.finish_reason, theirs) == ("", 1, "stop", 1)


def test_a_model_named_without_its_end_keeps_gpt2s():
    content = Backend.from_file(str(SAMPLE / "tokenizer.json"))
    assert Tokenizer(content).end_of_text == content.token_to_id("<|endoftext|>")
