"""What a model's directory knows of its tokenizer beside tokenizer.json: special tokens by their roles, added tokens, ends.

The rules are those of transformers 5: `tokenizer_config.json` with its `added_tokens_decoder`; without that, the older
`special_tokens_map.json` (which wins) and `added_tokens.json`; and as the ends of an answer the `eos_token_id` of
`generation_config.json`, or of `config.json` where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tunesmith.errors import UserError
from tunesmith.jsontext import read_json_if_there

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the second is what it was called before transformers 5
OF_ONE_LOADING = (  # what transformers writes of how and from where a tokenizer was loaded, or what we write anew
    "name_or_path", "is_local", "local_files_only", "backend", "special_tokens_map_file", "tokenizer_file",
    "added_tokens_decoder", "chat_template", "model_max_length", "auto_map", *EXTRA,
)  # fmt: skip
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # None: what transformers takes for a gpt2 model
_END = "<|endoftext|>"
IMPLIED: Mapping[str, Mapping[str, str]] = {
    "GPTNeoXTokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"},
    "GemmaTokenizer": {f"{role}_token": f"<{role}>" for role in ("unk", "bos", "eos", "pad", "mask")}
    | {"padding_side": "left"},
}
"""What a class of transformers has where its directory does not say: special tokens by their roles, and where it pads."""


@dataclass(frozen=True)
class SpecialTokens:
    """What stands beside tokenizer.json.

    settings: tokenizer_config.json without tokens and without what belongs to one loading; a role that it expressly leaves
    empty is None. roles: `eos_token` and its like -> the token's text. implied: the same, of roles that are not named but
    that the class has, if there is such a token. extra: further special tokens. added: id -> token, for a vocabulary that
    lacks it. ends: ids with which transformers' `generate` ends an answer, in its order.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    implied: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    added: dict[int, AddedToken] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    @property
    def texts(self) -> list[str]:
        """Every special token's text, once."""
        return list(dict.fromkeys([*self.roles.values(), *self.extra]))

    def prefix_space(self, stored: bool) -> bool:
        """Whether a text is encoded as if a space stood before it. stored: what tokenizer.json says.

        transformers builds GPT-2's own class anew from tokenizer_config.json and ignores tokenizer.json.
        """
        return bool(self.settings.get("add_prefix_space")) if self.is_gpt2s else stored

    def among(self, vocabulary: Callable[[str], int | None]) -> SpecialTokens:
        """With the implied roles whose tokens there are. vocabulary: a token's text -> its id."""
        there = {role: text for role, text in self.implied.items() if vocabulary(text) is not None}
        return dataclasses.replace(self, roles=there | self.roles, implied={})

    def ending_as(self, directory: Path) -> SpecialTokens:
        """The same tokens with the ends of an answer of the model there. Raises: as `ends_of_answers`."""
        return dataclasses.replace(self, ends=ends_of_answers(directory))

    @property
    def is_gpt2s(self) -> bool:
        """Whether transformers takes GPT-2's own tokenizer class."""
        return self.settings.get("tokenizer_class") in GPT2_CLASSES


def read_special_tokens(directory: Path) -> SpecialTokens:
    """What the files of a model, or of an adapter, say. Raises: UserError naming a file that is broken or says nonsense."""
    config = read_json_if_there(directory / "tokenizer_config.json")
    added = {}
    try:
        if isinstance(config.get("added_tokens_decoder"), dict):
            added = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        else:
            config |= read_json_if_there(directory / "special_tokens_map.json")
        extra = _extra(config)
        roles = {role: _text(config[role]) for role in ROLES if config.get(role)}
        if "added_tokens_decoder" not in config:
            special = {*roles.values(), *extra}
            for text, number in read_json_if_there(directory / "added_tokens.json").items():
                added[int(number)] = AddedToken(text, normalized=text not in special, special=text in special)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{directory}: tokenizer_config.json, special_tokens_map.json or added_tokens.json holds a value of the "
            f"wrong type ({error}); download or save the tokenizer again"
        ) from None
    settings = {k: v for k, v in config.items() if (k not in ROLES or v is None) and k not in OF_ONE_LOADING}
    by_class = IMPLIED.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {})
    implied = {role: text for role, text in by_class.items() if role not in config and role in ROLES}
    if "padding_side" in by_class:
        settings.setdefault("padding_side", by_class["padding_side"])
    return SpecialTokens(settings, roles, implied, extra, dict(sorted(added.items())), ends_of_answers(directory))


def _text(token: Any) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a token")
    return text


def _extra(config: dict[str, Any]) -> tuple[str, ...]:
    """Special tokens without a role, and those with a role of the model's own (`image_token` and its like)."""
    found = []
    for key in EXTRA:
        listed = config.get(key) or []
        found += list(listed.values()) if isinstance(listed, dict) else list(listed)
    own = [v for k, v in config.items() if k.endswith("_token") and k not in ROLES and isinstance(v, str | dict)]
    return tuple(dict.fromkeys(map(_text, [*found, *own])))


def ends_of_answers(directory: Path) -> tuple[int, ...]:
    """Ids with which transformers' `generate` ends an answer of the model there. Raises: UserError if they are no ids."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.exists():
            ends = read_json_if_there(file).get("eos_token_id")
            listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
            if not all(type(end) is int for end in listed):
                raise UserError(f"{file}: eos_token_id is {ends!r}, expected a token's number or a list of them")
            return tuple(end for end in listed if end >= 0)
    return ()


def generation_settings(ends: list[int], pad: int, begin: int) -> dict[str, Any]:
    """A generation_config.json with which `generate` stops where our answers end by themselves.

    The role markers, before which our answers stop too, are left out on purpose: with `stop_strings` in this file every
    `generate` without `tokenizer=`, that of `pipeline` among them, is an error.
    """
    return {
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": pad,
    }


def stored_template(directory: Path) -> str:
    """The text of the chat_template in a model's directory, as transformers finds it; "" where there is none.

    That is the file chat_template.jinja, else `chat_template` of tokenizer_config.json, where of several the one named default.
    Raises: UserError for one that is no text, or for several without a default.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value: Any = read_json_if_there(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        if "default" not in named:
            raise UserError(
                f"{directory}/tokenizer_config.json: chat_template is a list without one named default ({', '.join(map(str, named))}); "
                "choose one with --chat.template FILE.jinja"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{directory}/tokenizer_config.json: chat_template is a {type(value).__name__}, expected a text"
        )
    return value or ""
