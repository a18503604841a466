"""What cutting costs and what length gives away: the audit's counts against plain recounts, on real pairs and on made rows."""

import gzip
import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest

from planted_rows import audited, found, transcript, turns, write
from tunesmith.__main__ import main
from tunesmith.data.audit.cuts import END_CUT, OWN, SHARED
from tunesmith.data.audit.survey import audit
from tunesmith.data.datasets import open_dataset
from tunesmith.options.training import DataOptions

ASSISTANT = "\n\nAssistant:"


@pytest.fixture(scope="module")
def hh(shared_data):
    folder = shared_data / "hh-rlhf" / "harmless-base"
    return {
        split: [json.loads(line) for line in gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8")]
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def hh_at(shared_data, tokenizer):
    """The audit of these rows at a block size and a rule."""
    source = open_dataset(DataOptions(name="hh:harmless-base", root=str(shared_data / "hh-rlhf")))

    def at(block_size, truncation="auto"):
        result = audit(source, tokenizer, block_size=block_size, truncation=truncation)
        return {split.split: split for split in result.splits}

    return at


def cut_of(split, rule, form="pairs"):
    (cut,) = [c for c in split.cuts if (c.rule, c.form) == (rule, form)]
    return cut


def parts(text):
    at = text.rindex(ASSISTANT) + len(ASSISTANT)
    return text[:at], text[at:]


# ---- the counts of 3d, by a script that shares no code with the audit but the tokenizer ----------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [128, 256, 512, 1024])
def test_right_truncation_of_real_pairs_is_as_a_ten_line_script_counts_it(hh, hh_at, tokenizer, split, size):
    end = [tokenizer.end_of_text]
    chosen, rejected = (
        [ids + end for ids in tokenizer.encode_batch([r[k] for r in hh[split]])] for k in ("chosen", "rejected")
    )
    prompts = tokenizer.encode_batch([parts(r["chosen"])[0] for r in hh[split]])
    both = list(zip(chosen, rejected, strict=True))
    identical = [i for i, (a, b) in enumerate(both, 1) if a[:size] == b[:size]]
    truncated = [i for i, (a, b) in enumerate(both, 1) if len(a) > size or len(b) > size]
    cut = cut_of(hh_at(size)[split], END_CUT)
    assert (cut.rows, cut.cut, cut.no_signal) == (len(both), len(truncated), len(identical))
    assert cut.end_lost == sum(len(a) > size for a in chosen)
    assert cut.prompt_end_lost == sum(len(p) > size for p in prompts)
    assert cut.longest == max(len(ids) for ids in chosen + rejected)
    assert cut.places == tuple(f"{split}.jsonl.gz:{i}" for i in truncated[:3])
    assert cut.no_signal_places == tuple(f"{split}.jsonl.gz:{i}" for i in identical[:3])


def test_the_counts_at_the_courses_block_size_are_the_known_ones(hh_at):
    """pains-and-checks 3d has 12.0 % identical, 23.2 % truncated and 18.5 % of ends lost on all 2,312 rows; this is on 1,500."""
    train, test = (cut_of(split, END_CUT) for split in hh_at(256).values())
    assert (test.no_signal, test.cut / test.rows, test.end_lost / test.rows) == (24, 0.26, 0.205)
    assert (train.no_signal, round(train.cut / train.rows, 3), train.end_lost / train.rows) == (150, 0.225, 0.18)


@pytest.mark.parametrize("split", ["train", "test"])
def test_defects_of_real_pairs_are_as_a_ten_line_script_counts_them(hh, hh_at, split):
    expected = {}
    for i, row in enumerate(hh[split], 1):
        (p, a), (q, b) = parts(row["chosen"]), parts(row["rejected"])
        roles = [re.findall(r"\n\n(Human|Assistant):", row[k]) for k in ("chosen", "rejected")]
        bodies = [t for k in ("chosen", "rejected") for t in re.split(r"\n\n(?:Human|Assistant):", row[k])[1:]]
        for kind, wrong in {
            "empty_chosen": not a.strip(), "empty_rejected": not b.strip(), "prompts_differ": p != q,
            "same_answers": row["chosen"] == row["rejected"],
            "repeated_role": any(x == y for names in roles for x, y in pairwise(names)),
            "turn_start": any(not re.match(r" \S", t) for t in bodies if t.strip()),
            "role_marker": any(re.search(r"(^ ?|\n[ \t]*)(Human|Assistant):", t) for t in bodies),
        }.items():  # fmt: skip
            expected.setdefault(kind, []).extend([i] if wrong else [])
    assert found(hh_at(256)[split]) == {kind: lines for kind, lines in expected.items() if lines}


def test_the_known_defects_are_one_pair_of_two_prompts_and_four_empty_answers(hh_at):
    rows = hh_at(256).values()
    assert sum(len(found(s).get("prompts_differ", [])) for s in rows) == 1
    assert sum(len(found(s).get("empty_chosen", [])) + len(found(s).get("empty_rejected", [])) for s in rows) == 4
    assert sum(s.usable for s in rows) == 1495


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengths_and_their_bias_on_real_pairs_are_as_a_plain_script_counts_them(hh, hh_at, tokenizer, split):
    rows = [(parts(r["chosen"]), parts(r["rejected"])) for r in hh[split]]
    rows = [(p, a, b) for (p, a), (q, b) in rows if p == q and a.strip() and b.strip()]
    prompt, a, b = ([len(ids) for ids in tokenizer.encode_batch(list(texts))] for texts in zip(*rows, strict=True))
    result = hh_at(256)[split]
    for name, lengths in {"prompt": prompt, "chosen": a, "rejected": b}.items():
        got = result.lengths[name]
        assert (got.mean, got.median, got.longest) == (pytest.approx(mean(lengths)), median(lengths), max(lengths))
    n, longer, equal = (
        len(a),
        sum(x > y for x, y in zip(a, b, strict=True)),
        sum(x == y for x, y in zip(a, b, strict=True)),
    )
    for share, k in ((result.bias.longer, longer), (result.bias.equal, equal), (result.bias.rule, longer + equal / 2)):
        p, z = k / n, 1.959963984540054  # Wilson 1927
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        assert (share.mean, share.low, share.high) == pytest.approx((p, middle - half, middle + half))
        assert share.n == n


def test_over_all_real_pairs_the_longer_answer_is_the_chosen_one_in_44_percent(hh_at):
    splits = hh_at(256).values()
    n = sum(s.bias.rule.n for s in splits)
    assert round(sum(s.bias.rule.mean * s.bias.rule.n for s in splits) / n, 2) == 0.44


def test_prompts_of_real_pairs_in_a_train_and_a_test_set_are_compared_as_plain_sets(hh, hh_at):
    plain = {s: [" ".join(parts(r["chosen"])[0].lower().split()) for r in hh[s]] for s in hh}
    (leak,) = hh_at(256)["test"].overlaps
    shared = [i for i, p in enumerate(plain["test"], 1) if p in set(plain["train"])]
    assert leak.prompts == len(shared) > 0
    assert [int(p.partition(" = ")[0].rpartition(":")[2]) for p in leak.places] == shared
    assert leak.texts == 0


def test_a_space_after_every_real_prompt_is_told_for_every_row(hh, tokenizer, tmp_path):
    rows = []
    for r in hh["test"]:
        (prompt, chosen), (_, rejected) = parts(r["chosen"]), parts(r["rejected"])
        rows.append({"prompt": prompt + " ", "chosen": chosen[1:], "rejected": rejected[1:]})
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows)).splits
    assert found(split)["prompt_space"] == list(range(1, 201))


