"""Gemma's form: `<start_of_turn>user` or `model`, a line break, the words without white space around them, `<end_of_turn>`.

It has no system turn. Such a text stands before the words of the question that follows it, or is a question where none does.
"""

from collections.abc import Sequence

from tunesmith.data.dialogue import Message
from tunesmith.data.template import Segment, Template

BEGIN, START, END = Segment("<bos>", special=True), Segment("<start_of_turn>", special=True), "<end_of_turn>"


def _asked(words: str) -> list[Segment]:
    return [START, Segment(f"user\n{words}"), Segment(END, special=True), Segment("\n")]


def _segments(messages: Sequence[Message], answer_follows: bool) -> list[Segment]:
    pieces, scene = [BEGIN], ""
    for m in messages:
        if m.role == "system":
            scene += f"{m.content}\n\n"
            continue
        if m.role == "assistant":
            learned = m.weight != 0
            pieces += _asked(scene) if scene else []
            pieces += [START, Segment("model\n"), Segment(m.content.strip(), learned)]
            pieces += [Segment(END, learned, special=True), Segment("\n")]
        else:
            pieces += _asked(scene + m.content.strip())
        scene = ""
    pieces += _asked(scene) if scene else []
    if answer_follows:
        pieces += [START, Segment("model\n")]
    return [piece for piece in pieces if piece.text]


GEMMA = Template(
    name="gemma",
    segments=_segments,
    jinja="{{- '<bos>' -}}{%- set ns = namespace(scene='') -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.scene = ns.scene + message['content'] + '\n\n' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- if ns.scene -%}{{- '<start_of_turn>user\n' + ns.scene + '<end_of_turn>\n' -}}{%- set ns.scene = '' -%}{%- endif -%}"
    "{{- '<start_of_turn>model\n' + message['content'] | trim + '<end_of_turn>\n' -}}"
    "{%- else -%}{{- '<start_of_turn>user\n' + ns.scene + message['content'] | trim + '<end_of_turn>\n' -}}"
    "{%- set ns.scene = '' -%}{%- endif -%}{%- endfor -%}"
    "{%- if ns.scene -%}{{- '<start_of_turn>user\n' + ns.scene + '<end_of_turn>\n' -}}{%- endif -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}",
    end=END,
)
