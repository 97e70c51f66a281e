"""Losses and advantages: pure functions of tensors.

Dimension letters: N preference pairs, G candidates or samples of a group, any leading dimensions `...`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    score_chosen: Tensor,
    score_rejected: Tensor,
    *,
    label: Tensor | None = None,
    weight: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """-[l log sigmoid(d - m) + (1 - l) log sigmoid(-d - m)] with d = chosen - rejected; weighted mean over the N pairs.

    label: probability that chosen is better, 1 where not given; 0.5 is a tie, others are soft labels. DRM (arXiv
    2605.25661) is the case of label 1 and no margin.
    """
    d = score_chosen.float() - score_rejected.float()
    l = torch.ones_like(d) if label is None else label.float()  # noqa: E741
    return _mean(-(l * F.logsigmoid(d - margin) + (1 - l) * F.logsigmoid(-d - margin)), weight)


def thurstone(
    score_chosen: Tensor,
    score_rejected: Tensor,
    sigma: Tensor,
    *,
    label: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Noise-calibrated Thurstone loss of DiNa-LRM (arXiv 2602.11146): P(chosen) = Phi(d / sqrt(var + var)).

    Each score has the variance 2 sigma^2 + 0.05: a comparison of very noisy latents says less. sigma: [N].
    """
    spread = torch.sqrt(2 * (2 * sigma.float().square() + 0.05))
    z = (score_chosen.float() - score_rejected.float()) / spread
    l = torch.ones_like(z) if label is None else label.float()  # noqa: E741
    return _mean(-(l * torch.special.log_ndtr(z) + (1 - l) * torch.special.log_ndtr(-z)), weight)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).sum() / weight.sum()


@dataclass
class Advantages:
    """`values` [..., G], and which groups [...] had signal."""

    values: Tensor
    signal: Tensor


def group_advantages(
    rewards: Tensor, *, eps: float = 1e-4, unbiased: bool = False, min_std: float = 0.0, global_std: bool = False
) -> Advantages:
    """(r - mean of the group) / (std + eps) over the last dimension. rewards [..., G].

    Groups whose spread is below `min_std` get 0 and no signal: dividing by almost nothing would blow up noise.
    global_std: one standard deviation for all rewards, as Flow-GRPO offers. Raises ValueError for a reward that is not finite.
    """
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("group_advantages: a reward is not finite")
    r = rewards.float()
    std = r.std(-1, unbiased=unbiased, keepdim=True)
    signal = (std > 0) & (std >= min_std)
    scale = r.std(unbiased=unbiased) if global_std else std
    values = torch.where(signal, (r - r.mean(-1, keepdim=True)) / (scale + eps), torch.zeros_like(r))
    return Advantages(values, signal.squeeze(-1))


@dataclass
class PolicyLoss:
    """The clipped loss and what to watch."""

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, *, clip_range: float, weight: Tensor | None = None
) -> PolicyLoss:
    """mean(max(-A r, -A clip(r, 1 - c, 1 + c))) with r = exp(log_ratio) (PPO, arXiv 1707.06347). Same shapes."""
    ratio = log_ratio.exp()
    worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip_range).float().mean()
        approx = 0.5 * log_ratio.square().mean()
    return PolicyLoss(_mean(worst, weight), ratio.detach().mean(), clipped, approx)
