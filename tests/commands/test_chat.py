"""`tunesmith chat` as a user drives it: a real process, lines on its standard input."""

import json
import os
import subprocess
import sys

import pytest
import torch

import tunesmith as ts
from hanging import HANGS
from reference import saying
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import save_model
from tunesmith.generation.chat import ChatSession
from tunesmith.generation.engine import Answer, generate_answers
from tunesmith.generation.replies import model_source
from tunesmith.generation.sampling import Sampling
from tunesmith.models.gpt2 import GPT, GPTConfig

LIMIT = 24


def chat(directory, lines, *options, environment=None):
    argv = [sys.executable, "-m", "tunesmith", "chat", str(directory), "--device", "cpu"]
    argv += ["--generate.max_new_tokens", str(LIMIT), *options]
    done = subprocess.run(
        argv, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=HANGS, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def messages(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def test_a_conversation_with_every_command(tmp_path):
    """What is saved on the way must be what the library answers to the same conversation."""
    model, tokenizer = ts.load("sample", device="cpu")

    def answer(conversation, sample=0):
        return generate_answers(model, tokenizer, [conversation], Sampling(sample=sample), LIMIT)[0].text

    saved = [tmp_path / f"{i}.json" for i in range(5)]
    lost = tmp_path / "absent [b]" / "c.json"
    typed = ["What is love?", f"/save {saved[0]}", "/retry", f"/save {saved[1]}", "And hope?", f"/save {saved[2]}"]
    typed += ["/reset", "/retry", "/system Be brief.", "Hi", f"/save {saved[3]}", "/reset", "Bye", f"/save {saved[4]}"]
    typed += ["", "/help", f"/save {lost}", "/quit", "never read"]
    shown = chat("sample", typed)
    assert shown.startswith(f"sample, {model.parameter_count():,} parameters.")  # all of them, packed or not
    first = answer(messages("What is love?"))
    again = answer(messages("What is love?"), sample=1)
    then = answer(messages("What is love?", again, "And hope?"))
    scene = [{"role": "system", "content": "Be brief."}]
    brief, bye = answer(scene + messages("Hi")), answer(scene + messages("Bye"))
    assert [json.loads(path.read_text())["messages"] for path in saved] == [
        messages("What is love?", first),
        messages("What is love?", again),
        messages("What is love?", again, "And hope?", then),
        scene + messages("Hi", brief),
        scene + messages("Bye", bye),
    ]
    assert len({first, again, then, brief, bye}) == 5
    assert "never read" not in shown
    places = [shown.index(text) for text in (first, again, then, "no answer to try again", brief, bye, "/retry  ")]
    assert places == sorted(places)
    assert f"saved to {saved[0]}\n" in shown  # in one line, to be copied
    assert f"not saved: {lost}: No such file" in shown
    assert "left out" not in shown


def test_an_answer_is_shown_letter_for_letter(tmp_path):
    text = " :smile: [bold]no[/bold] \\[x]\n\n- a\n  - b\n" + "wide " * 40
    tokenizer = Tokenizer.load(SAMPLE)
    ids = [*tokenizer.encode(text), tokenizer.end_of_text]
    prompt = encode_prompt(tokenizer, messages("Hi"))
    save_model(saying(ids, len(prompt), block_size=len(prompt) + len(ids) + 1).float(), tokenizer, tmp_path / "m")
    shown = chat(tmp_path / "m", ["Hi"], "--generate.temperature", "0", "--generate.max_new_tokens", str(len(ids)))
    assert text[1:] in shown


def test_a_conversation_longer_than_the_models_positions_goes_on_and_says_what_it_forgets(tiny_directory, tmp_path):
    """The tiny model has 256 positions; eight questions of 30 words are more. The input ends without /quit."""
    lines = [*["why and how " * 10] * 8, f"/save {tmp_path}/c.json"]
    shown = chat(tiny_directory, lines, "--system", "Be brief.")
    saved = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert saved[0] == {"role": "system", "content": "Be brief."}
    assert [m["role"] for m in saved[1:]] == ["user", "assistant"] * 8
    assert 0 < shown.count("its beginning is left out") < 8


def test_bytes_that_are_not_utf_8_do_not_end_the_conversation(tiny_directory, tmp_path):
    """Latin-1, a byte that begins a character and breaks off, a byte of no encoding; and an option in Latin-1."""
    lines = [b"caf\xe9", b"na\xc3", "naïve".encode(), b"\x81?", f"/save {tmp_path}/c.json".encode(), b""]
    argv = [sys.executable, "-m", "tunesmith", "chat", str(tiny_directory), "--device", "cpu"]
    argv += ["--generate.max_new_tokens", "2", b"--system", b"Sois pr\xe9cis."]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales; in C Python forgives by itself
    done = subprocess.run(argv, input=b"\n".join(lines), capture_output=True, timeout=HANGS, check=False, env=strict)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"read as Latin-1") == 3
    saved = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["messages"]
    said = [m["content"] for m in saved if m["role"] != "assistant"]
    assert said == ["Sois précis.", "café", "naÃ", "naïve", "\x81?"]


def test_what_the_outputs_encoding_lacks_is_escaped(tmp_path):
    text = " naïve \x1b[2J日本\n"
    tokenizer = Tokenizer.load(SAMPLE)
    ids = [*tokenizer.encode(text), tokenizer.end_of_text]
    prompt = encode_prompt(tokenizer, messages("Hi"))
    save_model(saying(ids, len(prompt), block_size=len(prompt) + len(ids) + 1).float(), tokenizer, tmp_path / "m")
    options = ("--generate.temperature", "0", "--generate.max_new_tokens", str(len(ids)))
    shown = chat(tmp_path / "m", ["Hi"], *options, environment={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert r"model na\xefve \x1b[2J\u65e5\u672c" in shown


@pytest.mark.parametrize(("room", "reason"), [(3, "token limit"), (None, "context is full")])
def test_an_answer_that_was_cut_is_told(tmp_path, room, reason):
    tokenizer = Tokenizer.load(SAMPLE)
    ids = tokenizer.encode(" one two three four five six seven eight nine ten")[:8]
    prompt = encode_prompt(tokenizer, messages("Hi"))
    save_model(saying(ids, len(prompt), block_size=len(prompt) + 8).float(), tokenizer, tmp_path / "m")
    shown = chat(tmp_path / "m", ["Hi"], "--generate.temperature", "0", "--generate.max_new_tokens", str(room or 100))
    said = tokenizer.decode(ids[:room])[1:]
    assert f"model {said}\nthe answer was cut" in shown
    assert reason in shown


def test_without_a_model_an_example_is_shown():
    for argv in (["chat"], ["chat", "--system", "x"]):
        done = subprocess.run([sys.executable, "-m", "tunesmith", *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "tunesmith chat sample" in done.stderr
        assert len(done.stderr.splitlines()) == 1


# What a model hears of a long conversation


@pytest.fixture(scope="module")
def short_model(tokenizer_of_the_sample):
    """128 positions, random weights so large that its greedy answer depends on all it read."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer_of_the_sample.vocab_size, block_size=128)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer_of_the_sample():
    return Tokenizer.load(SAMPLE)


def replies(model, tokenizer, *lines):
    """Answers to the lines of one conversation with the default limit, each with its notes."""
    session = ChatSession(model_source(model, tokenizer, Sampling(0.0), 128))
    events = [list(session.send(line)) for line in lines]
    return ["".join(e for e in found if isinstance(e, str)) for found in events], events


def test_a_long_conversation_still_hears_the_question(short_model, tokenizer_of_the_sample):
    """With 128 positions and the default limit of 128 new tokens a question was cut to its last token."""
    before = ["Tell me about the sea and the wind and the rain."] * 4
    (*_, one), events = replies(short_model, tokenizer_of_the_sample, *before, "What about number seven?")
    (*_, two), _ = replies(short_model, tokenizer_of_the_sample, *before, "And how old are you now?")
    assert one != two
    assert "its beginning is left out" in events[-1][0].text


def test_no_length_of_a_question_leaves_an_answer_of_a_few_tokens(short_model, tokenizer_of_the_sample):
    """Just below the positions an answer had one to three tokens, while a longer question was cut and answered in full."""
    lengths = {}
    for words in range(1, 140):
        read = []

        def count(model, tokenizer, conversation, *rest, read=read, **options):
            read += encode_prompt(tokenizer, conversation)
            yield ""
            return Answer("", "stop", 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tunesmith.generation.replies.stream", count)
            replies(short_model, tokenizer_of_the_sample, "word " * words + "and this?")
        lengths[words] = len(read)
    assert min(lengths.values()) < 20
    assert 92 <= max(lengths.values()) <= 96  # a quarter of the positions is left for the answer
    assert all(lengths[w] >= 92 for w in lengths if w > 120)
