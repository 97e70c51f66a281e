"""DiffusionNFT (arXiv 2509.16117): learning in the forward process, without likelihoods.

The old policy draws clean samples by the plain ODE. Each is noised to some of the schedule's levels, and there the policy's velocity is
drawn to
what good samples say and pushed from what bad ones say (`policy_loss.nft`). The old policy follows slowly, as published: after update i
it keeps
the share min(rate i, limit) of itself.

- terminal    a sample's reward is that of its clean latents, as published
- step-wise   a sample has a reward at each sigma where it is learned from: that of the noised state, all samples of a prompt under
the same
              noise, compared with each other at that level. This needs a reward model of noisy states and 1 reward call a state more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drmcli.algorithms.base import Drawn, Part, Prompts, Scored, StateReward
from drmcli.errors import InputError, RunError
from drmcli.fitting import Batch
from drmcli.flow import add_noise
from drmcli.losses import Advantages, group_advantages
from drmcli.policy import Policy
from drmcli.policy_loss import nft
from drmcli.rollout import Counter, Share, distance_to_others, finish
from drmcli.run import seed_of


@dataclass
class DrawnSamples(Drawn):
    x0: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[P, K, C, H, W] clean samples."""
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[P, K, C, H, W] that they are noised with."""
    levels: list[tuple[int, float]] = field(default_factory=list)
    """(step, sigma) of each training level."""
    advantages: list[Tensor] = field(default_factory=list)
    """[P, K] at each training level."""


def training_steps(sigmas: Tensor, window: tuple[float, float], *, stepwise: bool) -> list[int]:
    """Steps of a schedule whose sigmas nft may learn from: those within the window, but the clean one.

    Step-wise rewards leave out pure noise as well: there all samples of a prompt are one state. Raises InputError where none is left.
    """
    found = [
        i
        for i, s in enumerate(sigmas.tolist())
        if s > 0 and window[0] <= s <= window[1] + 1e-6 and (s < 1 or not stepwise)
    ]
    if not found:
        raise InputError(f"--set window: {list(window)} holds none of the sigmas", hint="widen the window")
    return found


class Nft:
    """See the module. levels: sigmas that each sample is learned from, drawn anew each update from the steps within `window`."""

    def __init__(
        self,
        policy: Policy,
        reward: StateReward,
        *,
        stepwise: bool,
        num_inference_steps: int,
        group_size: int,
        levels: int,
        window: tuple[float, float],
        beta: float,
        advantage_clip: float,
        kl_beta: float,
        min_std: float,
        global_std: bool,
        diversity_bonus: float = 0.0,
        shape: tuple[int, int, int],
        micro_batch_size: int,
        max_batch: Batch,
        share: Share,
        seed: int,
        autocast: Any = nullcontext,
    ):
        self.policy, self.reward, self.stepwise, self.group_size = policy, reward, stepwise, group_size
        self.loss = {"beta": beta, "advantage_clip": advantage_clip, "kl_beta": kl_beta}
        self.min_std, self.global_std, self.share, self.seed = min_std, global_std, share, seed
        self.diversity_bonus = diversity_bonus
        self.shape, self.micro_batch_size, self.max_batch, self.autocast = shape, micro_batch_size, max_batch, autocast
        self.sigmas = policy.generator.sigmas(num_inference_steps, (shape[1], shape[2]))
        self.steps = training_steps(self.sigmas, window, stepwise=stepwise)
        self.levels = min(levels, len(self.steps))

    def states(self, prompts: int) -> int:
        return prompts * self.group_size * self.levels

    @torch.no_grad()
    def draw(self, prompts: Prompts, update: int) -> DrawnSamples:
        """Clean samples of the old policy, noise for them, and advantages at each training level."""
        p, k, device = len(prompts), self.group_size, self.policy.generator.device
        drawn = prompts.noise(2 * k, self.shape).to(device)
        start, noise = drawn[:, :k], drawn[:, k:]
        if self.stepwise:
            noise = noise[:, :1].expand_as(noise)
        owner = torch.arange(p, device=device).repeat_interleave(k)
        count = Counter(
            self.policy.generator, lambda x, s, who: self.reward(x, s, prompts, who), prompts.cond, self.policy.negative,
            self.policy.guidance_scale, self.max_batch,
        )  # fmt: skip
        with self.autocast(), self.policy.drawing_policy():
            x0 = finish(count, start.flatten(0, 1).contiguous(), owner, self.sigmas, 0)
        if not bool(torch.isfinite(x0).all()):
            raise RunError("a sample's latents are not finite", hint="use --dtype fp32 or bf16, or a lower --lr")
        rng = torch.Generator().manual_seed(seed_of("levels", self.seed, update))
        chosen = sorted(self.steps[i] for i in torch.randperm(len(self.steps), generator=rng)[: self.levels].tolist())
        levels = [(i, float(self.sigmas[i])) for i in chosen]
        found = DrawnSamples(prompts, count.generator_calls, [], x0.unflatten(0, (p, k)), noise, levels)
        with self.autocast():
            if self.stepwise:
                for step, sigma in levels:
                    state = add_noise(x0, noise.flatten(0, 1), sigma)
                    self._compare(found, step, sigma, count.score(state, sigma, owner).reshape(p, k))
            else:
                advantages = self._compare(found, len(self.sigmas) - 1, 0.0, count.score(x0, 0.0, owner).reshape(p, k))
                found.advantages = [advantages] * len(levels)
        return found

    def _compare(self, drawn: DrawnSamples, step: int, sigma: float, rewards: Tensor) -> Tensor:
        """Advantages [P, K] of rewards within their groups, kept for this level and for the tables."""
        if self.diversity_bonus:
            rewards = rewards + self.diversity_bonus * distance_to_others(drawn.x0.flatten(0, 1), self.group_size)
        found = self._advantages(rewards)
        values, signal = (self.share.mine(t, len(rewards)) for t in (found.values, found.signal))
        nan, kept = torch.full_like(rewards, torch.nan), torch.ones_like(rewards, dtype=torch.bool)
        drawn.scored.append(Scored(step, sigma, sigma, rewards, values, nan, kept, signal))
        drawn.advantages.append(values)
        return values

    def _advantages(self, rewards: Tensor) -> Advantages:
        try:
            return group_advantages(self.share.gather(rewards), min_std=self.min_std, global_std=self.global_std)
        except ValueError:
            raise RunError("a reward is not finite", hint="check the reward model; use --dtype fp32") from None

    def parts(self, drawn: DrawnSamples) -> Iterator[Part]:
        k = self.group_size
        for (_, sigma), advantages in zip(drawn.levels, drawn.advantages):
            for part in torch.arange(len(drawn.prompts) * k, device=drawn.x0.device).split(self.micro_batch_size):
                x0, noise = drawn.x0.flatten(0, 1)[part], drawn.noise.flatten(0, 1)[part]
                x, cond = add_noise(x0, noise, sigma), drawn.prompts.cond[part // k]
                old, reference = self._others(x, sigma, cond)
                with self.autocast():
                    new = self.policy.velocity(x, sigma, cond)
                level = torch.full((len(part),), sigma, device=x.device)
                yield Part(nft(x0, x, level, advantages.flatten()[part], new, old, reference, **self.loss), len(part))

    @torch.no_grad()
    def _others(self, x: Tensor, sigma: float, cond: Any) -> tuple[Tensor, Tensor | None]:
        """Velocities of the old policy, and of the reference where the KL asks for it."""
        reference = None
        with self.autocast():
            with self.policy.drawing_policy():
                old = self.policy.velocity(x, sigma, cond)
            if self.loss["kl_beta"]:
                with self.policy.reference_policy():
                    reference = self.policy.velocity(x, sigma, cond)
        return old, reference

    def check(self, drawn: DrawnSamples) -> tuple[float, float]:
        """The old policy is the policy itself, and an error of its velocity has a gradient."""
        x, sigma = drawn.x0[:, 0][:4], drawn.levels[0][1]
        x = add_noise(x, drawn.noise[:, 0][:4], sigma)
        cond = drawn.prompts.cond[torch.arange(len(x), device=x.device)]
        old, _ = self._others(x, sigma, cond)
        with self.autocast():
            new = self.policy.velocity(x, sigma, cond)
        gradient = torch.autograd.grad((new - old + 1e-3).square().mean(), self.policy.trained, allow_unused=True)
        off = float((new.detach() - old).abs().max())
        return off, max((float(g.abs().max()) for g in gradient if g is not None), default=0.0)
