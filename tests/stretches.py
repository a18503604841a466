"""Rows of stretches that continue others, and attention over them computed plainly."""

from itertools import pairwise

import torch
import torch.nn.functional as F

HEADS, WIDTH = 2, 4


def laid_out(rows):
    """Lengths by row and parents of groups (length, continuing length, ...); each row is filled up to the longest."""
    lengths, parents = [[n for group in row for n in group] for row in rows], []
    width = max(map(sum, lengths))
    for row, own in zip(rows, lengths, strict=True):
        for group in row:
            parents += [-1] + [len(parents)] * (len(group) - 1)
        if sum(own) < width:
            own.append(width - sum(own))
            parents.append(-1)
    return lengths, parents


def joined(lengths, parents):
    """For every stretch the flat indices of the text that it ends: its parent's tokens and its own."""
    starts = [0]
    for n in (n for row in lengths for n in row):
        starts.append(starts[-1] + n)
    own = [list(range(a, b)) for a, b in pairwise(starts)]
    return [(own[p] if p >= 0 else []) + mine for p, mine in zip(parents, own, strict=True)], [len(o) for o in own]


def one_by_one(q, k, v, lengths, parents, window=None):
    """Torch's plain causal attention over every joined text, of which the stretch's own outputs are kept.

    window: tokens that a token sees, itself included.
    """
    q, k, v = (z.flatten(0, 1) for z in (q, k, v))
    parts = []
    for text, own in zip(*joined(lengths, parents), strict=True):
        texts = (z[text].transpose(0, 1) for z in (q, k, v))  # each (H, n, D)
        seen = (
            torch.ones(len(text), len(text), dtype=torch.bool, device=q.device).tril().triu(1 - (window or len(text)))
        )
        parts.append(F.scaled_dot_product_attention(*texts, seen).transpose(0, 1)[-own:])
    return torch.cat(parts)


def variable_length_kernel(q, k, v, documents):
    """What a card computes, in plain torch: keys gathered, stretches cut at cu_seqlens and cu_keys, causal up to the last key."""
    q, k, v = (z.flatten(0, 1) for z in (q, k, v))
    if documents.key_index is not None:
        k, v = k[documents.key_index], v[documents.key_index]
    cu_keys = documents.cu_seqlens if documents.cu_keys is None else documents.cu_keys
    parts = []
    for (a, b), (c, d) in zip(pairwise(documents.cu_seqlens.tolist()), pairwise(cu_keys.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) / WIDTH**0.5
        last = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        scores = scores.masked_fill(torch.arange(d - c) > last, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), v[c:d]))
    return torch.cat(parts)


def gradients(attend, rows, seed=0):
    """Outputs (N, H, D) of `attend(q, k, v)`, and the gradients of q, k and v under a random weight on each output."""
    lengths, _ = laid_out(rows)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), sum(lengths[0]), HEADS, WIDTH)
    q, k, v, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    inputs = [z.requires_grad_() for z in (q, k, v)]
    y = attend(*inputs).reshape(-1, HEADS, WIDTH)
    return y.detach(), *torch.autograd.grad((y * weight.view_as(y)).sum(), inputs)
