"""Byte-level BPE through the Rust `tokenizers`: text to ids and back; text never turns into a special token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tunesmith.data.backend import (
    END_OF_TEXT,
    byte_level,
    byte_levels,
    gpt2_byte_symbols,
    text_only,
    with_prefix_space,
    with_tokens,
)
from tunesmith.data.fingerprint import content_hash
from tunesmith.data.hh_template import HH
from tunesmith.data.special_tokens import SpecialTokens, generation_settings, read_special_tokens
from tunesmith.data.template import Segment, Template
from tunesmith.errors import UserError
from tunesmith.jsontext import read_json, write_json

OTHER_ENDS = ("</s>", "<|im_end|>", "<eos>", "<|end_of_text|>", "[EOS]")  # of tokenizers that name no eos_token
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
TEMPLATES = {template.name: template for template in (HH,)}  # a new one is a file beside hh_template.py and a word here


class Tokenizer:
    """A model's tokenizer, and the template that says what it encodes of a dialogue.

    template: the form that the model is trained with. It is decided here, where a tokenizer is made or loaded, and nowhere
        else: who has a tokenizer knows the form. Today it is the HH form for every model.
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
        template: Template = HH,
    ) -> None:
        """special: what is known beside `backend`.

        Raises: UserError if there is no end-of-text token, or none of those that end an answer in the template.
        """
        self.special = special or SpecialTokens()
        backend = with_tokens(backend, self.special, where)
        cutter = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
        opens_with_space = any(part["add_prefix_space"] for part in byte_levels(cutter))
        self.prefix_space = self.special.prefix_space(opens_with_space)
        self._stored = self._backend = text_only(with_prefix_space(backend, False) if opens_with_space else backend)
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.end_of_text: int = self._end_of_text(where)
        self.template = template
        self.end_of_answer: int = self.special_id(template.end) if template.end else self.end_of_text

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
    def load(directory: Path) -> Tokenizer:
        """From `tokenizer.json`, or from GPT-2's older pair `vocab.json` + `merges.txt`, and what stands beside them.

        Raises: UserError naming the file that is missing, broken or says nonsense.
        """
        file, special = directory / "tokenizer.json", read_special_tokens(directory)
        try:
            if file.exists():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), str(file), special)
            vocab, merges = directory / "vocab.json", directory / "merges.txt"
            if vocab.exists() and merges.exists():
                bpe = models.BPE.from_file(str(vocab), str(merges))
                return Tokenizer(byte_level(bpe, END_OF_TEXT in read_json(vocab)), str(vocab), special)
        except UserError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{file} is not a tokenizer ({error}); download or save it again") from None
        raise UserError(f"{directory} holds no tokenizer.json (nor vocab.json with merges.txt)")

    @staticmethod
    def gpt2() -> Tokenizer:
        """GPT-2's own tokenizer, rebuilt from the 50,000 published merges that ship with this package."""
        lines = resources.files("tunesmith").joinpath("gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for a, b in (line.split(" ") for line in lines[1:] if line)]
        symbols = [*gpt2_byte_symbols(), *(a + b for a, b in merges), END_OF_TEXT]
        vocab = {symbol: i for i, symbol in enumerate(symbols)}
        return Tokenizer(byte_level(models.BPE(vocab=vocab, merges=merges)), "gpt2")

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE made from texts, with GPT-2's cut into words. The same texts give the same tokenizer.

        The end of text is token 0, then come the 256 bytes, then the merges; a merge comes at least twice in the texts.
        Raises: UserError if they hold fewer merges than `vocab_size` asks for.
        """
        backend = byte_level(models.BPE())
        end = AddedToken(END_OF_TEXT, normalized=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size, min_frequency=2, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
            ),
        )  # fmt: skip
        found = backend.get_vocab_size()
        if found != vocab_size:
            raise UserError(
                f"--tokenizer.vocab_size {vocab_size:,} is more than these texts allow: they hold {found:,} pieces "
                f"that occur at least twice. Use {found} or less, add text, or use --tokenizer.name gpt2"
            )
        return Tokenizer(backend, "new tokenizer")

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
        content = json.loads(self._backend.to_str())
        beyond = [token for token in content["added_tokens"] if token["id"] >= embeddings and not token["special"]]
        if beyond:
            for token in beyond:
                token["special"] = True
            self._backend = text_only(tokenizers.Tokenizer.from_str(json.dumps(content)))

    def beginning(self, text: str) -> str:
        """The beginning of a text as it is encoded: with a space before it where this tokenizer has that."""
        return f" {text}" if self.prefix_space and text and not text.startswith(" ") else text

    def encode(self, text: str) -> list[int]:
        """Ids of one text; no special token is added or recognised."""
        return self._backend.encode(self.beginning(text), add_special_tokens=False).ids

    def begun(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments of one text, the first with its `beginning`."""
        first, *rest = segments
        return [first if first.special else first._replace(text=self.beginning(first.text)), *rest]

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Ids of many segments as they stand (see `begun`), each encoded by itself. Raises: as `special_id`."""
        words = iter(self.encode_batch([s.text for s in segments if not s.special]))
        return [[self.special_id(s.text)] if s.special else next(words) for s in segments]

    def special_id(self, text: str) -> int:
        """The id of a special token. Raises: UserError if there is none."""
        number: int | None = self._backend.token_to_id(text)
        if number is None:
            raise UserError(f"the tokenizer has no token {text}, which the model's form of a dialogue needs")
        return number

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts as they stand (see `beginning`), on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the end-of-text token and incomplete UTF-8 at the end give nothing and U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @property
    def _cuts_as_gpt2(self) -> bool:
        return self._backend.normalizer is None and isinstance(self._backend.pre_tokenizer, pre_tokenizers.ByteLevel)

    @cached_property
    def token_bytes(self) -> np.ndarray[Any, Any]:
        """(vocab,) int64: how many bytes of text each token stands for. A byte-level symbol has one letter a byte.

        -1 for a token that text never gives or that takes white space with it, and for every token of a tokenizer that
        is not byte-level without normalisation: its lengths are not known.
        """
        lengths = np.full(self.vocab_size, -1, np.int64)
        if self._cuts_as_gpt2 and isinstance(self._backend.decoder, decoders.ByteLevel):
            for symbol, number in self._backend.get_vocab(with_added_tokens=False).items():
                lengths[number] = len(symbol)
            for number, token in self._backend.get_added_tokens_decoder().items():
                takes_spaces = token.lstrip or token.rstrip
                lengths[number] = -1 if token.special or takes_spaces else len(token.content.encode())
        return lengths

    @cached_property
    def cuts_as_gpt2(self) -> bool:
        """Whether a text's tokens are those of its words one by one, words being what GPT-2's expression finds."""
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
        return content_hash([self._in_force(self._backend).to_str()])

    def _in_force(self, backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """With the space before a text as part of it, as tokenizer.json has it."""
        return with_prefix_space(backend, True) if self.prefix_space else backend

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
        (directory / "tokenizer.json").write_text(self._in_force(self._stored).to_str(pretty=True), encoding="utf-8")
        write_json(directory / "tokenizer_config.json", self._config(block_size))
        room = embeddings or self.vocab_size
        begin = self._id_of("bos_token")
        settings = generation_settings(self._ends, self.pad(room), self.end_of_text if begin is None else begin)
        write_json(directory / "generation_config.json", settings)

    def _config(self, block_size: int) -> dict[str, Any]:
        """What tokenizer_config.json holds."""
        end, asked = self._backend.id_to_token(self.end_of_text), self.special.settings.get("tokenizer_class")
        roles = self.special.roles | {"eos_token": end}
        if self.special.is_gpt2s:
            usual = end if self._backend.token_to_id(END_OF_TEXT) is None else END_OF_TEXT  # where no other is named
            roles = {"bos_token": usual, "unk_token": usual} | roles
            # transformers builds that class anew: as if every one cut text into words as the first GPT-2
            asked = "GPT2Tokenizer" if self._cuts_as_gpt2 else "PreTrainedTokenizerFast"
        extra = {"extra_special_tokens": list(self.special.extra)} if self.special.extra else {}
        return {
            **self.special.settings,
            "tokenizer_class": asked,
            "model_max_length": block_size,
            **roles,
            **extra,
            "add_prefix_space": self.prefix_space,
            "chat_template": self.template.jinja,
        }

    def _id_of(self, role: str) -> int | None:
        text = self.special.roles.get(role)
        return None if text is None else self._backend.token_to_id(text)

    def pad(self, embeddings: int) -> int:
        """The id for padding in a model of so many embeddings: the tokenizer's own, or the end of text."""
        own = self._id_of("pad_token")
        return self.end_of_text if own is None or own >= embeddings else own
