"""Clean rows of every form a data set can have, and rows with one defect each, for the tests of the audit."""

import json

from tunesmith.data.audit.rows import PAIRS, TEXTS
from tunesmith.data.audit.survey import audit
from tunesmith.data.datasets import open_dataset
from tunesmith.options.training import DataOptions

ORDER = 7  # clean rows between two planted ones


def turns(*texts):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def transcript(*texts):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(texts))


# Clean rows, with all that looks like a defect and is none: markers within a line, other cases, inner spaces, HTML.
TOPICS = [
    "rivers", "glass", "the  two spaces", "Human: beings", "an assistant: who", "line\nbreaks", "a <s>struck</s> word", "日本語", "x | y",
    "what Assistant: means in a sentence",
]  # fmt: skip


def clean(form, i):
    q, a, b = (
        f"Question {i} about {TOPICS[i % len(TOPICS)]}?",
        f"Answer {i} says yes.",
        f"Answer {i} says no, and more.",
    )
    q = q.replace("Human:", "the human:") if i % len(TOPICS) == 3 else q
    return {
        "text": {"text": f"Text {i}: {q} {a}"},
        "transcript": {"text": transcript(q, a, f"And {i}?", b)},
        "messages": {"messages": [{"role": "system", "content": "Be short."}, *turns(q, a, f"And {i}?", b)]},
        "completion": {"prompt": q, "completion": a},
        "hh completion": {"prompt": transcript(q) + "\n\nAssistant:", "completion": f" {a}"},
        "pair": {"prompt": q, "chosen": a, "rejected": b},
        "hh prompt pair": {"prompt": transcript(q) + "\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"},
        "hh pair": {"chosen": transcript(q, a, f"And {i}?", b), "rejected": transcript(q, a, f"And {i}?", a)},
        "list pair": {"prompt": turns(q), "chosen": turns("", a)[1:], "rejected": turns("", b)[1:]},
        "whole list pair": {"chosen": turns(q, a), "rejected": turns(q, b)},
    }[form]


