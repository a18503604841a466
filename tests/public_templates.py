"""Chat templates as public models ship them, and tokenizers made here that cut text into tokens as those models' do.

The texts in tests/data/chat_templates are facts of the models named in PUBLIC: `chat_template` of their tokenizer_config.json.
A tokenizer has the model's special tokens, normaliser, pre-tokeniser and decoder; only its vocabulary is small, because it is
trained here, on the embedded sample.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.tokenizer import Tokenizer as OurTokenizer
from tunesmith.files.names import SAMPLE

TEXTS = Path(__file__).parent / "data" / "chat_templates"
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
MISTRAL = (
    "[INST]",
    "[/INST]",
    *(f"[{slash}{name}]" for name in ("AVAILABLE_TOOLS", "TOOL_RESULTS") for slash in ("", "/")),
    "[TOOL_CALLS]",
)
BEGIN, END, USER, ASSISTANT = (
    f"<\uff5c{name}\uff5c>"
    for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
)


@dataclass(frozen=True)
class Public:
    """A template, and what the tests need to know of its model.

    cut: the kind of tokenizer, a key of CUTS. special: tokens beside bos and eos. plain: added tokens that are not special.
    end: text of the token that ends an answer. strips: white space around an answer is removed. system: what the template
    makes of a system turn: "kept", "dropped" without a word, "moved" to the last turn if that is a question, and left out if
    it is an answer, or "refused". alternates: two user turns in a row are refused.
    lead, tail: what stands between the generation prompt and an answer's words, and between these and the end.
    learns: which answers stand in a dialogue behind the very prompt that they are asked for with: "all", "last" or "none".
    """

    name: str
    model: str
    cut: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    end: str = ""
    strips: bool = False
    system: str = "kept"
    alternates: bool = False
    lead: str = ""
    tail: str = ""
    learns: str = "all"

    @property
    def text(self) -> str:
        """The template itself."""
        return (TEXTS / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def ends(self) -> str:
        """Text of the token that ends an answer."""
        return self.end or self.eos


PUBLIC = {
    p.name: p
    for p in (
        Public("chatml", "teknium/OpenHermes-2.5-Mistral-7B", "llama2", "<s>", "<|im_end|>", ("<|im_start|>",)),
        Public(
            "llama2",
            "meta-llama/Llama-2-7b-chat-hf",
            "llama2",
            "<s>",
            "</s>",
            strips=True,
            alternates=True,
            lead=" ",
            tail=" ",
        ),
        Public(
            "llama3",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "llama3",
            "<|begin_of_text|>",
            "<|eot_id|>",
            HEADERS,
            strips=True,
        ),
        Public(
            "llama32",
            "meta-llama/Llama-3.2-1B-Instruct",
            "llama3",
            "<|begin_of_text|>",
            "<|eot_id|>",
            HEADERS,
            strips=True,
        ),
        Public(
            "gemma2",
            "google/gemma-2-2b-it",
            "gemma",
            "<bos>",
            "<eos>",
            GEMMA,
            end="<end_of_turn>",
            strips=True,
            system="refused",
            alternates=True,
        ),
        Public(
            "gemma3",
            "google/gemma-3-1b-it",
            "gemma",
            "<bos>",
            "<eos>",
            GEMMA,
            end="<end_of_turn>",
            strips=True,
            alternates=True,
        ),
        Public(
            "qwen25",
            "Qwen/Qwen2.5-0.5B-Instruct",
            "qwen",
            None,
            "<|im_end|>",
            ("<|endoftext|>", "<|im_start|>"),
            ("<tool_call>", "</tool_call>"),
        ),
        Public(
            "qwen3",
            "Qwen/Qwen3-0.6B",
            "qwen",
            None,
            "<|im_end|>",
            ("<|endoftext|>", "<|im_start|>"),
            ("<tool_call>", "</tool_call>", *THINK),
            lead="<think>\n\n</think>\n\n",
            learns="last",
        ),
        Public(
            "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm", "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)
        ),
        Public(
            "smollm3",
            "HuggingFaceTB/SmolLM3-3B",
            "llama3",
            None,
            "<|im_end|>",
            ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>"),
            THINK,
        ),
        Public("zephyr", "HuggingFaceH4/zephyr-7b-beta, TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama2", "<s>", "</s>"),
        Public(
            "phi3",
            "microsoft/Phi-3-mini-4k-instruct",
            "phi3",
            "<s>",
            "<|endoftext|>",
            ("</s>",),
            end="<|end|>",
            system="dropped",
        ),
        Public("phi35", "microsoft/Phi-3.5-mini-instruct", "phi3", "<s>", "<|endoftext|>", ("</s>",), end="<|end|>"),
        Public("phi4", "microsoft/phi-4", "llama3", "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
        Public(
            "mistral01",
            "mistralai/Mistral-7B-Instruct-v0.1",
            "llama2",
            "<s>",
            "</s>",
            system="refused",
            alternates=True,
        ),
        Public(
            "mistral03",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "mistral3",
            "<s>",
            "</s>",
            MISTRAL,
            strips=True,
            system="moved",
            alternates=True,
            lead=" ",
        ),
        Public("deepseek2", "deepseek-ai/DeepSeek-V2-Lite-Chat", "qwen", BEGIN, END, lead=" "),
        Public(
            "r1distill",
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            "qwen",
            BEGIN,
            END,
            plain=(USER, ASSISTANT, *THINK),
            learns="none",
        ),
        Public(
            "granite3",
            "ibm-granite/granite-3.0-8b-instruct",
            "gpt2",
            "<|end_of_text|>",
            "<|end_of_text|>",
            ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        ),
        Public("olmo2", "allenai/OLMo-2-1124-7B-Instruct", "llama3", "<|endoftext|>", "<|endoftext|>"),
        Public("openchat", "openchat/openchat-3.5-0106", "llama2", "<s>", "<|end_of_turn|>", ("</s>",), lead=" "),
        Public(
            "commandr",
            "CohereForAI/c4ai-command-r-plus",
            "gpt2",
            "<BOS_TOKEN>",
            "<|END_OF_TURN_TOKEN|>",
            ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            strips=True,
            alternates=True,
        ),
    )
}


# ---- tokenizers ------------------------------------------------------------------------------------------------------

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_after(*cuts: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _regex(cuts))]
    )


def _regex(cuts: tuple[pre_tokenizers.PreTokenizer, ...]) -> bool:
    return any(isinstance(cut, pre_tokenizers.Split) for cut in cuts)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")


BYTE_LEVEL = {  # normaliser, pre-tokeniser
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (None, _bytes_after(pre_tokenizers.Digits(individual_digits=True))),
    "llama3": (None, _bytes_after(_split("{1,3}"))),
    "qwen": (normalizers.NFC(), _bytes_after(_split(""))),
}
_UNDO = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACE = {  # normaliser, pre-tokeniser, decoder
    "llama2": (_PREPENDED, None, decoders.Sequence([*_UNDO, decoders.Strip(" ", 1, 0)])),
    "phi3": (_PREPENDED, None, decoders.Sequence([*_UNDO, decoders.Strip(" ", 1, 0)])),
    "mistral3": (
        None,
        pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
        decoders.Sequence([*_UNDO, decoders.Strip(" ", 1, 0)]),
    ),
    "gemma": (
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence(_UNDO),
    ),
}
CUTS = (*BYTE_LEVEL, *METASPACE)
SWALLOWING = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "</s>")  # Phi-3: white space after these is lost


@cache
def _corpus() -> tuple[str, ...]:
    rows = map(json.loads, (SAMPLE.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()[:150])
    return tuple(m["content"] + "\n\n  \n" for row in rows for m in [*row["prompt"], *row["chosen"]])


def _byte_level(cut: str) -> Tokenizer:
    normalizer, pre_tokenizer = BYTE_LEVEL[cut]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def _metaspace(cut: str) -> Tokenizer:
    """A SentencePiece vocabulary as transformers converts it: bytes for all it lacks; line breaks are bytes but for Gemma."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first" if cut == "mistral3" else "always")
    texts = _corpus() if cut == "gemma" else [line for text in _corpus() for line in text.splitlines()]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*first, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer, backend.decoder = METASPACE[cut]
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return backend


@cache
def _trained(cut: str) -> str:
    return (_byte_level(cut) if cut in BYTE_LEVEL else _metaspace(cut)).to_str()


def backend_of(public: Public) -> Tokenizer:
    """The model's tokenizer, with a vocabulary of its own."""
    backend = Tokenizer.from_str(_trained(public.cut))
    swallowing = SWALLOWING if public.cut == "phi3" else ()
    special = dict.fromkeys([public.bos, public.eos, *public.special, *swallowing])
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=text in swallowing) for text in special if text is not None]
    )
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in public.plain])
    return backend


def theirs_of(public: Public, text: str | None = None) -> PreTrainedTokenizerFast:
    """transformers' tokenizer with the template, or with another text of one."""
    named = {"bos_token": public.bos} if public.bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend_of(public), eos_token=public.eos, chat_template=text or public.text, **named
    )


def ours_of(public: Public, text: str | None = None) -> OurTokenizer:
    """Our tokenizer, read from the files that transformers writes."""
    with tempfile.TemporaryDirectory() as directory:
        theirs_of(public, text).save_pretrained(directory)
        return OurTokenizer.load(Path(directory))
