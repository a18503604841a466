"""The laws of a template, for every one there is; one of another kind, made up here, all the way from a file to an answer.

A new template in `TEMPLATES` is held to all laws without a line here.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reference import marked, random_model, saying
from tunesmith.commands.data import bracketed, coloured
from tunesmith.data.audit.survey import audit
from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Message
from tunesmith.data.encoding import END, IGNORE_INDEX, NEXT, encode_rows, targets_of
from tunesmith.data.epochs import Batches, BatchLayout
from tunesmith.data.pairs import PairRows
from tunesmith.data.pairstore import PairStore
from tunesmith.data.prompts import encode_answered, encode_prompt
from tunesmith.data.special_tokens import read_special_tokens
from tunesmith.data.template import Segment, Template
from tunesmith.data.templates import TEMPLATES
from tunesmith.data.texts import text_rows
from tunesmith.data.token_bytes import text_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.files.answers import ANSWER_END, ScoredAnswer
from tunesmith.files.names import SAMPLE
from tunesmith.generation.engine import generate_answers, stream
from tunesmith.generation.logprobs import encode_answers, logps_of_both, token_texts
from tunesmith.generation.sampling import Sampling
from tunesmith.models.gpt2 import GPTConfig
from tunesmith.options.training import DataOptions
from tunesmith.train.token_loss import answer_losses

SRC = Path(__file__).parents[2] / "src" / "tunesmith"
GREEDY = Sampling(temperature=0)
TURNS = [
    Message("system", "Be brief."),
    Message("user", "Who are you?"),
    Message("assistant", "A model."),
    Message("user", "Of what?"),
    Message("assistant", "Words."),
]


# ---- a template unlike the first: special tokens, an end that is read, a folded system turn ----------------------------


def _tagged(messages, answer_follows):
    """`<|start|>`, then `<|turn|>user\\n...<|done|>\\n` for every turn; a system turn becomes the beginning of the next one."""
    pieces, scene = [Segment("<|start|>", special=True)], ""
    for m in messages:
        if m.role == "system":
            scene += m.content + "\n\n"
            continue
        learned = m.role == "assistant" and m.weight != 0
        head = [Segment("assistant\n"), Segment(m.content, learned)]
        words = head if m.role == "assistant" else [Segment(f"user\n{scene}{m.content}")]
        end = Segment("<|done|>", learned, special=True)
        pieces += [Segment("<|turn|>", special=True), *(s for s in words if s.text), end, Segment("\n")]
        scene = ""
    return [*pieces, Segment("<|turn|>", special=True), Segment("assistant\n")] if answer_follows else pieces


TAGGED = Template(
    name="tagged",
    segments=_tagged,
    jinja=(
        "{{- '<|start|>' -}}{%- set ns = namespace(scene='') -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}{%- set ns.scene = ns.scene + m['content'] + '\n\n' -%}{%- else -%}"
        "{{- '<|turn|>' + m['role'] + '\n' + ns.scene + m['content'] + '<|done|>\n' -}}{%- set ns.scene = '' -%}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|turn|>assistant\n' -}}{%- endif -%}"
    ),
    end="<|done|>",
)
ALL = {**TEMPLATES, TAGGED.name: TAGGED}


def tokenizer_of(template):
    """The sample model's tokenizer with the special tokens that a template needs."""
    needed = dict.fromkeys(s.text for s in template.segments(TURNS, True) if s.special)
    backend = tokenizers.Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in needed])
    return Tokenizer(backend, special=read_special_tokens(SAMPLE), template=template)


TOKENIZERS = {name: tokenizer_of(template) for name, template in ALL.items()}
every_template = pytest.mark.parametrize("name", ALL)

plain = st.from_regex(re.compile(r"[a-z<|'?.é]{1,8}( [a-z<|'?.é]{1,8}){0,4}", re.ASCII), fullmatch=True)
said = st.sampled_from(["<|done|>", "say <|endoftext|>", "one\n\ntwo", "x"]) | plain
exchanges = st.lists(st.tuples(said, said, st.sampled_from([1, 1, 0])), min_size=1, max_size=4)
dialogues = st.builds(
    lambda scene, turns: [
        *([Message("system", scene)] if scene else []),
        *(m for q, a, w in turns for m in (Message("user", q), Message("assistant", a, weight=w))),
    ],
    st.none() | said,
    exchanges,
)


def encoded(tokenizer, messages):
    ids, flags, _ = encode_rows([tokenizer.begun(tokenizer.template.segments(messages, False))], tokenizer)
    return ids, flags


# ---- laws ------------------------------------------------------------------------------------------------------------


