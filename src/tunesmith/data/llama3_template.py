"""Llama 3's form: `<|begin_of_text|>`, then each turn under a header with its role, its words without white space around them."""

from collections.abc import Sequence

from tunesmith.data.dialogue import Message
from tunesmith.data.template import Segment, Template

BEGIN, END = Segment("<|begin_of_text|>", special=True), "<|eot_id|>"


def _header(role: str) -> list[Segment]:
    start, end = (Segment(f"<|{side}_header_id|>", special=True) for side in ("start", "end"))
    return [start, Segment(role), end, Segment("\n\n")]


def _segments(messages: Sequence[Message], answer_follows: bool) -> list[Segment]:
    pieces = [BEGIN]
    for m in messages:
        learned, words = m.role == "assistant" and m.weight != 0, m.content.strip()
        *start, gap = _header(m.role)
        said = [gap, Segment(words, learned)] if m.role == "assistant" else [Segment(gap.text + words)]
        pieces += [*start, *said, Segment(END, learned, special=True)]
    if answer_follows:
        pieces += _header("assistant")
    return [piece for piece in pieces if piece.text]


LLAMA3 = Template(
    name="llama3",
    segments=_segments,
    jinja="{{- '<|begin_of_text|>' -}}{%- for message in messages -%}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}",
    end=END,
)
