"""`tunesmith chat` as a user drives it: a real process, lines on its standard input."""

import json
import subprocess
import sys

import tunesmith as ts
from reference import saying
from tunesmith.data.prompts import encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.files.names import SAMPLE
from tunesmith.files.weights import save_model
from tunesmith.generation.engine import generate_answers
from tunesmith.generation.sampling import Sampling

LIMIT = 24


def chat(directory, lines, *options):
    argv = [sys.executable, "-m", "tunesmith", "chat", str(directory), "--device", "cpu"]
    argv += ["--generate.max_new_tokens", str(LIMIT), *options]
    done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60, check=False)
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
