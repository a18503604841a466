"""A reward model: GPT-2 with one number for a text, read off its last token; trained here on preference pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.attention import Documents
from tunesmith.models.gpt2 import GPT


class RewardModel(nn.Module):
    """A GPT without its head, and `score`, a linear layer from the last token's state to one number.

    >>> from tunesmith.models.gpt2 import GPTConfig
    >>> model = RewardModel(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=6)))
    >>> model(torch.tensor([[1, 2, 3, 4]]), Documents.from_rows([[3, 1]]), rows=torch.tensor([2, 3])).shape
    torch.Size([2])
    """

    def __init__(self, transformer: GPT) -> None:
        """transformer: taken over, without its `lm_head`."""
        super().__init__()
        if hasattr(transformer, "lm_head"):
            del transformer.lm_head
        self.transformer = transformer
        weight = transformer.wte.weight
        self.score = nn.Linear(transformer.config.n_embd, 1, bias=False, device=weight.device, dtype=weight.dtype)

    def init_score(self, seed: int) -> None:
        """A new score layer: normal 0.02, as transformers draws it."""
        nn.init.normal_(self.score.weight, std=0.02, generator=torch.Generator().manual_seed(seed))

    def forward(self, tokens: Tensor, documents: Documents | None = None, *, rows: Tensor) -> Tensor:
        """Scores of the texts that end at the tokens `rows`, (n,) int64 indices into B * T: (n,) float32.

        Arguments as in `GPT.forward`. The score layer itself is never in half precision.
        """
        hidden = self.transformer(tokens, documents, rows=rows)  # (n, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.score.weight.dtype), self.score.weight)[:, 0]