HH, A = transcript("Why is it so?"), "\n\nAssistant:"
OPEN = {"no_final_answer"}
# (row, the kinds that it must be told for)
PLANTED = {
    "text": [
        ({"text": " \n "}, {"empty_text"}), ({"text": "Words.\nHuman: hi\n\nAssistant: hello"}, {"role_marker"}),
        ({"text": "Some text.\n\nHuman: hi there"}, {"role_marker"}), ({"text": "The end.<|endoftext|>"}, {"template_text"}),
        ({"text": "<s>Some words</s>"}, {"template_text"}), ({"text": "[INST] Say it [/INST] it"}, {"template_text"}),
    ],
    "transcript": [
        ({"text": HH + A}, {"empty_answer"}), ({"text": HH}, OPEN), ({"text": transcript("a?", "b.", "c?")}, OPEN),
        ({"text": transcript("Too soon ", "yes.")}, {"prompt_space"}), ({"text": HH + A + "No space."}, {"turn_start"}),
        ({"text": HH + A + "  Two spaces."}, {"turn_start"}), ({"text": HH + A + " Then a break.\n"}, {"answer_end"}),
        ({"text": transcript("One", "\nHuman: two")}, {"role_marker", "turn_start"}),
        ({"text": HH + A + A + " Again."}, {"empty_turn", "repeated_role"}),
        ({"text": HH + transcript("Once more") + A + " Yes."}, {"repeated_role"}),
    ],
    "messages": [
        ({"messages": turns("hi", " ")}, {"empty_answer"}),
        ({"messages": turns("hello")}, OPEN),
        ({"messages": turns("", "fine")}, {"empty_turn"}),
        ({"messages": turns("to be", "or", "not")}, OPEN), ({"messages": turns("ends in space ", "yes")}, {"prompt_space"}),
        ({"messages": turns("a good day", " a space first")}, {"turn_start"}),
        ({"messages": turns("a bad day", "a space last ")}, {"answer_end"}),
        ({"messages": [*turns("one"), *turns("two", "three")]}, {"repeated_role"}),
        ({"messages": turns("four", "five\n\nHuman: six")}, {"role_marker"}),
        ({"messages": turns("Human: seven", "eight")}, {"role_marker"}),
        ({"messages": turns("nine", "ten<|im_end|>")}, {"template_text"}),
        ({"messages": turns("Four\n\nSystem: obey", "no")}, {"role_marker"}),
    ],
    "completion": [
        ({"prompt": "An empty one", "completion": ""}, {"empty_answer"}), ({"prompt": "Ends so ", "completion": "yes"}, {"prompt_space"}),
        ({"prompt": "Begins so", "completion": " yes"}, {"turn_start"}), ({"prompt": "Stops so", "completion": "yes\n"}, {"answer_end"}),
        ({"prompt": "Tell me. Assistant:", "completion": "what"}, {"role_marker"}),
        ({"prompt": "", "completion": "No question."}, {"empty_turn"}),
        ({"prompt": "Tell me. Assistant: ", "completion": "who"}, {"role_marker", "prompt_space"}),
    ],
    "hh completion": [
        ({"prompt": HH + A + " ", "completion": "After the space."}, {"prompt_space"}),
        ({"prompt": HH + A, "completion": "None."}, {"turn_start"}),
        ({"prompt": HH + A + " ", "completion": " Two."}, {"prompt_space", "turn_start"}),
        ({"prompt": HH, "completion": " no marker"}, OPEN),
        ({"prompt": HH + A, "completion": " "}, {"empty_answer"}),
    ],
    "pair": [
        ({"prompt": "Nothing?", "chosen": "", "rejected": "much"}, {"empty_chosen"}),
        ({"prompt": "Anything?", "chosen": "much", "rejected": " "}, {"empty_rejected"}),
        ({"prompt": "Same?", "chosen": "same", "rejected": "same"}, {"same_answers"}),
        ({"prompt": "Space? ", "chosen": "yes", "rejected": "no"}, {"prompt_space"}),
        ({"prompt": "Spaces?", "chosen": "yes", "rejected": " no"}, {"turn_start"}),
        ({"prompt": "Breaks?", "chosen": "yes", "rejected": "no\n"}, {"answer_end"}),
        ({"prompt": "Marks?", "chosen": "yes", "rejected": "no\nHuman: why?"}, {"role_marker"}),
        ({"prompt": "Ends?", "chosen": "yes<|endoftext|>", "rejected": "no"}, {"template_text"}),
    ],
    "hh prompt pair": [
        ({"prompt": HH + A + " ", "chosen": "yes", "rejected": "no"}, {"prompt_space"}),
        ({"prompt": HH + A, "chosen": "maybe", "rejected": "not"}, {"turn_start"}),
        ({"prompt": HH + A, "chosen": "", "rejected": " no"}, {"empty_chosen"}),
    ],
    "hh pair": [
        ({"chosen": transcript("one?", "1"), "rejected": transcript("two?", "2")}, {"prompts_differ"}),
        ({"chosen": transcript("three?"), "rejected": transcript("three?", "3")}, OPEN),
        ({"chosen": transcript("four?", "4"), "rejected": transcript("four?", "4", "why?")}, OPEN | {"prompts_differ"}),
        ({"chosen": transcript("five?", "5"), "rejected": transcript("five?", "5")}, {"same_answers"}),
        ({"chosen": transcript("six?", ""), "rejected": transcript("six?", "6")}, {"empty_chosen"}),
        ({"chosen": HH + A + A + " 7", "rejected": HH + A + A + " seven"}, {"empty_turn", "repeated_role"}),
    ],
    "list pair": [
        ({"prompt": turns("Why? "), "chosen": turns("", "so")[1:], "rejected": turns("", "not so")[1:]}, {"prompt_space"}),
        ({"prompt": turns("How?"), "chosen": turns("", "so")[1:], "rejected": turns("thus")}, OPEN | {"prompts_differ", "repeated_role"}),
    ],
    "whole list pair": [
        ({"chosen": turns("Who?", "me"), "rejected": turns("who?", "you")}, {"prompts_differ"}),
        ({"chosen": turns("", "So it is.")[1:], "rejected": turns("", "It is not.")[1:]}, {"no_prompt"}),
    ],
}  # fmt: skip
UNREADABLE = {
    b'{"text": ': "invalid JSON", b'{"text": "\xff"}': "invalid UTF-8", b'{"q": "a"}': "no known columns (found q", b"[1]": "not an object",
    b'{"messages": [{"role": "judge", "content": "x"}]}': "unknown role", b'{"chosen": "x", "rejected": "y"}': "no role marker",
    b'{"text": "\\ud800"}': "half a character", b'{"messages": []}': "not a list of turns", b'{"text": 5}': "`text` is not a string",
}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def audited(tokenizer, path, *, against=(), max_rows=None, **options):
    source = open_dataset(DataOptions(name=str(path), max_rows=max_rows))
    others = [open_dataset(DataOptions(name=str(other))) for other in against]
    return audit(source, tokenizer, **({"block_size": 1024} | options), against=others)


def found(split):
    """kind -> numbers of the lines at which it was found."""
    for f in split.findings:
        assert f.rows == len(f.places) or f.kind == "unreadable"
    lines = {f.kind: [int(p.partition(" = ")[0].rpartition(":")[2]) for p in f.places] for f in split.findings}
    return {kind: numbers for kind, numbers in lines.items() if numbers}


def spread(rows, form, first=0):
    """Planted rows after every few clean ones, and the line of each."""
    mixed, at = [], []
    for i, row in enumerate(rows):
        mixed += [clean(form, first + ORDER * i + j) for j in range(ORDER)]
        mixed.append(row)
        at.append(len(mixed))
    return mixed, at


FORM = {
    "text": TEXTS,
    "pair": PAIRS,
    "hh prompt pair": PAIRS,
    "hh pair": PAIRS,
    "list pair": PAIRS,
    "whole list pair": PAIRS,
}
