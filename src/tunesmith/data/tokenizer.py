"""A model's tokenizer, through the Rust `tokenizers`: text to ids and back; text never turns into a special token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from tunesmith.data.backend import (
    END_OF_TEXT,
    begins_of,
    byte_level,
    byte_levels,
    gpt2_backend,
    in_the_middle,
    keeps_text,
    opened,
    opening_of,
    parts_of,
    specially,
    spelling,
    text_only,
    trained_backend,
    with_parts,
    with_tokens,
)
from tunesmith.data.dialogue import Message
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.hh_template import HH
from tunesmith.data.jinja_template import from_jinja
from tunesmith.data.special_tokens import SpecialTokens, generation_settings, read_special_tokens, stored_template
from tunesmith.data.template import Segment, Template
from tunesmith.data.templates import TEMPLATES
from tunesmith.data.tokenizer_classes import built, class_for
from tunesmith.errors import UserError
from tunesmith.jsontext import read_json, write_json

OTHER_ENDS = ("</s>", "<|im_end|>", "<eos>", "<|end_of_text|>", "[EOS]")  # of tokenizers that name no eos_token
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""What a special token with `lstrip` or `rstrip` swallows: Rust's white space. Python's has four characters more."""


class Tokenizer:
    """A model's tokenizer, and the template that says what it encodes of a dialogue.

    template: the form that the model is trained with: its own, or what `chosen_template` asks for. It is decided where a
        tokenizer is made or loaded, and nowhere else: who has a tokenizer knows the form.
    end_of_text: the id that ends a text in training: the model's `eos_token`. end_of_answer: that ends an answer in the
        template. stops: all ids that end an answer.
    vocab_size: the largest id and one more.
    The string `<|endoftext|>` (or any special token's) inside a text is encoded as the letters it is made of. Special
    tokens come from a template's special segments alone, and the end of text from `tokenstore.py` and `texts.py`, by its id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        where: str = "tokenizer",
        special: SpecialTokens | None = None,
        template: Template | str = HH,
    ) -> None:
        """special: what is known beside `backend`. template: as in `use`.

        Raises: UserError if there is no end-of-text token, or none of those that end an answer in the template.
        """
        self.special = (special or SpecialTokens()).among(backend.token_to_id)
        backend = with_tokens(backend, self.special, where)
        parts = parts_of(backend)
        if byte_levels(parts):
            parts = opened(parts, self.special.prefix_space(opening_of(parts) is not None))
        self.opening = opening_of(parts)
        self._parts = parts  # as tokenizer.json has them; those of the backend are for the middle of a text
        self._stored = self._backend = text_only(with_parts(backend, in_the_middle(parts)))
        self.added, self._bytes = self._backend.get_added_tokens_decoder(), dict[int, bytes]()
        self.begins = begins_of(self._backend)
        swallowing = any(token.special and (token.lstrip or token.rstrip) for token in self.added.values())
        self._as_they_stand = not (self.begins or self.opening or swallowing)
        self.spelling = spelling(parts)
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.end_of_text: int = self._end_of_text(where)
        self.use(template, f"the chat_template beside {where}")

    def use(self, template: Template | str, where: str = "chat_template") -> None:
        """Give dialogues this form; a text is a Jinja chat_template, which may be that of a form of our own.

        Raises: UserError if it cannot be used, or needs a token that there is not.
        """
        if isinstance(template, str):
            special = [token for token in self.added.values() if token.special]
            own = next((form for form in TEMPLATES.values() if template in (form.jinja, self._jinja(form))), None)
            template = own or from_jinja(template, special, self._roles, where)
        self.template = template
        self.__dict__.pop("_before_answers", None)
        self.end_of_answer: int = self.special_id(template.end) if template.end else self.end_of_text
        self.encode_segments(template.segments([Message("user", "x")], True))  # are all its tokens there?

    def _end_of_text(self, where: str) -> int:
        """The token that ends a text: the one that is named, GPT-2's, the first that ends an answer, or a usual one."""
        named, find = self.special.roles.get("eos_token"), self._backend.token_to_id
        ids = [find(named) if named else None, find(END_OF_TEXT)]
        if not named:
            ids += [end for end in self.special.ends if self._backend.id_to_token(end) is not None]
            ids += [find(text) for text in OTHER_ENDS]
        for number in ids:
            if number is not None:
                return number
        raise UserError(
            f"{where} has no {named or END_OF_TEXT} token to end a text with; name the token that ends texts as "
            f"eos_token in tokenizer_config.json"
        )

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer: the template's, the end of text, and those with which transformers' `generate` ends one."""
        return frozenset(self._ends)

    @property
    def _ends(self) -> list[int]:
        return list(dict.fromkeys([self.end_of_answer, self.end_of_text, *self.special.ends]))

    @staticmethod
    def load(directory: Path, template: Template | None = None) -> Tokenizer:
        """From `tokenizer.json`, or from GPT-2's older pair `vocab.json` + `merges.txt`, and what stands beside them.

        template: None: the chat_template that stands there, or HH where none does.

        Raises: UserError naming the file that is missing, broken or says nonsense.
        """
        file, special = directory / "tokenizer.json", read_special_tokens(directory)
        form = template or stored_template(directory) or HH
        try:
            if file.exists():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), str(file), special, form)
            vocab, merges = directory / "vocab.json", directory / "merges.txt"
            if vocab.exists() and merges.exists():
                backend = byte_level(models.BPE.from_file(str(vocab), str(merges)), END_OF_TEXT in read_json(vocab))
                return Tokenizer(with_parts(backend, built(special.settings)), str(vocab), special, form)
        except UserError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{file} is not a tokenizer ({error}); download or save it again") from None
        sentencepiece = (directory / "tokenizer.model").exists()
        way_out = (
            "; convert its tokenizer.model: load it with transformers' AutoTokenizer and save it with save_pretrained"
        )
        raise UserError(
            f"{directory} holds no tokenizer.json (nor vocab.json with merges.txt){way_out * sentencepiece}"
        )

    @staticmethod
    def gpt2() -> Tokenizer:
        """GPT-2's own tokenizer, rebuilt from the 50,000 published merges that ship with this package."""
        return Tokenizer(gpt2_backend(), "gpt2")

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE made from texts, with GPT-2's cut into words. The same texts give the same tokenizer.

        The end of text is token 0, then come the 256 bytes, then the merges; a merge comes at least twice in the texts.
        Raises: UserError if they hold fewer merges than `vocab_size` asks for.
        """
        return Tokenizer(trained_backend(texts, vocab_size), "new tokenizer")

    def limit(self, embeddings: int, where: str) -> None:
        """Let text give only ids that a model of so many embeddings knows: an added token beyond them becomes letters.

        Raises: UserError if the vocabulary itself or the end of text lies beyond them.
        """
        if self.vocab_size <= embeddings:
            return
        plain = max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if plain > embeddings:
            raise UserError(
                f"{where}: the tokenizer has {plain:,} tokens, but the model has embeddings for {embeddings:,}"
            )
        if self.end_of_text >= embeddings:
            raise UserError(
                f"{where}: the tokenizer's end of text, {self._backend.id_to_token(self.end_of_text)}, is token "
                f"{self.end_of_text:,}, the model has embeddings for {embeddings:,}. Add embeddings with transformers: "
                "model.resize_token_embeddings(len(tokenizer)), and save the model again"
            )
        if any(number >= embeddings and not token.special for number, token in self.added.items()):
            self._backend = text_only(specially(self._backend, lambda token: token["id"] >= embeddings))
            self.added, self._bytes = self._backend.get_added_tokens_decoder(), {}

    def encode(self, text: str) -> list[int]:
        """Ids of one text; no special token is added or recognised."""
        text = self.opening.before(text) if self.opening else text
        return self._backend.encode(text, add_special_tokens=False).ids

    def begun(self, segments: Sequence[Segment], *, plain: bool = True) -> list[Segment]:
        """The segments of one text as `encode_segments` is to read them: with all that the tokenizer does around words.

        That is the token with which it begins every text, where the segments do not begin with a special token themselves;
        the space that it puts before words (`Opening`); and white space around a special token, which some swallow.
        plain: of a text; False: of a dialogue, which begins so only in a template that `opens` with it. A template's own
        beginning is all that transformers' `apply_chat_template` knows.
        """
        if self._as_they_stand:
            return list(segments)
        found: list[Segment] = []
        behind: Segment | None = None  # the last one that is not empty
        for segment in segments:
            text = segment.text
            if segment.special:
                if found and not (found[-1].special or found[-1].loss) and self._swallows(segment, "lstrip"):
                    found[-1] = found[-1]._replace(text=found[-1].text.rstrip(WHITE))
            elif behind is None or behind.special:
                if behind and not segment.loss and self._swallows(behind, "rstrip"):
                    text = text.lstrip(WHITE)
                if self.opening and (behind is None or self.opening.everywhere):
                    text = self.opening.before(text)
            found.append(segment._replace(text=text))
            behind = found[-1] if text else behind
        opens = plain or self.template.opens
        return [*[Segment(text, special=True) for text in self.begins if opens and not segments[0].special], *found]

    def continued(self, before: Sequence[Segment], segments: Sequence[Segment]) -> list[Segment]:
        """The segments of a dialogue as `encode_segments` is to read them behind others of it."""
        begun = self.begun([*before, *segments], plain=False)
        return begun[len(begun) - len(segments) :]

    def _swallows(self, token: Segment, side: str) -> bool:
        """Whether a special token takes the white space on that side, `lstrip` or `rstrip`, out of the text."""
        added = self.added.get(self.special_id(token.text))
        return added is not None and getattr(added, side)

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Ids of many segments as they stand (see `begun`), each encoded by itself. Raises: as `special_id`."""
        words = iter(self.encode_batch([s.text for s in segments if not s.special]))
        return [[self.special_id(s.text)] if s.special else next(words) for s in segments]

    def special_id(self, text: str) -> int:
        """The id of a special token. Raises: UserError if there is none."""
        number: int | None = self._backend.token_to_id(text)
        if number is None:
            raise UserError(f"the tokenizer has no token {text}, which the chat template needs")
        return number

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts as they stand in the middle of one (see `begun`), on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids as it stands in the middle of one; special tokens give nothing, incomplete UTF-8 gives U+FFFD.

        A space that the tokenizer puts before a text is part of it: `decode(encode("hi"))` may be " hi".
        """
        if self._falls_back:  # Rust would give U+FFFD for whole characters too where bytes beside them are incomplete
            return b"".join(map(self.bytes_of, ids)).decode(errors="replace")
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _falls_back(self) -> bool:
        return self.spelling is not None and not isinstance(self._backend.decoder, decoders.ByteLevel)

    def bytes_of(self, number: int) -> bytes:
        """What a token stands for in the middle of a text; nothing for a special one. Only where there is a `spelling`."""
        if (found := self._bytes.get(number)) is None:
            assert self.spelling is not None
            name, added = self._backend.id_to_token(number), self.added.get(number)
            found = b"" if name is None or (added and added.special) else self.spelling(name)
            self._bytes[number] = found
        return found

    def answer(self, ids: Sequence[int]) -> str:
        """What an answer of these tokens says in the template."""
        return self.template.words(self.decode(ids).removeprefix(self._before_answers))

    @cached_property
    def _before_answers(self) -> str:
        """The space that the tokenizer itself puts before an answer: where its prompt ends with a special token."""
        if not self.opening or not self.opening.everywhere:
            return ""
        prompt = self.template.segments([Message("user", "x")], True)
        return self.continued(prompt, [Segment("x", loss=True)])[0].text.removesuffix("x")

    @property
    def counts_bytes(self) -> bool:
        """Whether a row's tokens show where its segments end: byte-level words as GPT-2's, of the very bytes of the text."""
        parts = self._backend.normalizer, self._backend.pre_tokenizer, self._backend.decoder
        return parts[0] is None and isinstance(parts[1], ByteLevel) and isinstance(parts[2], decoders.ByteLevel)

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, Any]:
        """(vocab,) int64: how many bytes each token stands for, of the text as the normaliser leaves it.

        That is the text itself, but that Qwen's and GPT-NeoX's have composed characters (NFC), that U+2581 is a space where
        spaces are written so, and that a space before the text counts where the tokenizer puts one there.
        -1 for a token that text never gives or that takes white space with it, and for every token where the lengths are not
        known: another normaliser, or tokens that cannot be read one by one.
        """
        lengths = np.full(self.vocab_size, -1, np.int64)
        if self.spelling is not None and keeps_text(self._parts):
            for symbol, number in self._backend.get_vocab(with_added_tokens=False).items():
                lengths[number] = len(self.spelling(symbol))
            for number, token in self.added.items():
                takes_spaces = token.lstrip or token.rstrip
                lengths[number] = -1 if token.special or takes_spaces else len(self.spelling(token.content))
        return lengths

    @cached_property
    def cuts_as_gpt2(self) -> bool:
        """Whether a text's tokens are those of its words one by one, words being what GPT-2's expression finds."""
        if not self.counts_bytes:
            return False
        definition = json.loads(self._backend.to_str())
        cut, model = definition["pre_tokenizer"] or {}, definition["model"]
        kind = {name: cut.get(name) for name in ("type", "add_prefix_space", "use_regex")}
        return (
            kind == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
            and definition["normalizer"] is None
            and model["type"] == "BPE"
            and not model["dropout"]
            and all(token["special"] for token in definition["added_tokens"])  # others would be found in texts
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition: equal fingerprints encode equally."""
        return content_hash([with_parts(self._backend, self._parts).to_str()])

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same text in both, a dialogue has the same form, and a text the same end."""
        ours, theirs = self._backend, other._backend
        same_form = (self.end_of_text, self.template.name) == (other.end_of_text, other.template.name)
        return same_form and (self.fingerprint == other.fingerprint or ours.get_vocab() == theirs.get_vocab())

    def save(self, directory: Path, block_size: int, embeddings: int | None = None) -> None:
        """Write what transformers needs to encode, to render a dialogue and to stop as this project does.

        That is `tokenizer.json`, `tokenizer_config.json` with the special tokens, their settings and the chat template,
        and `generation_config.json`. embeddings: how many the model has; None: as many as there are tokens.
        """
        # not `backend.save`: that reports a full disk as a bare Exception
        whole = with_parts(self._stored, self._parts)
        (directory / "tokenizer.json").write_text(whole.to_str(pretty=True), encoding="utf-8")
        write_json(directory / "tokenizer_config.json", self._config(block_size))
        room = embeddings or self.vocab_size
        begin = self.special_id(self.begins[0]) if self.begins else self._id_of("bos_token")
        settings = generation_settings(self._ends, self.pad(room), self.end_of_text if begin is None else begin)
        write_json(directory / "generation_config.json", settings)

    @property
    def _roles(self) -> dict[str, str]:
        """Special tokens by their roles, those too that go without saying in GPT-2's class."""
        end = str(self._backend.id_to_token(self.end_of_text))
        implied = {"bos_token": self.begins[0]} if self.begins else {}
        if byte_levels(self._parts) and self.special.is_gpt2s:
            usual = end if self._backend.token_to_id(END_OF_TEXT) is None else END_OF_TEXT  # where no other is named
            implied = {"bos_token": usual, "unk_token": usual} | implied
        return implied | self.special.roles | {"eos_token": end}

    def _config(self, block_size: int) -> dict[str, Any]:
        """What tokenizer_config.json holds."""
        settings = self.special.settings
        prefix = {"add_prefix_space": self.opening is not None} if byte_levels(self._parts) else {}
        extra = {"extra_special_tokens": list(self.special.extra)} if self.special.extra else {}
        return {
            **settings,
            "tokenizer_class": class_for(settings | prefix, self._parts, self._stored.model),
            "model_max_length": block_size,
            **self._roles,
            **extra,
            **prefix,
            "chat_template": self._jinja(self.template),
        }

    def _jinja(self, template: Template) -> str:
        """A template for transformers, with what `begun` puts before a dialogue."""
        if not self.begins or not template.opens:
            return template.jinja
        space = " " if self.opening and not self.opening.everywhere else ""  # which Rust puts behind no special token
        return f"{{{{- {''.join(self.begins) + space!r} -}}}}{template.jinja}"

    def _id_of(self, role: str) -> int | None:
        text = self.special.roles.get(role)
        return None if text is None else self._backend.token_to_id(text)

    def pad(self, embeddings: int) -> int:
        """The id for padding in a model of so many embeddings: the tokenizer's own, or the end of text."""
        own = self._id_of("pad_token")
        return self.end_of_text if own is None or own >= embeddings else own
