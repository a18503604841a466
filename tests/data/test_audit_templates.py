"""What an audit finds depends on the template: its own markers, white space that it keeps, rows that it refuses, answers without loss."""

import functools

import pytest

from planted_rows import found, turns, write
from public_templates import PUBLIC, ours_of
from tunesmith.commands.data import bracketed, coloured
from tunesmith.data.audit.survey import audit
from tunesmith.data.datasets import open_dataset
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

ours = functools.cache(lambda name: ours_of(PUBLIC[name]))
SYSTEM = {"role": "system", "content": "Be brief."}


def rows_of(*talks):
    return [{"messages": talk} for talk in talks]


def audited(name, path):
    (split,) = audit(open_dataset(DataOptions(name=str(path))), ours(name), block_size=256).splits
    return split


def refusals(split):
    return {f.what: (f.rows, f.places) for f in split.findings if f.kind == "refused"}


@pytest.mark.parametrize(
    ("name", "own", "foreign"),
    [
        ("smollm2", "a <|im_end|> b", "a <end_of_turn> b"),
        ("llama3", "<|eot_id|>", "[INST] a"),
        ("gemma2", "x<start_of_turn>", "<|im_start|>user"),
        ("zephyr", "one\n<|user|>\ntwo", "one\n\nHuman: two"),
        ("deepseek2", "one\nAssistant: two", "<|im_end|>"),
        ("openchat", "GPT4 Correct User: me", "Assistant: me\nHuman: you"),
    ],
)
def test_markers_are_those_of_the_template(tmp_path, name, own, foreign):
    rows = rows_of(turns("good", "fine"), turns("why", own), turns(foreign, "so"))
    split = audited(name, write(tmp_path / "rows.jsonl", rows))
    assert found(split) == {"role_marker": [2], "template_text": [3]}
    assert ours(name).template.leaks(own)
    assert not ours(name).template.leaks("The user: you. Model\nassistant\n")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("smollm2", {"turn_start": [2], "answer_end": [3], "prompt_space": [4]}),
        ("phi3", {"answer_end": [3], "prompt_space": [4]}),  # its tokenizer drops the space behind <|assistant|>
        ("llama3", {}),
        ("llama2", {}),
    ],
)
def test_white_space_counts_only_where_the_template_keeps_it(tmp_path, name, kept):
    rows = rows_of(turns("good", "fine"), turns("why", " so"), turns("a", "b\n"), turns("what ", "that"))
    split = audited(name, write(tmp_path / "rows.jsonl", rows))
    assert found(split) == kept


def test_rows_that_the_template_refuses_are_not_usable(tmp_path):
    talks = [turns("a", "b"), [SYSTEM, *turns("c", "d")], [*turns("e"), *turns("f", "g")], turns("h", "i")]
    split = audited("gemma2", write(tmp_path / "rows.jsonl", rows_of(*talks)))
    assert (split.rows, split.usable) == (4, 2)
    (system, at), (alternate, there) = refusals(split).items()
    assert "System role not supported" in system
    assert at == (1, ("rows.jsonl:2",))
    assert "must alternate" in alternate
    assert there == (1, ("rows.jsonl:3",))


def test_pairs_that_the_template_refuses_are_not_usable(tmp_path):
    rows = [
        {"prompt": [*system, *turns(f"{i}?")], "chosen": turns("", "yes")[1:], "rejected": turns("", "no")[1:]}
        for i, system in enumerate([[], [SYSTEM], []])
    ]
    split = audited("mistral01", write(tmp_path / "rows.jsonl", rows))
    assert (split.rows, split.usable) == (3, 2)
    assert [n for n, _ in refusals(split).values()] == [1]


def test_answers_that_the_template_rewrites_are_counted(tmp_path):
    split = audited("qwen3", write(tmp_path / "rows.jsonl", rows_of(turns("a", "b", "c", "d"), turns("e", "f"))))
    assert found(split) == {"not_learned": [1]}
    assert split.usable == 2


def test_a_template_of_which_nothing_can_be_learned_is_said_row_by_row_and_not_trained_on(tmp_path):
    """R1's distilled models: the prompt ends in `<think>`, which the template takes out of every answer."""
    path = write(tmp_path / "rows.jsonl", rows_of(turns("a", "b"), turns("c", "d", "e", "f")))
    split = audited("r1distill", path)
    ((reason, (rows, _)),) = refusals(split).items()
    assert (split.usable, rows) == (0, 2)
    assert r"puts '<think>\n' into the prompt" in reason
    with pytest.raises(UserError, match="has no usable row"):
        tokenise(open_dataset(DataOptions(name=str(path))), "train", ours("r1distill"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("llama2", "<s> [INST] Hi [/INST][ Hello </s>]<s> [INST] More </s>? [/INST][ Words </s>]"),
        ("mistral03", "<s>[INST] Hi[/INST][ Hello</s>][INST] More </s>?[/INST][ Words</s>]"),
        (
            "gemma3",
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[Hello<end_of_turn>]\n"
            "<start_of_turn>user\nMore </s>?<end_of_turn>\n<start_of_turn>model\n[Words<end_of_turn>]\n",
        ),
        (
            "qwen3",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nMore </s>?<|im_end|>\n"
            "<|im_start|>assistant\n[<think>\n\n</think>\n\nWords<|im_end|>]\n",
        ),
    ],
)
def test_a_row_is_shown_with_its_special_tokens_and_what_carries_loss(tmp_path, name, shown):
    path = write(tmp_path / "rows.jsonl", rows_of(turns("Hi", "Hello", "More </s>?", "Words")))
    store = tokenise(open_dataset(DataOptions(name=str(path))), "train", ours(name))
    assert bracketed(coloured(store, 0, "assistant", ours(name))) == shown
