"""Outside judgement of answers: any reward model, ours or a Hugging Face sequence classifier, from texts to one number each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from tunesmith.data.dialogue import Message
from tunesmith.data.prompts import conversation, encode_answered
from tunesmith.device import resolve_device
from tunesmith.errors import UserError, note
from tunesmith.files.names import is_adapter, load_reward, read_model
from tunesmith.files.reward_models import is_reward_model
from tunesmith.files.run import Run
from tunesmith.generation.context import Reading, fit_with_answer
from tunesmith.jsontext import read_json
from tunesmith.judge.measures import accuracy_interval
from tunesmith.models.attention import Documents
from tunesmith.models.known import FAMILIES
from tunesmith.models.modes import evaluation_mode
from tunesmith.models.reward_head import RewardModel
from tunesmith.progress import STOP

PACKED_TOKENS = 4096  # in one forward pass of our own reward models
PADDED_TOKENS = 4096  # the same for a classifier of transformers, padding included
Question = str | Sequence[Message] | Sequence[Mapping[str, str]]


class Scorer(Protocol):
    """Gives an answer one number, higher for better; only differences between its numbers mean something.

    description: what it was trained for and how often it is right, for the reader of its scores.
    """

    name: str
    description: str

    def score(self, prompts: Sequence[Question], answers: Sequence[str]) -> list[float]:
        """One number an answer. prompts: the conversation before each, or its only question as text."""
        ...


def load_scorer(name: str, *, device: str = "auto", option: str = "--reward") -> Scorer:
    """The reward model of that name: a run of `tunesmith reward`, or a sequence classifier, local or on the hub.

    option: the option that an error message names.
    Raises: UserError if there is none, if it gives several numbers, or if it needs the transformers package and that is missing.
    """
    try:
        directory, kind = read_model(name, lambda d: (d, None if is_adapter(d) else read_json(d / "config.json")))
    except UserError as error:
        raise UserError(f"{option} {name}: {error}") from None
    if kind is None or kind.get("model_type") in FAMILIES:
        return OwnScorer(name, device)
    if not is_reward_model(directory):
        named = ", ".join(kind.get("architectures") or ["no architecture"])
        raise UserError(
            f"{name} is not a reward model: its config.json names {named}, expected a ...ForSequenceClassification"
        )
    return ClassifierScorer(name, directory, device)


@dataclass
class Cuts:
    """What was left out of texts that are longer than a scorer can read."""

    conversations: int = 0  # that lost their first turns
    questions: int = 0  # that lost their beginning
    answers: int = 0  # that lost their end

    def add(self, reading: Reading, *, answer: bool) -> None:
        """Count one text."""
        self.conversations += bool(reading.turns)
        self.questions += bool(reading.characters)
        self.answers += answer

    def tell(self, name: str, limit: int, texts: int) -> None:
        """A note, if anything was left out."""
        what = {
            f"the first turns of {self.conversations:,} conversations": self.conversations,
            f"the beginning of {self.questions:,} questions": self.questions,
            f"the end of {self.answers:,} answers": self.answers,
        }
        if cut := [words for words, count in what.items() if count]:
            note(f"{name} reads at most {limit:,} tokens; of {texts:,} texts are left out: {', '.join(cut)}")


class OwnScorer:
    """A reward model of this project. The answer is read in the form that it was trained on; texts are packed."""

    def __init__(self, name: str, device: str = "auto") -> None:
        self.name = name
        self.description = describe_run(name)
        self.model, self.tokenizer = load_reward(name, device=device)

    def score(self, prompts: Sequence[Question], answers: Sequence[str]) -> list[float]:
        """As `Scorer.score`; what is longer than the model can read is cut as told, with a note, by `generation.context`."""
        limit, cuts = self.model.trunk.longest, Cuts()
        ids = [self._encode(p, a, limit, cuts) for p, a in zip(prompts, answers, strict=True)]
        cuts.tell(self.name, limit, len(ids))
        return score_texts(self.model, ids)

    def _encode(self, prompt: Question, answer: str, limit: int, cuts: Cuts) -> list[int]:
        turns = conversation(prompt)
        before, spoken = encode_answered(self.tokenizer, turns, answer)
        if len(before) + len(spoken) <= limit:
            return before + spoken

        def length(some: Sequence[Message]) -> int:
            return len(encode_answered(self.tokenizer, some, answer)[0])

        reading = fit_with_answer(turns, length, len(spoken), limit)
        ids = encode_answered(self.tokenizer, reading.messages, answer)[0] + spoken
        cuts.add(reading, answer=len(ids) > limit)
        return ids[:limit]


def score_texts(model: RewardModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """Scores of texts of tokens, each at its last one; packed without padding, longest first."""
    device = model.device
    scores = [0.0] * len(texts)
    with evaluation_mode(model):
        for group in _groups([len(t) for t in texts], PACKED_TOKENS, padded=False):
            documents = Documents.from_rows([[len(texts[i]) for i in group]], device)
            tokens = torch.tensor([list(chain.from_iterable(texts[i] for i in group))], device=device)
            last = documents.cu_seqlens[1 : len(group) + 1].long() - 1
            for i, value in zip(group, model(tokens, documents, rows=last).tolist(), strict=True):
                scores[i] = value
    return scores


class ClassifierScorer:
    """A sequence classifier of transformers with one output, such as OpenAssistant's DeBERTa.

    Read as its tokenizer's pair (question, answer); where the tokenizer has a chat template, in that form. A prompt of
    several turns is joined by empty lines.
    """

    def __init__(self, name: str, directory: Path, device: str = "auto") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError(
                f"{name} is a model of the transformers package, which is not installed: pip install 'tunesmith[judge]', "
                "or name a reward model trained with tunesmith reward"
            )
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name = name
        self.description = trained_elsewhere(name)
        self.device = resolve_device(device)
        try:
            model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                directory, local_files_only=True
            )
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"{name} cannot be loaded by transformers: {str(error).strip().splitlines()[0]}") from None
        if model.config.num_labels != 1:
            raise UserError(f"{name} gives {model.config.num_labels} numbers per text; a reward model gives one")
        self.model = model.eval().to(self.device)
        positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.limit = int(min(positions, self.tokenizer.model_max_length))

    def score(self, prompts: Sequence[Question], answers: Sequence[str]) -> list[float]:
        """As `Scorer.score`; what is longer than the model can read is cut as told, with a note, by `generation.context`."""
        cuts = Cuts()
        encoded = [self._fitted(conversation(p), a, cuts) for p, a in zip(prompts, answers, strict=True)]
        cuts.tell(self.name, self.limit, len(encoded))
        scores = [0.0] * len(encoded)
        with torch.inference_mode():
            for group in _groups([len(e["input_ids"]) for e in encoded], PADDED_TOKENS, padded=True):
                batch = self.tokenizer.pad([encoded[i] for i in group], return_tensors="pt").to(self.device)
                for i, value in zip(group, self.model(**batch).logits.float()[:, 0].tolist(), strict=True):
                    scores[i] = value
        return scores

    def _fitted(self, turns: list[Message], answer: str, cuts: Cuts) -> dict[str, Any]:
        encoded = self._encode(turns, answer)
        if len(encoded["input_ids"]) <= self.limit:
            return encoded
        spoken = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        reading = fit_with_answer(
            turns, lambda some: len(self._encode(some, answer)["input_ids"]) - spoken, spoken, self.limit
        )
        encoded = self._encode(reading.messages, answer)
        over = len(encoded["input_ids"]) > self.limit
        cuts.add(reading, answer=over)
        return self._encode(reading.messages, answer, max_length=self.limit) if over else encoded

    def _encode(self, turns: Sequence[Message], answer: str, **cut: int) -> dict[str, Any]:
        """cut: `max_length`, what the answer's end is cut to."""
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": m.role, "content": m.content} for m in [*turns, Message("assistant", answer)]]
            return dict(self.tokenizer.apply_chat_template(messages, return_dict=True, truncation=bool(cut), **cut))
        question = "\n\n".join(m.content for m in turns)
        return dict(self.tokenizer(question, answer, truncation="only_second" if cut else False, **cut))


