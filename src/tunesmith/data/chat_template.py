r"""Our form of a dialogue as a Jinja template, with which transformers' `apply_chat_template` renders what we encode."""

from __future__ import annotations

from tunesmith.data.dialogue import MARKERS, ROLE_NAMES


def chat_template() -> str:
    """The template: every role's marker, a space, its content; `add_generation_prompt` ends in the assistant's marker.

    Rendered, it is `dialogue.render` of the same turns; roles are those that `dialogue.parse_messages` knows.
    """
    named: dict[str, list[str]] = {}
    for name, role in ROLE_NAMES.items():
        named.setdefault(role, []).append(name)
    branches = "".join(
        f"{{%- {'if' if i == 0 else 'elif'} role in {names!r} -%}}{{{{- {_quoted(MARKERS[role])} -}}}}"
        for i, (role, names) in enumerate(named.items())
    )
    return (
        "{%- for message in messages -%}{%- set role = message['role'] | lower -%}"
        + branches
        + "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
        + "{{- ' ' + message['content'] -}}{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(MARKERS['assistant'])} -}}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    return repr(text)  # Jinja's strings know \n


def generation_settings(ends: list[int], pad: int, begin: int) -> dict[str, object]:
    """A generation_config.json with which `generate` stops where our answers end by themselves.

    The role markers, before which our answers stop too, are left out on purpose: with `stop_strings` in this file every
    `generate` without `tokenizer=`, that of `pipeline` among them, is an error.
    """
    return {
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": pad,
    }
