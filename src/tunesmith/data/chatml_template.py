"""ChatML: `<|im_start|>user`, a line break, the words, `<|im_end|>` and a line break. Qwen's and SmolLM2's form, and many others'.

Without a system turn there is none. The chat_templates of Qwen2.5 and SmolLM2 put in one of their own, which is another form.
"""

from collections.abc import Sequence

from tunesmith.data.dialogue import Message
from tunesmith.data.template import Segment, Template

START, END = Segment("<|im_start|>", special=True), "<|im_end|>"


def _segments(messages: Sequence[Message], answer_follows: bool) -> list[Segment]:
    pieces: list[Segment] = []
    for m in messages:
        learned = m.role == "assistant" and m.weight != 0
        words = (
            [Segment("assistant\n"), Segment(m.content, learned)]
            if m.role == "assistant"
            else [Segment(f"{m.role}\n{m.content}")]
        )
        pieces += [START, *words, Segment(END, learned, special=True), Segment("\n")]
    if answer_follows:
        pieces += [START, Segment("assistant\n")]
    return [piece for piece in pieces if piece.text]


CHATML = Template(
    name="chatml",
    segments=_segments,
    jinja="{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    end=END,
)