def _groups(lengths: Sequence[int], budget: int, *, padded: bool) -> Iterator[list[int]]:
    """Numbers of texts, longest first, in groups of at most `budget` tokens (padded: as wide as the first)."""
    group: list[int] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = lengths[group[0]] * (len(group) + 1) if padded and group else used + lengths[i]
        if group and cost > budget:
            STOP.check()
            yield group
            group, used = [], 0
        group.append(i)
        used += lengths[i]
    if group:
        STOP.check()
        yield group


def trained_elsewhere(name: str) -> str:
    """What can be said of a reward model that no run here has made."""
    return f"{name}: trained elsewhere; tunesmith evaluate {name} PAIRS measures how often it is right"


def describe_run(name: str) -> str:
    """What a reward model of ours was trained for and how often it is right, from its run; brief where there is no run."""
    path = Path(name.rpartition("@")[0] or name).expanduser()
    if not (path / "status.json").exists():
        return trained_elsewhere(name)
    run = Run(path)
    step = run.status.get("best_step")
    if "@" in name and name.rpartition("@")[2].isdigit():
        step = int(name.rpartition("@")[2])
    held = next((e for e in run.metrics("eval") if e["step"] == step), None)
    pairs = next(iter(run.metrics("pairs")), None)
    words = f"{name}: trained on {run.config['data']['name']}"
    accuracy = None if held is None else held.get("validation_accuracy")
    if pairs and accuracy is not None and (right := accuracy_interval(accuracy, pairs)):
        words += (
            f"; right on {_percent(right.mean)} ({_percent(right.low)} to {_percent(right.high)}) of {right.n:,} held-out pairs, "
            f'where "the longer answer is better" is right on {_percent(pairs["validation_longer_chosen"])}'
        )
    return words


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
