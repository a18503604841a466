"""A reward model: a score in place of the head, one number for a text, read off its last token; trained here on preference pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.attention import Documents
from tunesmith.models.model import Model

SCORE = "score.weight"  # here and in transformers


class RewardModel(nn.Module):
    """A model without its head, and `score`, a linear layer from the last token's state to one number.

    >>> from tunesmith.models.gpt2 import GPT, GPTConfig
    >>> model = RewardModel(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=6)))
    >>> model(torch.tensor([[1, 2, 3, 4]]), Documents.from_rows([[3, 1]]), rows=torch.tensor([2, 3])).shape
    torch.Size([2])
    """

    def __init__(self, trunk: Model) -> None:
        """trunk: taken over, without its `lm_head`."""
        super().__init__()
        if hasattr(trunk, "lm_head"):
            del trunk.lm_head
        self.trunk = trunk
        self.score = nn.Linear(trunk.width, 1, bias=False, device=trunk.device, dtype=trunk.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and tokens have to be."""
        return self.trunk.device

    def init_score(self, seed: int) -> None:
        """A new score layer: normal 0.02, as transformers draws it."""
        nn.init.normal_(self.score.weight, std=0.02, generator=torch.Generator().manual_seed(seed))

    def forward(self, tokens: Tensor, documents: Documents | None = None, *, rows: Tensor) -> Tensor:
        """Scores of the texts that end at the tokens `rows`, (n,) int64 indices into B * T: (n,) float32.

        Arguments as in `Model.forward`. The score layer itself is never in half precision.
        """
        hidden = self.trunk(tokens, documents, rows=rows)  # (n, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.score.weight.dtype), self.score.weight)[:, 0]