@every_template
@settings(max_examples=60)
@given(messages=dialogues)
def test_the_targets_are_exactly_the_assistants_words_each_answer_with_its_end(name, messages):
    tokenizer = TOKENIZERS[name]
    ids, flags = encoded(tokenizer, messages)
    targets = targets_of(ids, flags, tokenizer.end_of_text)
    answers, current = [], []
    for target in targets[targets != IGNORE_INDEX].tolist():
        current.append(target)
        if target == tokenizer.end_of_answer:
            answers.append(tokenizer.template.words(tokenizer.decode(current)))
            current = []
    assert current == [], "the last target is an end"
    assert answers == [m.content for m in messages if m.role == "assistant" and m.weight]
    assert np.count_nonzero(flags & END) == len(answers)


@every_template
@settings(max_examples=60)
@given(messages=dialogues)
def test_what_is_read_before_an_answer_is_what_was_read_in_training(name, messages):
    tokenizer = TOKENIZERS[name]
    ids = encoded(tokenizer, messages)[0].tolist()
    for number, message in enumerate(messages):
        if message.role == "assistant":
            prompt = encode_prompt(tokenizer, messages[:number])
            before, words = encode_answered(tokenizer, messages[:number], message.content)
            assert before == prompt == ids[: len(prompt)]
            assert words == ids[len(prompt) : len(prompt) + len(words)]
            assert tokenizer.template.words(tokenizer.decode(words)) == message.content


@every_template
@settings(max_examples=60)
@given(rows=st.lists(dialogues, min_size=1, max_size=4))
def test_many_rows_are_encoded_as_segment_by_segment(name, rows):
    tokenizer = TOKENIZERS[name]
    cut = [tokenizer.begun(tokenizer.template.segments(messages, False)) for messages in rows]
    expected = [marked(row, tokenizer) for row in cut]
    ids, flags, counts = encode_rows(cut, tokenizer)
    assert ids.tolist() == [i for row, _ in expected for i in row]
    assert flags.tolist() == [flag for _, bits in expected for flag in bits]
    assert counts.tolist() == [len(row) for row, _ in expected]


@every_template
@settings(max_examples=60)
@given(messages=dialogues)
def test_without_loss_it_is_the_same_text(name, messages):
    template, tokenizer = ALL[name], TOKENIZERS[name]
    whole = template.whole(messages)
    assert "".join(s.text for s in whole) == template.text(messages)
    assert not any(s.loss or s.closes for s in whole)
    ids = [i for part in tokenizer.encode_segments(whole) for i in part]
    assert tokenizer.decode(ids) == tokenizer.decode(encoded(tokenizer, messages)[0].tolist())


@every_template
@settings(max_examples=200)
@given(data=st.data(), start=st.text(max_size=8))
def test_what_is_settled_of_an_answer_stays_however_it_goes_on(name, data, start):
    template = ALL[name]
    pieces = st.sampled_from([*template.stop_texts, "\n", "\n\n", "Hu", "a", ":", " "])
    answer = start + "".join(data.draw(st.lists(pieces, max_size=6)))
    whole = template.cut_at_stop(answer)[0]
    for length in range(len(answer) + 1):
        shown = template.cut_at_stop(answer[:length])[0]
        settled = template.settled(shown)
        assert whole.startswith(shown[:settled])
        held = shown[settled:]
        assert not held or any(stop.startswith(held) for stop in template.stop_texts), "no more than may become a stop"


@pytest.fixture(scope="module", params=ALL)
def saved(request, tmp_path_factory):
    """A tokenizer, and what transformers makes of its files."""
    path = tmp_path_factory.mktemp(request.param)
    TOKENIZERS[request.param].save(path, 1024)
    return TOKENIZERS[request.param], AutoTokenizer.from_pretrained(path), path


def test_transformers_renders_the_same_tokens_and_text(saved):
    tokenizer, theirs, _ = saved
    messages = [{"role": m.role, "content": m.content} for m in TURNS]
    rendered = theirs.apply_chat_template(messages, return_dict=False)
    assert rendered == encoded(tokenizer, TURNS)[0].tolist()
    asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert asked == encode_prompt(tokenizer, TURNS[:-1])
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.template.text(TURNS)


def test_transformers_stops_at_the_same_tokens(saved):
    tokenizer, _, path = saved
    ends = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    assert {*(ends if isinstance(ends, list) else [ends])} == tokenizer.stops >= {tokenizer.end_of_answer}


# ---- the second template, from a file to an answer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged():
    return TOKENIZERS["tagged"]