# ---- the other rules, on lists ---------------------------------------------------------------------------------------


def proportional(source, target, cutoff):
    """LLaMA-Factory's `infer_seqlen`, written as it is there."""
    if target * 2 < cutoff:
        most = cutoff
    elif source * 2 < cutoff:
        most = cutoff - source
    else:
        most = int(cutoff * (target / (source + target)))
    new_target = min(most, target)
    return min(max(cutoff - new_target, 0), source), new_target


def usable(hh, split, tokenizer):
    rows = [(parts(r["chosen"]), parts(r["rejected"])) for r in hh[split]]
    rows = [(p, a, b) for (p, a), (q, b) in rows if p == q and a.strip() and b.strip()]
    return list(zip(*(tokenizer.encode_batch(list(texts)) for texts in zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_cutting_in_proportion_is_as_counted_pair_by_pair(hh, hh_at, tokenizer, size):
    end, wanted = [tokenizer.end_of_text], [0, 0, 0, 0]
    for prompt, a, b in usable(hh, "test", tokenizer):
        p, t = proportional(len(prompt), max(len(a), len(b)) + 1, size)
        changed = p < len(prompt) or t < max(len(a), len(b)) + 1
        for i, true in enumerate((changed, (a + end)[:t] == (b + end)[:t], len(a) + 1 > t, p < len(prompt))):
            wanted[i] += true
    cut = cut_of(hh_at(size)["test"], SHARED)
    assert [cut.cut, cut.no_signal, cut.end_lost, cut.prompt_end_lost] == wanted
    assert wanted[0] > 0
    assert cut.left_out == cut.prompt_start_lost == 0


@pytest.mark.parametrize("rule", ["auto", "keep_end", "keep_start", "drop"])
@pytest.mark.parametrize("size", [64, 256, 1024])
def test_our_own_rules_on_pairs_are_as_counted_pair_by_pair(hh, hh_at, tokenizer, size, rule):
    wanted = dict.fromkeys(("cut", "left_out", "no_signal", "end_lost", "prompt_start_lost", "prompt_end_lost"), 0)
    for prompt, a, b in usable(hh, "test", tokenizer):
        over = len(prompt) + max(len(a), len(b)) - size
        if over <= 0:
            continue
        wanted["cut"] += 1
        if rule == "drop":
            wanted["left_out"] += 1
        elif rule == "keep_start":
            x, y = (prompt + a)[:size], (prompt + b)[:size]
            same = x == y and len(prompt + a) >= size and len(prompt + b) >= size
            same = same and (len(prompt + a) > size) == (len(prompt + b) > size)
            wanted["no_signal"] += same
            wanted["left_out"] += same
            wanted["end_lost"] += not same and len(prompt + a) > size
        elif over >= len(prompt):
            wanted["left_out"] += 1
        else:
            wanted["prompt_start_lost"] += 1
    cut = cut_of(hh_at(size, rule)["test"], OWN)
    assert {name: getattr(cut, name) for name in wanted} == wanted
    assert (wanted["cut"] > 0) == (size < 1024)


# ---- dialogues and texts ---------------------------------------------------------------------------------------------

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def made_dialogues():
    """Of 1 to 4 exchanges, some with a question that is never answered at the end, some with a long one; and texts."""
    rng = random.Random(5)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    rows = [turns(*[words(14) for _ in range(2 * rng.randint(1, 4))]) for _ in range(60)]
    rows += [turns(words(6), words(6), words(40)) for _ in range(20)] + [turns(words(60), words(9)) for _ in range(20)]
    return [{"messages": row} for row in rows], [{"text": words(60)} for _ in range(40)]


def plain_pieces(tokenizer, messages):
    """(ids, whether an answer) in turn."""
    pieces, context = [], ""
    for m in messages:
        context += f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}:"
        if m["role"] == "assistant":
            pieces += [(tokenizer.encode(context), False), (tokenizer.encode(" " + m["content"]), True)]
            context = ""
        else:
            context += " " + m["content"]
    return pieces + ([(tokenizer.encode(context), False)] if context else [])


def plain_counts(tokenizer, rows, size, rule):
    """By a list of numbers of the tokens that are kept; `end cut off` needs room for one more at the end."""
    wanted = dict.fromkeys(("cut", "left_out", "no_signal", "end_lost", "prompt_start_lost", "prompt_end_lost"), 0)
    for row in rows:
        answers, n = [], 0
        for ids, answer in (
            plain_pieces(tokenizer, row["messages"]) if "messages" in row else [(tokenizer.encode(row["text"]), True)]
        ):
            answers += [range(n, n + len(ids))] if answer else []
            n += len(ids)
        if n + (rule == END_CUT) <= size:
            continue
        wanted["cut"] += 1
        kept = {
            END_CUT: range(size), "keep_start": range(size), "keep_end": range(n - size, n), "split": range(n), "drop": range(0),
        }[rule]  # fmt: skip
        if rule == "drop":
            wanted["left_out"] += 1
            continue
        last = answers[-1]
        end = n if rule == END_CUT else last[-1]  # there the end-of-text token is one of the sequence
        learned = any(i in kept and (i > 0 or rule == END_CUT) for a in answers for i in a)
        if rule != END_CUT:  # an end is a target of the token before it
            learned = any(a[-1] in kept or any(i - 1 in kept for i in a) for a in answers)
        wanted["no_signal"] += not learned
        wanted["end_lost"] += end not in kept
        if rule == END_CUT:
            wanted["prompt_end_lost"] += last[0] > size
        else:
            wanted["prompt_start_lost"] += 0 not in kept
            wanted["prompt_end_lost"] += last[0] > 0 and last[0] - 1 not in kept
    return wanted


@pytest.mark.parametrize("rule", [END_CUT, "auto", "keep_end", "keep_start", "split", "drop"])
@pytest.mark.parametrize("size", [12, 25, 40, 500])
def test_cuts_of_dialogues_and_texts_are_as_counted_row_by_row(tokenizer, tmp_path, size, rule):
    dialogues, texts = made_dialogues()
    truncation = "auto" if rule == END_CUT else rule
    (split,) = audited(
        tokenizer, write(tmp_path / "rows.jsonl", dialogues + texts), block_size=size, truncation=truncation
    ).splits
    for form, rows in (("dialogues", dialogues), ("texts", texts)):
        plain_rule = {"auto": "keep_end" if form == "dialogues" else "split"}.get(rule, rule)
        wanted = plain_counts(tokenizer, rows, size, plain_rule)
        cut = cut_of(split, END_CUT if rule == END_CUT else OWN, form)
        assert {name: getattr(cut, name) for name in wanted} == wanted, form
        assert cut.rows == len(rows)
        assert (wanted["cut"] > 0) == (size < 500)


def test_the_made_dialogues_lose_every_kind_of_thing(tokenizer):
    """Else the equalities above would compare zeros."""
    dialogues, _ = made_dialogues()
    found = {rule: plain_counts(tokenizer, dialogues, 25, rule) for rule in (END_CUT, "keep_start", "keep_end")}
    for name in ("no_signal", "end_lost", "prompt_end_lost"):
        assert found[END_CUT][name] > 0, name
        assert found["keep_start"][name] > 0, name
    assert found["keep_end"]["prompt_start_lost"] > 0
    assert found["keep_end"]["no_signal"] > 0, "a long question at the end pushes every answer out"


def test_with_loss_on_all_tokens_every_piece_teaches(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", made_dialogues()[0])
    (split,) = audited(tokenizer, path, block_size=12, truncation="keep_start", loss_on="all").splits
    assert [c.no_signal for c in split.cuts] == [0, 0]
    (split,) = audited(tokenizer, path, block_size=12, truncation="keep_start").splits
    assert all(c.no_signal for c in split.cuts)


def test_pairs_that_training_skips_count_where_usual_tools_would_cut_them(tokenizer, tmp_path):
    """Five of the six are long; three lose what tells them apart."""
    long = " ".join(WORDS * 10)
    rows = [
        {"chosen": transcript("short?", "yes"), "rejected": transcript("short?", "no")},
        {"chosen": transcript(long, ""), "rejected": transcript(long, "no")},  # empty chosen: the same after 50 tokens
        {"chosen": transcript("a?", long), "rejected": transcript("b?", long)},  # two prompts: never the same
        {"chosen": transcript("c?", long), "rejected": transcript("c?", long)},
        {"chosen": transcript("d?"), "rejected": transcript("d?", long)},  # no answer, so its end is not lost
        {"chosen": transcript(long, "yes"), "rejected": transcript(long, "no")},
    ]
    (split,) = audited(tokenizer, write(tmp_path / "rows.jsonl", rows), block_size=50).splits
    cut = cut_of(split, END_CUT)
    assert (cut.rows, cut.cut, cut.no_signal, cut.end_lost, cut.prompt_end_lost) == (6, 5, 3, 4, 2)
    assert set(cut.no_signal_places) == {f"rows.jsonl:{i}" for i in (2, 4, 6)}
    assert cut_of(split, OWN).rows == split.usable == 2


@pytest.mark.parametrize(
    ("longer", "told"),
    [(40, "`the longer answer is better` is right for 100.0%"), (0, "`the shorter answer"), (20, None)],
)
def test_a_bias_of_length_is_remarked_only_where_the_interval_leaves_one_half(tokenizer, tmp_path, longer, told):
    answers = [("yes, and it is so", "no") if i < longer else ("no", "yes, and it is so") for i in range(40)]
    rows = [{"prompt": f"{i}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    result = audited(tokenizer, write(tmp_path / "rows.jsonl", rows))
    remarks = [line for line in result.remarks() if "answer is better" in line]
    assert bool(remarks) == bool(told)
    assert not told or told in remarks[0]
    assert result.problems() == [], "length is no defect of the data"


def test_the_table_in_the_docs_is_the_one_that_the_command_prints(shared_data, monkeypatch, capfd):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    command = re.search(r"^tunesmith data .* --audit .*$", page, re.M)
    table = re.search(r"```text\n(.*?)\n```", page[command.end() :], re.S)[1]
    monkeypatch.setenv("COLUMNS", "100")
    argv = command[0].replace("DIR", str(shared_data / "hh-rlhf")).split()[1:]
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert out.startswith("train: form: ")
    assert f"\n{table}\n" in out
    shown = [line for line in page.splitlines() if line.startswith("note: ")]
    assert shown
    assert set(shown) <= set(out.splitlines())
