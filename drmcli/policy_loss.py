"""What a policy learns from a batch: tensors in; loss, ratio and KL out.

- `clipped`   candidates of a state with their advantages (Step-GRPO, TempFlow-GRPO, Flow-GRPO; PPO's clipped ratio)
- `nft`       clean latents with a normalised reward, in the forward process (DiffusionNFT, arXiv 2509.16117)
- `direct`    the reward itself, whose gradient went through the last steps (ReFL, arXiv 2304.05977; DRaFT, arXiv 2309.17400)

Each is a mean over states, so that states of several micro-batches and processes are weighed alike.

Dimension letters: S states, K candidates of a state, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drmcli.flow import Step, kl_divergence, log_ratio, predict_x0
from drmcli.losses import clipped_policy_loss


@dataclass
class Loss:
    """The loss to descend, and what to watch: all scalars, all but `loss` without gradient."""

    loss: Tensor
    ratio: Tensor
    """Mean ratio of new to old density; 1 where there is none."""
    clip_fraction: Tensor
    kl: Tensor
    """To the reference policy; 0 where no weight is on it."""

    @property
    def shown(self) -> Tensor:
        """[ratio, clip fraction, KL]."""
        return torch.stack([self.ratio, self.clip_fraction, self.kl.detach()])


def clipped(
    actions: Tensor,
    advantages: Tensor,
    new: Step,
    old_mean: Tensor,
    reference: Step | None,
    *,
    dt: float,
    clip_range: float,
    advantage_clip: float = 5.0,
    log_prob: str = "gaussian",
    noise_weight: bool = False,
    kl_beta: float = 0.0,
    kl_form: str = "exact",
) -> Loss:
    """PPO's clipped loss of candidates [S, K, C, H, W] with advantages [S, K], all drawn from one Gaussian a state.

    new: the policy's step now, mean [S, C, H, W]. old_mean: that of the policy that drew. reference: of the KL, with dt = sigma_next -
    sigma.
    noise_weight: weigh by the step's standard deviation, as TempFlow-GRPO does: late steps, whose ratios are steepest, count less.
    """
    count, k = actions.shape[:2]

    def each(mean: Tensor) -> Step:
        return Step(mean.repeat_interleave(k, 0), new.std.expand(count, 1, 1, 1).repeat_interleave(k, 0))

    ratio = log_ratio(actions.flatten(0, 1), each(new.mean), each(old_mean), form=log_prob)
    policy = clipped_policy_loss(
        ratio, advantages.flatten().clamp(-advantage_clip, advantage_clip), clip_range=clip_range
    )
    loss = policy.loss * (float(new.std.flatten()[0]) if noise_weight else 1.0)
    kl = torch.zeros((), device=loss.device)
    if reference is not None:
        kl = kl_divergence(new, reference, dt=dt, form=kl_form).mean()
        loss = loss + kl_beta * kl
    return Loss(loss, policy.ratio, policy.clip_fraction, kl.detach())


def optimality(advantages: Tensor, advantage_clip: float = 5.0) -> Tensor:
    """DiffusionNFT's probability that a sample is a good one: 1/2 + clip(advantage, -c, c) / 2c, in [0, 1]."""
    return 0.5 + advantages.clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip)


def nft(
    x0: Tensor,
    x: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    new: Tensor,
    old: Tensor,
    reference: Tensor | None,
    *,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    kl_beta: float = 0.0,
) -> Loss:
    """DiffusionNFT's loss of clean latents x0 [S, C, H, W], noised to x at levels sigma [S], with advantages [S].

    new, old, reference: velocities [S, C, H, W] at x of the policy, of the slowly moving one that draws, and of the
    reference. With r the optimality, v+ = (1 - beta) old + beta new is drawn to the data with weight r, v- = (1 + beta)
    old - beta new with 1 - r: the policy moves towards what good samples say and away from what bad ones say. Errors
    are those of the predicted x0, each divided by its own mean size (the published self-normalised weight). Scaled by
    advantage_clip / beta, as published, so that the gradient's size does not hang on them. The KL is the mean squared
    difference of the velocities.
    """
    r = optimality(advantages, advantage_clip)
    positive = _x0_error(x0, x, sigma, (1 - beta) * old + beta * new)
    negative = _x0_error(x0, x, sigma, (1 + beta) * old - beta * new)
    loss = (advantage_clip / beta) * (r * positive + (1 - r) * negative).mean()
    kl = _velocity_kl(new, reference)
    zero = torch.zeros((), device=loss.device)
    return Loss(loss + kl_beta * kl, zero + 1, zero, kl.detach())


def direct(rewards: Tensor, new: Tensor | None, reference: Tensor | None, *, kl_beta: float = 0.0) -> Loss:
    """Minus the mean reward [S] of what the policy made, with the KL of the velocities [S, C, H, W] that carry its gradient."""
    kl = torch.zeros((), device=rewards.device) if new is None else _velocity_kl(new, reference)
    zero = torch.zeros((), device=rewards.device)
    return Loss(kl_beta * kl - rewards.mean(), zero + 1, zero, kl.detach())


def _x0_error(x0: Tensor, x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """[S] mean squared error of the predicted x0 over its mean absolute error, the latter without gradient."""
    off = predict_x0(x, velocity, sigma) - x0
    size = off.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return off.square().flatten(1).mean(1) / size


def _velocity_kl(new: Tensor, reference: Tensor | None) -> Tensor:
    if reference is None:
        return torch.zeros((), device=new.device)
    return (new - reference).square().flatten(1).mean(1).mean()