def stored(path, rows, tokenizer, form="dialogues"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenise(open_dataset(DataOptions(name=str(path))), "train", tokenizer, form=form)


ROW = {"messages": [{"role": m.role, "content": m.content} for m in TURNS]}
PAIR = {"prompt": "Who?", "chosen": "A model.", "rejected": "Nobody"}


def test_an_end_that_stands_in_the_row_is_input_and_target(tagged, tmp_path):
    """Every token with what it teaches, by hand."""
    tokens, targets = stored(tmp_path / "a.jsonl", [ROW], tagged).row(0, "assistant")
    names = [tagged._backend.id_to_token(t) for t in tokens.tolist()]
    shown = "".join(name.replace("Ġ", " ").replace("Ċ", "\n") for name in names)
    assert shown == (
        "<|start|><|turn|>user\nBe brief.\n\nWho are you?<|done|>\n<|turn|>assistant\nA model.<|done|>\n"
        "<|turn|>user\nOf what?<|done|>\n<|turn|>assistant\nWords.<|done|>\n"
    )
    done = tagged.end_of_answer
    assert tokens.tolist().count(done) == 4, "of the questions too"
    assert (targets == done).sum() == 2, "but only an answer's is learned"
    assert tagged.end_of_text not in targets
    learned = np.flatnonzero(targets != IGNORE_INDEX)
    assert np.array_equal(targets[learned], tokens[learned + 1])
    assert tagged.decode(targets[learned].tolist()) == "A model.Words."


def test_bits_say_next_and_end_before_an_end_that_stands_in_the_row(tagged):
    ids, flags = encoded(tagged, [Message("user", "a"), Message("assistant", "x")])
    (end,) = np.flatnonzero(flags & END)
    assert flags[end] == NEXT | END
    assert ids[end + 1] == tagged.end_of_answer


def test_a_stored_row_of_another_template_is_another_entry_of_the_cache(tagged, tmp_path):
    path = tmp_path / "a.jsonl"
    ours = stored(path, [ROW], tagged)
    as_hh = stored(path, [ROW], Tokenizer(tagged._stored, special=tagged.special))
    assert not np.array_equal(ours.tokens, as_hh.tokens)


def test_rows_for_windows_keep_their_special_tokens(tagged, tmp_path):
    tokens, targets = stored(tmp_path / "a.jsonl", [ROW], tagged, "texts").row(0, "all")
    assert tokens.tolist() == encoded(tagged, TURNS)[0].tolist()
    assert targets.tolist() == [*tokens[1:].tolist(), tagged.end_of_text]


def test_the_end_of_a_pairs_answers_is_their_last_target_and_no_input(tagged, tmp_path):
    store = PairStore(stored(tmp_path / "pairs.jsonl", [PAIR], tagged, "pairs"))
    layout = BatchLayout(batching="padded", block_size=64, batch_size=1, seed=0)
    batch = Batches(PairRows(store, [0], layout))[0]
    first, second = batch.lengths
    targets = batch.targets.tolist()
    assert targets[first - 1] == targets[first + second - 1] == tagged.end_of_answer
    assert tagged.decode(targets[:first]) == "A model."
    prompt, chosen, rejected = (part.tolist() for part in store.tokens(0))
    assert prompt == encode_prompt(tagged, [{"role": "user", "content": "Who?"}])
    assert tagged.end_of_answer not in chosen + rejected


def test_losses_are_split_into_answers_at_their_ends(tagged, tmp_path):
    store = stored(tmp_path / "a.jsonl", [ROW, ROW], tagged)
    layout = BatchLayout(batching="packed", block_size=64, batch_size=1, loss_on="assistant")
    model = random_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=tagged.vocab_size))
    losses = answer_losses(model, Batches(text_rows(store, range(2), layout)))
    sizes = [len(tagged.encode(text)) + 1 for text in ("A model.", "Words.")]
    assert [(loss.turn, loss.tokens) for loss in losses] == [(1, sizes[0]), (2, sizes[1])] * 2


def test_a_row_is_shown_with_its_ends(tagged, tmp_path):
    store = stored(tmp_path / "a.jsonl", [ROW], tagged)
    shown = bracketed(coloured(store, 0, "assistant", tagged))
    assert shown == (
        "<|start|><|turn|>user\nBe brief.\n\nWho are you?<|done|>\n<|turn|>assistant\n[A model.<|done|>]\n"
        "<|turn|>user\nOf what?<|done|>\n<|turn|>assistant\n[Words.<|done|>]\n"
    )


def test_the_bytes_of_targets_leave_the_end_of_an_answer_out(tagged):
    assert text_bytes(tagged, [*tagged.encode("four"), tagged.end_of_answer, tagged.end_of_text]) == 4


