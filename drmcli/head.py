"""The head of a reward model: from image tokens to a score.

DRM (arXiv 2605.25661, section 3): f_p = MLP(f_v) to a lower width; tokens back on their 2-D grid; s = MLP(Pool(Conv(f_p))).

Dimension letters: B latents, L = h w image tokens, D token width, F head width, T tapped blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """s = MLP(Pool(Conv(Reshape(MLP(f_v))))), times a learnable scale. Always float32.

    An unscaled Bradley-Terry head can sit near chance for long, hence the scale.
    """

    def __init__(self, widths: Sequence[int], head_width: int, pool: str):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.reduce = nn.Sequential(nn.Linear(sum(widths), head_width), nn.GELU(), nn.Linear(head_width, head_width))
        self.conv = nn.Conv2d(head_width, head_width, 3, padding=1)
        self.attend = nn.Conv2d(head_width, 1, 1) if pool == "attention" else None
        self.score = nn.Sequential(nn.Linear(head_width, head_width), nn.GELU(), nn.Linear(head_width, 1))
        self.log_scale = nn.Parameter(torch.zeros(1))  # not of shape []: sharded training has no place for a scalar

    def forward(self, tokens: list[Tensor], height: int, width: int) -> Tensor:
        """T tensors [B, L, D] of a height x width grid, row-major -> scores [B]."""
        x = torch.cat([norm(t.float()) for norm, t in zip(self.norms, tokens)], dim=-1)
        x = self.reduce(x).transpose(1, 2).unflatten(2, (height, width))  # [B, F, h, w]
        x = F.gelu(self.conv(x))
        if self.attend is None:
            pooled = x.mean((2, 3))
        else:
            pooled = (x * self.attend(x).flatten(2).softmax(-1).unflatten(2, (height, width))).sum((2, 3))
        return self.score(pooled).squeeze(-1) * self.log_scale.exp()
