"""Which tokens of a packed batch belong together, and the attention that stays inside them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
VARLEN_SINCE = (8, 0)  # compute capability (A100): older cards have no flash kernel
VARLEN_WIDEST = 192  # of wider heads some cards lack the backward kernel
WINDOW_ROWS = 256  # tokens that attend together under a window: each passes over so many keys that it does not see


@dataclass(frozen=True)
class Documents:
    """Which tokens of a (B, T) batch belong together: consecutive stretches that attend only to themselves.

    A stretch may also *continue* an earlier one, its parent: its tokens then see the parent's, and their positions
    follow on. Two answers that continue one prompt read it, but not each other, and the prompt is computed once.

    lengths: tokens of every stretch, row after row, on the host; none crosses a row's end, their sum is B * T.
    positions: (B, T) int64, the position of every token in its own document.
    cu_seqlens: (n + 1,) int32, starts of the stretches and the end of the last, for variable-length kernels; the tail
        repeats the end, so that n takes few values and compiled code is made once.
    longest: upper bound of the lengths, parents included.
    parents: for every stretch the number of the one that it continues, or -1; empty where none continues another.
    key_index: (K,) int64, the tokens that are keys, stretch by stretch, a parent's before the stretch's own; None
        where no stretch has a parent. cu_keys: as cu_seqlens, for these.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    parents: tuple[int, ...] = ()
    key_index: Tensor | None = None
    cu_keys: Tensor | None = None

    @staticmethod
    def from_rows(
        rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", parents: Sequence[int] = ()
    ) -> Documents:
        """From the stretch lengths of each row; every row sums to the same T.

        parents: for every stretch, row after row, the number of the one in the same row that it continues, or -1.

        >>> Documents.from_rows([[2, 1], [3]]).positions.tolist()
        [[0, 1, 0], [0, 1, 2]]
        >>> Documents.from_rows([[3, 1, 2]], parents=[-1, 0, 0]).positions.tolist()
        [[0, 1, 2, 3, 3, 4]]
        """
        lengths = tuple(n for row in rows for n in row)
        width = sum(rows[0])
        if any(sum(row) != width for row in rows):
            raise ValueError(f"rows of a batch differ in length: {[sum(row) for row in rows]}")
        row_of = [i for i, row in enumerate(rows) for _ in row]
        if parents and len(parents) != len(lengths):
            raise ValueError(f"{len(parents)} parents for {len(lengths)} stretches: the lists must be equally long")
        for i, p in enumerate(parents):
            if p >= 0 and not (p < i and row_of[p] == row_of[i] and parents[p] < 0):
                raise ValueError(
                    f"stretch {i} cannot have the parent {p}: expected an earlier one of its row, without a parent"
                )
        before = [lengths[p] if p >= 0 else 0 for p in parents] or [0] * len(lengths)
        offsets = [torch.arange(a, a + n) for a, n in zip(before, lengths, strict=True)]
        positions = torch.cat(offsets).view(len(rows), width)
        documents = Documents(lengths, positions.to(device), _borders(lengths).to(device), width)
        if not any(before):
            return documents
        own = torch.split(torch.arange(sum(lengths)), list(lengths))
        read = [torch.cat([own[p], mine]) if p >= 0 else mine for p, mine in zip(parents, own, strict=True)]
        keys, cu_keys = torch.cat(read).to(device), _borders([len(r) for r in read]).to(device)
        return replace(documents, parents=tuple(parents), key_index=keys, cu_keys=cu_keys)

    @property
    def reach(self) -> int:
        """Positions that the longest document needs, on the host."""
        if not self.parents:
            return max(self.lengths)
        return max(n + (self.lengths[p] if p >= 0 else 0) for n, p in zip(self.lengths, self.parents, strict=True))

    @cached_property
    def _masks(self) -> dict[tuple[int, int, int | None, torch.dtype], Tensor]:
        return {}

    def mask(self, own: int, keys: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """What is added to the scores of the last `own` of `keys` tokens: (own, keys), 0 or -inf.

        A token sees itself and those before it, with a window the last `window` of these. Made once, so that all layers keep
        the same one for backward.
        """
        window = None if window is None or window >= keys else window
        if (mask := self._masks.get((own, keys, window, dtype))) is None:
            every = torch.ones(own, keys, dtype=torch.bool, device=self.positions.device)
            hidden = every.triu(keys - own + 1)
            if window is not None:
                hidden |= every.tril(keys - own - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
            self._masks[own, keys, window, dtype] = mask
        return mask

    def moved(self, move: Callable[[Tensor], Tensor]) -> Documents:
        """The same with `move` applied to every tensor: to put it on another device."""
        positions, cu_seqlens = move(self.positions), move(self.cu_seqlens)
        moved = replace(self, positions=positions, cu_seqlens=cu_seqlens)
        if self.key_index is None or self.cu_keys is None:
            return moved
        return replace(moved, key_index=move(self.key_index), cu_keys=move(self.cu_keys))

    @staticmethod
    def from_ids(ids: Tensor) -> Documents:
        """From (B, T) document numbers: a new stretch begins where the number changes and at every row.

        Reads `ids` on the host, which waits for a GPU; batches of `data` come with Documents ready.
        """
        rows = []
        for row in ids.tolist():
            cuts = [0, *(i for i in range(1, len(row)) if row[i] != row[i - 1]), len(row)]
            rows.append([b - a for a, b in pairwise(cuts)])
        return Documents.from_rows(rows, ids.device)


def _borders(lengths: Sequence[int]) -> Tensor:
    """(n + 1,) int32: starts of consecutive stretches and, up to a power of two of them, the end again and again."""
    ends = torch.tensor(lengths).cumsum(0)
    borders = torch.full(((1 << len(lengths).bit_length()) + 1,), int(ends[-1]), dtype=torch.int32)
    borders[0] = 0
    borders[1 : 1 + len(lengths)] = ends
    return borders


def attend_rows(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention inside every row. Shapes as in `attend_documents`."""
    shared = q.shape[2] != k.shape[2]
    if shared and q.is_cuda and q.dtype not in HALVES:  # whose only kernel without a (T, T) matrix wants equal heads
        k, v = (z.repeat_interleave(q.shape[2] // k.shape[2], 2) for z in (k, v))
        shared = False
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=shared)
    return y.transpose(1, 2)


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float = 0.0, window: int | None = None
) -> Tensor:
    """Causal attention inside every document.

    q and the result: (B, T, H, D). k, v: (B, T, K, D), where H is a multiple of K: queries h, h + 1, ... of H / K heads share
    a key head, which is never copied (Ainslie et al. 2023, arXiv 2305.13245). window: tokens that a token sees, itself
    included, the last ones of its document; None: all. A document that is no longer costs what it costs without.

    Where a card has it one variable-length flash kernel does all documents (`attention_path`); elsewhere each stretch
    is one call of `scaled_dot_product_attention`. No (T, T) mask is ever made. On two CPU cores at T = 1,024 and six
    documents a row this takes 0.36 of the time of plain causal attention over the row, forward and backward.
    """
    if attention_path(has_flash_kernel(q.device), q.dtype, q.shape[-1], dropout) == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (z.reshape(-1, *z.shape[2:]) for z in (q, k, v))
        cu, cu_keys, longest = documents.cu_seqlens, documents.cu_keys, documents.longest
        if documents.key_index is not None:
            k, v = (z.index_select(0, documents.key_index) for z in (k, v))
        # the kernel aligns its causal mask with the last key: a stretch sees its parent whole and itself up to here
        more: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and varlen_asks_for_groups() else {}
        sees = (-1 if window is None else window - 1, 0)  # tokens before it and after it
        y = varlen_attn(q, k, v, cu, cu if cu_keys is None else cu_keys, longest, longest, window_size=sees, **more)
        assert isinstance(y, Tensor)
        return y.view(*documents.positions.shape, *y.shape[1:])
    y = _attend_one_by_one(q, k, v, documents, dropout, window)
    assert isinstance(y, Tensor)
    return y


def _attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float, window: int | None
) -> Tensor:
    # On a CPU attention is float32 under bf16 autocast too: it is 1.6 times as fast at these lengths, and torch keeps
    # a bf16 kernel for every length that it ever met, 30 MB a step here.
    on_cpu = q.device.type == "cpu"
    dtype = torch.float32 if on_cpu and q.dtype in HALVES else q.dtype
    # Heads of keys stand where a batch does and heads that share one beside each other, as an expanded view of it: neither
    # torch's kernels nor autograd see a copy, and those for float32 on a GPU know no other way to share.
    batch = 1 if q.shape[2] == k.shape[2] else k.shape[2]
    with torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type) and not on_cpu):
        flat = (torch.unflatten(z.to(dtype).flatten(0, 1), 1, (batch, -1)).permute(1, 2, 0, 3) for z in (q, k, v))
        queries, keys, values = (torch.split(z, list(documents.lengths), 2) for z in flat)  # each (batch, heads, n, D)
        parts = []
        for i, parent in enumerate(documents.parents or (-1,) * len(queries)):
            k_i, v_i, before = keys[i], values[i], 0
            if parent >= 0:
                k_i, v_i = torch.cat([keys[parent], k_i], 2), torch.cat([values[parent], v_i], 2)
                before = documents.lengths[parent]
            k_i, v_i = (z.expand(-1, queries[i].shape[1], -1, -1) for z in (k_i, v_i))
            for begin, end, first in _pieces(before, documents.lengths[i], window):
                own, read, mask = queries[i][:, :, begin:end], slice(first, before + end), None
                if before + begin:  # of a text's beginning torch needs no mask
                    mask = documents.mask(end - begin, before + end - first, dtype, window)
                read_k, read_v = k_i[:, :, read], v_i[:, :, read]
                y = F.scaled_dot_product_attention(own, read_k, read_v, mask, dropout, is_causal=mask is None)
                parts.append(y.permute(2, 0, 1, 3))
    return torch.cat(parts).view(q.shape).to(q.dtype)


def _pieces(before: int, own: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """The parts of a stretch that attend together: their first token, their end, and the first key that they read.

    before: tokens of the stretch's parent. Keys are counted from the parent's first.

    >>> list(_pieces(0, 700, None)), list(_pieces(0, 700, 300)), list(_pieces(400, 7, 300))
    ([(0, 700, 0)], [(0, 300, 0), (300, 556, 1), (556, 700, 257)], [(0, 7, 101)])
    """
    if window is None:
        window = before + own
    begin = min(own, max(0, window - before))
    if begin:  # tokens from which the window reaches back to the beginning
        yield 0, begin, 0
    for start in range(begin, own, WINDOW_ROWS):
        yield start, min(own, start + WINDOW_ROWS), before + start - window + 1


def attention_path(
    flash: bool, dtype: torch.dtype, head_width: int, dropout: float = 0.0
) -> Literal["varlen", "stretches"]:
    """How packed documents attend: one variable-length flash kernel for all, or a call for each stretch.

    flash: whether the device has that kernel (`has_flash_kernel`).

    >>> attention_path(True, torch.bfloat16, 64), attention_path(True, torch.float32, 64)
    ('varlen', 'stretches')
    """
    half = dtype in HALVES
    fits = head_width % 8 == 0 and head_width <= VARLEN_WIDEST
    return "varlen" if flash and half and fits and dropout == 0.0 else "stretches"


def has_flash_kernel(device: torch.device) -> bool:
    """Whether this device, and this build of torch, has the variable-length flash kernel.

    Compiled code takes the answer as a constant. So it is a plain bool: torch 2.11 cannot compare a tuple that became
    a constant. And it depends on the device alone: head width and dropout turn into symbols as soon as a second model
    in the process has different ones, and no symbol can be an argument of a constant.
    """
    capability = flash_capability(device)
    return capability is not None and capability >= VARLEN_SINCE


def flash_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA card, or None: no card, or a torch that was built without flash attention."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return None
    return torch.cuda.get_device_capability(device)


@cache
def varlen_asks_for_groups() -> bool:
    """Whether this torch's kernel wants to be told that heads share keys; those that do not ask take them as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def prepare_for_compiling() -> None:
    """Make this module ready for compiled callers. Before, torch's compiler is not loaded: 70 MB and a second for nothing.

    A Python loop over lengths that change with every batch would be compiled anew each time: it stays outside. What a
    card can do is asked once.
    """
    global _attend_one_by_one, has_flash_kernel, varlen_asks_for_groups
    _attend_one_by_one = torch.compiler.disable(_attend_one_by_one)  # type: ignore[no-untyped-call]
    has_flash_kernel = torch.compiler.assume_constant_result(has_flash_kernel)  # type: ignore[no-untyped-call]
    varlen_asks_for_groups = torch.compiler.assume_constant_result(varlen_asks_for_groups)  # type: ignore[no-untyped-call]
