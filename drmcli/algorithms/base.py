"""What the algorithms share: prompts with their conditioning, the reward of a state, and what an update leaves for the tables.

Dimension letters: P prompts of this process, K candidates or samples of a prompt, B states, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from drmcli.flow import predict_x0
from drmcli.generator import PromptEmbeds
from drmcli.policy import Policy
from drmcli.policy_loss import Loss
from drmcli.scorers.combine import Rewards


@dataclass
class Prompts:
    """Prompts of an update with a seed each, and what the models are told of them."""

    texts: list[str]
    seeds: list[int]
    cond: PromptEmbeds
    reward_conds: list[PromptEmbeds]
    """One a reward model."""

    def __len__(self) -> int:
        return len(self.texts)

    def noise(self, count: int, shape: Sequence[int]) -> Tensor:
        """[P, count, *shape] standard normal, on the CPU, drawn from each prompt's own seed whatever the others are."""
        rngs = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return torch.stack([torch.randn((count, *shape), generator=rng) for rng in rngs])


class StateReward:
    """Rewards of states where they are, or of the clean latents that the policy predicts from them. Counts its calls."""

    def __init__(self, policy: Policy, rewards: Rewards, *, predicted: bool = False):
        self.policy, self.rewards, self.predicted = policy, rewards, predicted
        self.generator_calls = 0
        self.reward_calls = 0

    def __call__(self, x: Tensor, sigma: float, prompts: Prompts, owner: Tensor) -> Tensor:
        """Rewards [B] of states [B, C, H, W] at a sigma; `owner` [B] says whose."""
        cond, policy, clean = prompts.cond[owner], self.policy, x
        self.reward_calls += len(x)
        if sigma > 0 and (self.rewards.needs_pictures or self.predicted):
            self.generator_calls += len(x) * policy.passes
            clean = predict_x0(x, policy.velocity(x, sigma, cond), sigma)
        if self.predicted:
            x, sigma = clean, 0.0
        texts = [prompts.texts[i] for i in owner.tolist()]
        conds = [c[owner] for c in prompts.reward_conds]
        return self.rewards(x, sigma, conds, texts, lambda: policy.generator.decode(clean))


@dataclass
class Part:
    """The loss of one micro-batch, a mean over `states` states."""

    loss: Loss
    states: int


@dataclass
class Scored:
    """Rewards of one step or sigma for the tables, each [P, K]."""

    step: int
    sigma: float
    sigma_next: float
    rewards: Tensor
    advantages: Tensor
    log_probs: Tensor
    """NaN where there is no density."""
    kept: Tensor
    """Did the trajectory go on from here? bool."""
    signal: Tensor
    """[P] Had the group any spread?"""

    def columns(self) -> Tensor:
        """[P, K, 5] reward, advantage, log-probability, kept, signal."""
        signal = self.signal[:, None].expand_as(self.rewards)
        return torch.stack([self.rewards, self.advantages, self.log_probs, self.kept.float(), signal.float()], -1)


@dataclass
class Drawn:
    """What an update learns from; algorithms add their own."""

    prompts: Prompts
    generator_calls: int = 0
    scored: list[Scored] = field(default_factory=list)
    """Complete when the losses were computed."""


class Algorithm(Protocol):
    """What the loop asks of an algorithm."""

    def states(self, prompts: int) -> int:
        """States with a loss in one pass over an update of so many prompts: what each loss is divided by."""

    def draw(self, prompts: Prompts, update: int) -> Any:
        """Samples of the policy with their rewards, for this process's prompts."""

    def parts(self, drawn: Any) -> Iterator[Part]:
        """Losses with gradient, one micro-batch after the other."""

    def check(self, drawn: Any) -> tuple[float, float]:
        """Before the first update: how far the policy is from the one that drew (to be 0), and its largest gradient (to be above 0)."""
