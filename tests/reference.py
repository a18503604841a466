"""Second implementations to compare with: plain, slow, obvious, and written without a look at the package's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.data.encoding import END, NEXT
from tunesmith.data.hh_template import HH
from tunesmith.data.template import Segment
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT, GPTConfig

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers stores these as (in, out)


def random_model(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT in which every weight matters: matrices, biases and norms are all drawn at random."""
    model = GPT(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.2 * noise if "ln_" in name and name.endswith("weight") else 0.15 * noise)
    return model.eval()


def scripted_model(script: Mapping[int, Sequence[float]], block_size: int, vocab_size: int) -> GPT:
    """A GPT whose logits after position i are `script[i]`, whatever the text (0 for every token where there is none)."""
    model = GPT(
        GPTConfig(n_layer=1, n_head=1, n_embd=block_size, vocab_size=vocab_size, block_size=block_size, tied_head=False)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.ln_f.weight.fill_(1)
        model.wpe.weight.copy_(torch.eye(block_size))
        model.ln_f.bias.fill_(-model.ln_f(model.wpe.weight)[0, 1])  # the states are one-hot again, but for a factor
        for position, logits in script.items():
            model.lm_head.weight[:, position] = torch.tensor(logits) / model.ln_f(model.wpe.weight)[0, 0]
    return model.eval()


def silent(*stops: int) -> SimpleNamespace:
    """A tokenizer with these stops for `decode`, whose tokens are no text."""
    return SimpleNamespace(stops=frozenset(stops), template=HH, decode=lambda ids: "")


def saying(ids: Sequence[int], prompt_length: int, block_size: int = 64, vocab_size: int = 6144) -> GPT:
    """A model that, after a prompt of this many tokens, says `ids` for certain."""
    script = {prompt_length - 1 + i: [100.0 * (v == token) for v in range(vocab_size)] for i, token in enumerate(ids)}
    return scripted_model(script, block_size, vocab_size)


def in_transformers(model: GPT, attention: str = "eager"):
    """The same model as transformers' GPT2LMHeadModel, weight by weight, without a file in between."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.n_inner, layer_norm_epsilon=c.layer_norm_epsilon, tie_word_embeddings=c.tied_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).to(model.wte.weight.dtype).eval()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(oriented(name, ours[name.removeprefix("transformer.")]))
    return theirs


def oriented(name: str, value: Tensor) -> Tensor:
    """Our weight or gradient as transformers holds it (and the other way round)."""
    return value.t() if name.endswith(CONV1D) else value


def pack_batch(rows: Sequence[Sequence[Sequence[int]]], carries_loss) -> Batch:
    """Rows of documents (lists of ids, each row equally long) as a Batch.

    carries_loss(document, t) tells whether the prediction of document[t + 1] after document[t] counts.
    """
    targets = [-1] * sum(len(d) for row in rows for d in row)
    at = 0
    for document in (d for row in rows for d in row):
        for t in range(len(document) - 1):
            if carries_loss(document, t):
                targets[at + t] = document[t + 1]
        at += len(document)
    ids = torch.tensor([[token for d in row for token in d] for row in rows])
    wanted = [i for i, target in enumerate(targets) if target >= 0]
    documents = Documents.from_rows([[len(d) for d in row] for row in rows])
    return Batch(ids, torch.tensor(wanted), torch.tensor([targets[i] for i in wanted]), documents)


def batch_nll(model: GPT, batch: Batch) -> tuple[float, int]:
    """Summed loss and number of targets of a batch: document by document, full logits, float64."""
    counted = list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))[: batch.count]
    supervised = dict(counted)
    assert len(supervised) == len(counted)
    flat, width = batch.input_ids.flatten(), batch.input_ids.shape[1]
    lengths = batch.documents.lengths if batch.documents else [width] * len(batch.input_ids)
    total, start = 0.0, 0
    with torch.no_grad():
        for n in lengths:
            logits = model.lm_head(model(flat[None, start : start + n]))[0].double()
            for t in range(n):
                if start + t in supervised:
                    total += F.cross_entropy(logits[t], torch.tensor(supervised[start + t])).item()
            start += n
    return total, len(supervised)


def greedy(model: GPT, prompt: Sequence[int], n: int, end: int) -> list[int]:
    """n tokens, the whole text read anew for every one; the end token, if it comes, is the last."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model.lm_head(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability after top-k, then top-p among those: the smallest set of likely tokens reaching top_p."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    likely_first = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        likely_first = likely_first[:top_k]
    mass = sum(p[i] for i in likely_first)
    kept, so_far = [], 0.0
    for i in likely_first:
        kept.append(i)
        so_far += p[i] / mass
        if so_far >= top_p:
            break
    return {i: p[i] / sum(p[j] for j in kept) for i in kept}


def numpy_optimizer(
    name: str, p: np.ndarray, gradients: Sequence[np.ndarray], lr: float, decay: float, momentum: float
):
    """The weight after each of the gradients. adamw: Loshchilov & Hutter 2019, algorithm 2; adam: Kingma & Ba 2015."""
    m, v, buffer = np.zeros_like(p), np.zeros_like(p), None
    path = []
    for t, g in enumerate(gradients, 1):
        if name == "adamw":
            p = p - lr * decay * p
        else:
            g = g + decay * p
        if name in ("adamw", "adam"):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        else:
            buffer = g if buffer is None else momentum * buffer + g
            p = p - lr * {"sgd": g, "sgd-momentum": buffer, "sgd-nesterov": g + momentum * buffer}[name]
        path.append(p)
    return path


def marked(row: Sequence[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of one row, each segment encoded by itself, and the bits of what each of them teaches."""
    ids: list[int] = []
    flags: list[int] = []
    for segment in row:
        part = [tokenizer.special_id(segment.text)] if segment.special else tokenizer.encode_batch([segment.text])[0]
        if segment.loss and ids:
            flags[-1] |= NEXT | (END if segment.special else 0)
        ids += part
        flags += [NEXT if segment.loss else 0] * (len(part) - 1) + [END if segment.closes else 0]
    return ids, flags


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's statistic in standard deviations above its mean (degrees of freedom n - 1)."""
    n, freedom = sum(counts), len(counts) - 1
    statistic = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probabilities, strict=True))
    return (statistic - freedom) / math.sqrt(2 * freedom)
