"""A reward model that learns on: its head is trained further on fresh samples of the policy, labelled by a scorer that is trusted.

A reward model is fooled by what it never saw. The samples of a policy that has begun to fool it are what it must see, beside those of
the policy that it was before: within one policy's samples nothing says that they all became worse.

Dimension letters: P prompts, K samples of a prompt, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from drmcli.flow import add_noise
from drmcli.generator import PromptEmbeds
from drmcli.losses import bradley_terry
from drmcli.reward import RewardModel


@dataclass
class Memory:
    """Samples of the policies that a run has had, on the CPU: those of the start, and of the last few refreshes.

    latents: [P, K, C, H, W] each; trusted: [P, K] each. `size`: how many older refreshes are kept beside the newest; the start is the last
    to go.
    """

    size: int
    latents: list[Tensor] = field(default_factory=list)
    trusted: list[Tensor] = field(default_factory=list)

    def add(self, latents: Tensor, trusted: Tensor) -> None:
        """The newest samples; the oldest but those of the start leave."""
        for kept, new in ((self.latents, latents), (self.trusted, trusted)):
            kept.append(new)
            if len(kept) > self.size + 1:
                del kept[min(1, self.size)]

    def joined(self) -> tuple[Tensor, Tensor]:
        """All samples of a prompt beside each other, the newest last: [P, K of all, C, H, W] and [P, K of all]."""
        return torch.cat(self.latents, 1), torch.cat(self.trusted, 1)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        named = {"latents": self.latents, "trusted": self.trusted}
        return {f"memory.{name}.{i}": t for name, kept in named.items() for i, t in enumerate(kept)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave."""
        for name, kept in (("latents", self.latents), ("trusted", self.trusted)):
            while (key := f"memory.{name}.{len(kept)}") in tensors:
                kept.append(tensors[key])


def continue_head(
    model: RewardModel,
    latents: Tensor,
    cond: PromptEmbeds,
    trusted: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    fresh: int | None = None,
    prompts_per_step: int = 8,
) -> tuple[float, float]:
    """Train the head on all pairs of a prompt's samples by the Bradley-Terry loss. Returns the mean loss of the first and of the last
    tenth.

    latents [P, K, C, H, W] are clean; cond has P rows; trusted [P, K] are the scores that say which of two is better (equal ones say
    nothing). The last `fresh` samples of a prompt (all by default) are those of the policy as it is, the others older ones.
    Every step takes some prompts, of each the fresh samples and as many older ones, a sigma in [0, 1] a prompt, and one noise for all its
    samples. The backbone stays as it is.
    """
    p, total = trusted.shape
    fresh = total if fresh is None else fresh
    old = total - fresh
    k = fresh + min(old, fresh)
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
            taken = torch.cat([torch.randperm(old, generator=rng)[: k - fresh], torch.arange(old, total)]).to(
                latents.device
            )
            sigma = torch.rand(len(some), generator=rng).repeat_interleave(k).to(latents.device)
            noise = torch.randn((len(some), 1, *latents.shape[2:]), generator=rng).expand(-1, k, -1, -1, -1)
            some = some.to(latents.device)
            x = add_noise(latents[some][:, taken].flatten(0, 1), noise.flatten(0, 1).to(latents.device), sigma)
            scores = model.score(x, sigma, cond[some.repeat_interleave(k)]).unflatten(0, (-1, k))
            better = trusted[some][:, taken]
            gap = better[:, left] - better[:, right]
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
