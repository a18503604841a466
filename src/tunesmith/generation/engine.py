"""Answers from a model: batched decoding with a KV cache, sampling from a random stream per prompt, stopping at the end of the turn."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.prompts import Conversation
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.device import return_freed_memory
from tunesmith.files.answers import FinishReason
from tunesmith.generation import token_graph
from tunesmith.generation.context import TooLong, read_prompts
from tunesmith.generation.sampling import Sampling, check_counts, sample_tokens, stream_of
from tunesmith.models.attention import Documents
from tunesmith.models.cache import Cache
from tunesmith.models.linear import pack_for_good, packed_weights
from tunesmith.models.model import Model
from tunesmith.models.modes import evaluation_mode
from tunesmith.progress import STOP

PREFILL_TOKENS = 2048  # prompt tokens in one forward pass, to bound its memory
PACK_STEPS = 64  # decoding steps from which on packing the weights is paid back
TOO_LONG: dict[bool, TooLong] = {False: "refuse", True: "cut"}


@dataclass(frozen=True)
class Answer:
    """One answer. tokens: the end included.

    finish_reason: `stop` (it ended its turn), `length` (the limit did) or `context` (the model has no further positions).
    """

    text: str
    finish_reason: FinishReason
    tokens: int


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int = 1234,
    batch_size: int = 64,
    cut_front: bool = False,
) -> list[str]:
    """The assistant's next turn for each conversation, as text.

    An answer depends only on the weights, its own prompt, the settings and the seed, not on the other prompts or the batch.

    Args:
        prompts: conversations, each `[{"role": "user", "content": "..."}, ...]`.
        temperature: 0 = greedy.
        top_p, top_k: sample among the most likely tokens only; 1 and 0 = all.
        seed: decides the draws, together with the prompt's own tokens: other prompts, their order and their number do not.
        cut_front: drop the beginning of a prompt that is too long, by the rule of `generation.context`, instead of raising.
    Raises: UserError if a prompt leaves no room for its answer (`generation.context`) or is not a conversation.
    """
    options, too_long = Sampling(temperature, top_p, top_k, seed), TOO_LONG[cut_front]
    answers = generate_answers(model, tokenizer, prompts, options, max_new_tokens, batch_size, too_long)
    return [answer.text for answer in answers]


def prepare(model: Model) -> Model:
    """Convert the weights in place to the form that decodes fastest on this device; returns the model.

    For a model that only answers and is scored: it can no longer be trained, moved or saved.
    """
    for block in model.blocks:  # the head's plain weight is the embedding too
        pack_for_good(block)
        return_freed_memory()
    return model


def generate_answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Conversation],
    sampling: Sampling,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    too_long: TooLong = "refuse",
    samples: int = 1,
) -> list[Answer]:
    """As `generate`, with finish reasons and token counts.

    Args:
        batch_size: answers made at a time.
        too_long: what may be left out of a prompt that is too long.
        samples: answers per prompt, as from calls with `sampling.sample`, `sampling.sample` + 1, ...; the prompt is
            read once for all of them.
    Returns: prompts x samples answers, those of one prompt side by side.
    On a CPU a call of many steps packs the weights while it runs, which takes their size in memory again (see `prepare`).
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples)
    sampling.check()
    limit = model.longest
    ids = read_prompts(tokenizer, prompts, positions=limit, max_new_tokens=max_new_tokens, too_long=too_long)
    wanted = [(i, n) for i in range(len(ids)) for n in range(samples)]
    answers: dict[tuple[int, int], Answer] = {}
    by_length = sorted(wanted, key=lambda w: -len(ids[w[0]]))  # prompts of like length share a cache
    groups = [by_length[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    with packed_weights(model) if len(groups) * max_new_tokens >= PACK_STEPS else contextlib.nullcontext():
        for group in groups:
            new: list[list[int]] = [[] for _ in group]
            ended: list[bool] = [False] * len(group)
            texts, numbers = [ids[i] for i, _ in group], [n for _, n in group]
            for row, token, stopped in decode(model, tokenizer, texts, sampling, max_new_tokens, numbers):
                new[row].append(token)
                ended[row] = stopped
            for row, which in enumerate(group):
                answers[which] = _answer(tokenizer, new[row], ended[row], len(new[row]) < max_new_tokens)
    return [answers[which] for which in wanted]


def stream(
    model: Model,
    tokenizer: Tokenizer,
    conversation: Conversation,
    sampling: Sampling,
    max_new_tokens: int = 128,
    too_long: TooLong = "refuse",
) -> Generator[str, None, Answer]:
    """One answer piece by piece; the generator's return value is the whole answer.

    A piece is held back while it could still be the beginning of a stop text or of a character.
    """
    check_counts(max_new_tokens=max_new_tokens)
    limit = model.longest
    (prompt,) = read_prompts(
        tokenizer, [conversation], positions=limit, max_new_tokens=max_new_tokens, too_long=too_long
    )
    new: list[int] = []
    sent, ended = 0, False
    for _, token, ended in decode(model, tokenizer, [prompt], sampling, max_new_tokens):
        new.append(token)
        text = tokenizer.answer(new).rstrip("\ufffd")
        safe = len(text) if ended else tokenizer.template.settled(text)
        if safe > sent:
            yield text[sent:safe]
            sent = safe
    answer = _answer(tokenizer, new, ended, len(new) < max_new_tokens)
    if len(answer.text) > sent:
        yield answer.text[sent:]
    return answer


def _answer(tokenizer: Tokenizer, ids: Sequence[int], stopped: bool, short: bool) -> Answer:
    """short: fewer tokens than were allowed. An answer that is so without having stopped had no further positions."""
    return Answer(tokenizer.answer(ids), "stop" if stopped else "context" if short else "length", len(ids))


def decode(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    samples: Sequence[int] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """New tokens of a batch of prompts as they are made: (row, token, whether the row's answer ended itself with it).

    An answer ends with one of the tokenizer's `stops`, or with the token that completes a stop text of its template.
    Prompts are read packed, without padding, and a prompt that is repeated beside itself is read once. A finished row
    leaves the batch, so that the last long answer does not pay for the short ones. On a CUDA device steps are recorded
    and replayed (`token_graph`).

    samples: what is added to `sampling.sample` for each prompt; None: nothing.
    """
    sampling.check()
    device, limit = model.device, model.longest
    numbers = samples or [0] * len(prompts)
    room = [min(max_new_tokens, limit - len(p)) for p in prompts]
    streams = [stream_of(sampling, n, p, max(room)) for p, n in zip(prompts, numbers, strict=True)]
    draws = torch.tensor(np.stack(streams), device=device)  # (B, steps): a copy a step would wait for a GPU
    read = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    record = token_graph.recorder(device, max(room))
    with evaluation_mode(model):  # not around the yields: the caller's modes are the caller's
        cache = model.new_cache([len(p) for p, _ in read], max(room), [copies for _, copies in read])
        logits = torch.cat([_read(model, cache, group, device) for group in _groups([p for p, _ in read])])
        if len(read) < len(prompts):
            logits = logits.repeat_interleave(torch.tensor([n for _, n in read], device=device), 0)  # (B, V)
    next_logits = partial(_next, model)
    fixed = None if record is None else token_graph.FixedSteps(next_logits, cache, logits, record)
    rows, ends, template = list(range(len(prompts))), tokenizer.stops, tokenizer.template
    tails: list[list[int]] = [[] for _ in prompts]
    kept = template.longest_stop + 1  # tokens that hold any stop text whole: none of them has less than a byte
    for step in range(max_new_tokens):
        STOP.check()
        tokens = sample_tokens(logits, draws[:, step], sampling)
        done = []
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            tails[row] = [*tails[row], token][-kept:]
            stopped = token in ends or template.cut_at_stop(tokenizer.decode(tails[row]))[1]
            yield row, token, stopped
            if stopped or step + 1 == room[row]:
                done.append(i)
        if len(done) == len(rows):
            return
        if done:
            stay = cache.drop(done)
            moved = torch.tensor(stay, device=device)
            rows, tokens, draws = [rows[i] for i in stay], tokens[moved], draws[moved]
        left = max(room[row] for row in rows) - step - 1
        logits = next_logits(tokens, cache) if fixed is None else fixed(tokens, left)


def _next(model: Model, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits after one more token of every sequence. tokens: (B,) int64; the result: (B, V)."""
    with evaluation_mode(model):
        return model.lm_head(model(tokens[:, None], cache=cache)[:, 0])  # type: ignore[no-any-return]


def _groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(prompt)
    yield group


def _read(model: Model, cache: Any, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Fill the cache with packed prompts; logits after each prompt's last token, (B, V)."""
    documents = Documents.from_rows([[len(p) for p in prompts]], device)
    tokens = torch.tensor([list(chain.from_iterable(prompts))], device=device)
    last = documents.cu_seqlens[1 : len(prompts) + 1].long() - 1
    return model.lm_head(model(tokens, documents, rows=last, cache=cache))  # type: ignore[no-any-return]
