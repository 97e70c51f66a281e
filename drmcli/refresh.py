"""A reward model that learns on: its head is trained further on fresh samples of the policy, labelled by a scorer that is trusted.

A reward model is fooled by what it never saw. The samples of a policy that has begun to fool it are what it must see.

Dimension letters: P prompts, K samples of a prompt, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from drmcli.flow import add_noise
from drmcli.generator import PromptEmbeds
from drmcli.losses import bradley_terry
from drmcli.reward import RewardModel


def continue_head(
    model: RewardModel,
    latents: Tensor,
    cond: PromptEmbeds,
    trusted: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    prompts_per_step: int = 8,
) -> tuple[float, float]:
    """Train the head on all pairs of a prompt's samples by the Bradley-Terry loss. Returns the mean loss of the first and of the last
    tenth.

    latents [P, K, C, H, W] are clean; cond has P rows; trusted [P, K] are the scores that say which of two is better (equal ones say
    nothing).
    Every step takes some prompts, a sigma in [0, 1] each, and one noise for all samples of a prompt. The backbone stays as it is.
    """
    p, k = trusted.shape
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.tensor(side, device=latents.device) for side in zip(*combinations(range(k), 2)))
    head = list(model.head.parameters())
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=0.0)
    losses = []
    for parameter in head:
        parameter.requires_grad_(True)
    try:
        for _ in range(steps):
            some = torch.randperm(p, generator=rng)[:prompts_per_step]
            sigma = torch.rand(len(some), generator=rng).repeat_interleave(k).to(latents.device)
            noise = torch.randn((len(some), 1, *latents.shape[2:]), generator=rng).expand(-1, k, -1, -1, -1)
            some = some.to(latents.device)
            x = add_noise(latents[some].flatten(0, 1), noise.flatten(0, 1).to(latents.device), sigma)
            scores = model.score(x, sigma, cond[some.repeat_interleave(k)]).unflatten(0, (-1, k))
            gap = trusted[some][:, left] - trusted[some][:, right]
            label = 0.5 + 0.5 * gap.sign()
            loss = bradley_terry(scores[:, left].flatten(), scores[:, right].flatten(), label=label.flatten(), weight=(gap !=
            0).float().flatten() + 1e-12)  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    finally:
        for parameter in head:
            parameter.requires_grad_(False)
            parameter.grad = None
    tenth = max(1, steps // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
