"""Which form a model's dialogues have: its own chat_template, or the one that --chat.template names; from a file to an answer."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import tunesmith as ts
from tiny_runs import tiny_config
from tunesmith.__main__ import main
from tunesmith.data.chatml_template import CHATML
from tunesmith.data.chosen_template import chat_template
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Message
from tunesmith.data.hh_template import HH
from tunesmith.data.prompts import encode_answered, encode_prompt
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.files.names import SAMPLE, load_reward, load_tokenizer
from tunesmith.options.training import DataOptions, DPOConfig, RewardConfig

PLAIN = (  # needs no token but the end of text
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'A:' + ' ' + m.content + eos_token + '\\n' }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
DROPS = PLAIN.replace("m.content + eos", "(m.content if loop.last else m.content.split('</think>')[-1]) + eos")
ASKED = [{"role": "user", "content": "What is fog?"}]
QUICK = {"train__steps": 1, "eval__iters": 1, "data__max_rows": 20, "data__block_size": 64, "checkpoint__every": 1}


@pytest.fixture
def with_template(tmp_path):
    """(what stands in tokenizer_config.json, what in chat_template.jinja) -> a directory with the sample's tokenizer."""

    def write(stored, file=None):
        path = tmp_path / "model"
        shutil.copytree(SAMPLE, path, dirs_exist_ok=True)
        config = json.loads((path / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        config |= {} if stored is None else {"chat_template": stored}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        if file is not None:
            (path / "chat_template.jinja").write_text(file)
        return path

    return write


@pytest.mark.parametrize(
    ("stored", "file", "found"),
    [
        (PLAIN, None, PLAIN),
        (None, PLAIN, PLAIN),
        (DROPS, PLAIN, PLAIN),
        ([{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": PLAIN}], None, PLAIN),
        (None, None, HH.jinja),
        (HH.jinja, None, HH.jinja),
    ],
    ids=["config", "file", "file first", "default of several", "none", "our own"],
)
def test_a_models_own_template_is_found_as_transformers_finds_it(with_template, stored, file, found):
    directory = with_template(stored, file)
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.template.jinja == found
    assert (tokenizer.template is HH) == (found == HH.jinja)
    theirs = AutoTokenizer.from_pretrained(directory)
    if theirs.chat_template:
        told = [*ASKED, {"role": "assistant", "content": "A cloud."}]
        prompt = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        assert prompt == encode_prompt(tokenizer, ASKED)
        assert theirs.apply_chat_template(told, tokenize=False) == tokenizer.template.text(
            [Message(m["role"], m["content"]) for m in told]
        )


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ([{"name": "tool_use", "template": PLAIN}], r"a list without one named default \(tool_use\)"),
        (7, "chat_template is a int, expected a text"),
        ("{% for", "chat_template beside .*, line 1: .* not a Jinja template"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_and_another_can_be_chosen(with_template, stored, said):
    directory = str(with_template(stored))
    with pytest.raises(UserError, match=said):
        load_tokenizer(directory)
    with chat_template("hh"):
        assert load_tokenizer(directory).template is HH


def test_the_form_that_is_asked_for_holds_for_models_and_not_for_reward_models(tiny_directory, tmp_path):
    (tmp_path / "plain.jinja").write_text(PLAIN)
    judge = ts.train_reward_model(tiny_config(tiny_directory, tmp_path / "reward", RewardConfig, **QUICK))
    with chat_template(str(tmp_path / "plain.jinja")):
        assert load_tokenizer("gpt2").template.jinja == PLAIN
        assert ts.load(str(tiny_directory), device="cpu")[1].template.jinja == PLAIN
        assert load_reward(str(judge.path), device="cpu")[1].template is HH
    assert load_tokenizer("gpt2").template is HH


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatml", r"--chat.template chatml: the tokenizer has no token <\|im_"),
        ("chatlm", "--chat.template chatlm: no such file, and none of auto, hh, .* Did you mean chatml?"),
        ("broken.jinja", r"--chat.template broken.jinja: the template, line 2: .* not a Jinja template"),
    ],
)
def test_a_form_that_cannot_be_had_is_one_line(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{{ 1 }}\n{% if %}")
    with chat_template(name), pytest.raises(UserError, match=said):
        load_tokenizer("gpt2")


# ---- from a file to an answer --------------------------------------------------------------------------------------------


def test_a_run_trains_and_answers_in_the_form_asked_for_and_its_checkpoints_carry_it(tiny_directory, tmp_path, capfd):
    form = tmp_path / "plain.jinja"
    form.write_text(PLAIN)
    options = {**QUICK, "chat__template": str(form)}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "sft", **options, lora__rank=2))
    checkpoint = run.best_checkpoint()
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer = ts.load(str(run.path), device="cpu")[1]
    prompt = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert theirs.chat_template == tokenizer.template.jinja == PLAIN
    assert prompt == encode_prompt(tokenizer, ASKED) == encode_answered(tokenizer, [Message(**ASKED[0])], "Mist.")[0]
    stops = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.end_of_answer == tokenizer.special_id("<|endoftext|>")
    aligned = ts.dpo(tiny_config(run.path, tmp_path / "dpo", DPOConfig, **{**QUICK, "lora__rank": 2}))
    assert ts.load(str(aligned.path), device="cpu")[1].template.jinja == PLAIN, "auto is what the model came with"
    capfd.readouterr()
    assert main(["evaluate", str(run.path), "sample", "--data.max_rows", "20", "--device", "cpu"]) == 0
    assert main(["data", "sample", "--data.max_rows", "9", "--show", "1", "--chat.template", str(form)]) == 0
    assert "A:" in capfd.readouterr().out


def test_a_resumed_run_keeps_its_form(tiny_directory, tmp_path):
    form = tmp_path / "plain.jinja"
    form.write_text(PLAIN)
    options = {**QUICK, "optimizer__schedule": "constant"}
    run = ts.sft(tiny_config(tiny_directory, tmp_path / "r", **options, chat__template=str(form)))
    longer = {**options, "resume": True, "train__steps": 2}
    with pytest.raises(
        UserError, match=r"chat\.template was '.*plain\.jinja', now 'hh'.*chat template was jinja-\w+, now hh"
    ):
        ts.sft(tiny_config(tiny_directory, run.path, **longer, chat__template="hh"))
    form.write_text(PLAIN.replace("Q: ", "Q:"))
    with pytest.raises(UserError, match=r"the chat template was jinja-\w+, now jinja-\w+"):
        ts.sft(tiny_config(tiny_directory, run.path, **longer))
    form.write_text(PLAIN)
    assert ts.sft(tiny_config(tiny_directory, run.path, **longer)).status["step"] == 2  # auto: what it began with


def test_a_run_finds_the_file_of_its_form_where_both_were_moved(tiny_directory, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "plain.jinja").write_text(PLAIN)
    options = {**QUICK, "optimizer__schedule": "constant"}
    ts.sft(tiny_config(tiny_directory, first / "r", **options, chat__template=str(first / "plain.jinja")))
    first.rename(second)
    run = ts.sft(tiny_config(tiny_directory, second / "r", **{**options, "resume": True, "train__steps": 2}))
    assert run.status["step"] == 2
    (second / "plain.jinja").unlink()
    with pytest.raises(UserError, match=r"plain\.jinja.*, which the run began with, is not there"):
        ts.sft(tiny_config(tiny_directory, second / "r", **{**options, "resume": True, "train__steps": 3}))


def stored(path, rows, template, form="dialogues"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.load(SAMPLE)
    tokenizer.use(template)
    return tokenise(open_dataset(DataOptions(name=str(path))), "train", tokenizer, form=form), tokenizer


def row(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_rows_that_a_template_refuses_are_counted_with_its_words(tmp_path):
    good, bad = row(("user", "a"), ("assistant", "b")), row(("system", "s"), ("user", "a"), ("assistant", "b"))
    store, _ = stored(tmp_path / "a.jsonl", [good, bad, good], PLAIN)
    assert (len(store), store.report.rows, store.report.used) == (2, 3, 2)
    assert store.report.bad == {"chat_template: no system turns here": 1}
    assert store.report.places["chat_template: no system turns here"] == ["a.jsonl:2"]
    with pytest.raises(UserError, match=r"has no usable row in .*: 1 skipped: chat_template: no system turns here"):
        stored(tmp_path / "b.jsonl", [bad], PLAIN)


def test_answers_that_a_template_rewrites_are_read_not_learned_and_counted(tmp_path):
    thought = row(
        ("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "<think>ah</think>d")
    )
    plain = row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    store, tokenizer = stored(tmp_path / "a.jsonl", [thought, plain], DROPS)
    assert any(note.startswith("1 of 4 answers are read but not learned") for note in store.report.notes)
    told = [tokenizer.decode([t for t in store.row(i, "assistant")[1].tolist() if t >= 0]) for i in range(2)]
    assert told == [" <think>ah</think>d", " b d"]
    assert "hm" not in tokenizer.decode(store.row(0, "assistant")[0].tolist()), "the row is what the template writes"


def test_a_row_of_which_nothing_can_be_learned_is_counted_with_the_reason(tmp_path):
    blank = PLAIN.replace("'A:' }}{% endif %}", "'A: <think>\\n' }}{% endif %}")
    with pytest.raises(UserError, match=r"puts '<think>\\n' into the prompt for an answer, but not before the answer"):
        stored(tmp_path / "a.jsonl", [row(("user", "a"), ("assistant", "b"))], blank)
    pair = {"prompt": "Who?", "chosen": "A model.", "rejected": "Nobody"}
    with pytest.raises(UserError, match="into the prompt for an answer"):
        stored(tmp_path / "b.jsonl", [pair], blank, "pairs")


def test_a_chat_template_that_is_one_of_ours_is_that_one():
    backend = Tokenizer.load(SAMPLE)._stored
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(backend)
    tokenizer.use(CHATML.jinja)
    assert tokenizer.template is CHATML
    assert tokenizer.end_of_answer == tokenizer.special_id("<|im_end|>")