def test_pairs_are_looked_over_in_the_template_of_the_model(tagged, tmp_path):
    bad = {"prompt": "Who?", "chosen": "The same", "rejected": "The same"}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (PAIR, PAIR | {"chosen": "I"}, bad))
    )
    (train,) = audit(open_dataset(DataOptions(name=str(tmp_path / "pairs.jsonl"))), tagged, block_size=64).splits[:1]
    assert train.usable == 2


def test_an_audit_looks_for_the_markers_of_the_models_template(tagged, tmp_path):
    """HH's space before an answer means nothing in a form without one; a text that ends an answer in it is a marker."""
    rows = ["\n\nHuman:Hi\n\nAssistant:Hello", "\n\nHuman: Hi\n\nAssistant: Hello ## Me: no"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = open_dataset(DataOptions(name=str(tmp_path / "rows.jsonl")))
    here = Tokenizer(
        tagged._stored, special=tagged.special, template=dataclasses.replace(TAGGED, stop_texts=("## Me:",))
    )
    for tokenizer, lead, marker in ((here, 0, 1), (Tokenizer.gpt2(), 1, 0)):
        (split,) = audit(source, tokenizer, block_size=64).splits
        found = {f.kind: f.rows for f in split.findings}
        assert (found["turn_start"], found["role_marker"]) == (lead, marker)


def test_models_of_two_templates_are_not_compared_token_by_token(tagged):
    assert tagged.same_tokens(tokenizer_of(TAGGED))
    assert not tagged.same_tokens(Tokenizer(tagged._stored, special=tagged.special))


@pytest.mark.parametrize("ending", ["end_of_answer", "end_of_text"])
def test_an_answer_stops_at_the_templates_end_and_at_the_end_of_text(tagged, ending):
    asked = [Message("user", "Who are you?")]
    prompt = encode_prompt(tagged, asked)
    ids = [*tagged.encode("A model.\n\nHuman: no marker here"), getattr(tagged, ending)]
    model = saying(ids, len(prompt), vocab_size=tagged.vocab_size)
    (answer,) = generate_answers(model, tagged, [asked], GREEDY, 30)
    assert answer.text == "A model.\n\nHuman: no marker here"
    assert (answer.finish_reason, answer.tokens) == ("stop", len(ids))
    pieces = list(stream(model, tagged, asked, GREEDY, 30))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 5, "nothing is held back where no text ends an answer"


def test_an_answer_is_compared_with_its_end(tagged):
    a, b = (ScoredAnswer("Who?", "", text, "stop", 1) for text in ("A model.", "Nobody"))
    two = encode_answers(tagged, a, b)
    assert token_texts(tagged, two)[0][-1] == ANSWER_END
    assert "".join(token_texts(tagged, two)[0][:-1]) == "A model."
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=tagged.vocab_size)
    model = random_model(config, dtype=torch.float64)
    ((of_a, _),) = logps_of_both(model, [two], tagged.end_of_answer)
    with torch.no_grad():
        logps = model.lm_head(model(torch.tensor([two.prompt + two.answers[0]])))[0].log_softmax(1)
    targets = [*two.answers[0], tagged.end_of_answer]
    assert of_a == pytest.approx([logps[len(two.prompt) - 1 + i, t].item() for i, t in enumerate(targets)])


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused():
    backend = tokenizers.Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no token <\|done\|>"):
        Tokenizer(backend, template=TAGGED)


# ---- nobody else knows ------------------------------------------------------------------------------------------------

MARKER = re.compile(r"(?<!Open)(?:Human|Assistant)|\bSystem:")  # OpenAssistant is a data set and a model
KNOWS_MARKERS = {"data/hh_template.py"}
KNOWS_THE_END_OF_TEXT = {
    "data/tokenizer.py": "has it",
    "data/token_bytes.py": "has no bytes",
    "data/encoding.py": "the target where an answer's end does not stand in the row, or a text is over",
    "data/tokenstore.py": "hands it on",
    "data/texts.py": "stands between the texts of windows, and pads",
    "files/weights.py": "eos_token_id of config.json",
    "files/reward_models.py": "the same",
    "commands/data.py": "shows it",
}


def files_with(pattern):
    return {p.relative_to(SRC).as_posix() for p in SRC.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))}


def test_role_markers_stand_in_their_template_alone():
    assert files_with(MARKER) == KNOWS_MARKERS


def test_few_know_the_end_of_text():
    """An answer's end is `end_of_answer` and `stops`; who reads `end_of_text` for it would be right for the HH form alone."""
    assert files_with(re.compile(r"\bend_of_text\b")) == set(KNOWS_THE_END_OF_TEXT)
