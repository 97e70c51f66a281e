"""The reward's own gradient, through the last steps of sampling: what a reward model of latents invites, since nothing need be decoded.

- draft    the last `steps` steps carry a gradient, the ones before are drawn without (DRaFT-K, arXiv 2309.17400; 1 is DRaFT-1)
- refl     sampling ends at a step drawn at random within `window`; the clean latents that the policy predicts there are
           rewarded, and this one prediction carries the gradient (ReFL, arXiv 2304.05977)

It is the method that exploits a reward model first: keep a judge, and a KL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drmcli.algorithms.base import Drawn, Part, Prompts, Scored, StateReward
from drmcli.errors import InputError
from drmcli.flow import predict_x0
from drmcli.generator import PromptEmbeds
from drmcli.policy import Policy
from drmcli.policy_loss import direct
from drmcli.run import seed_of


@dataclass
class DrawnStarts(Drawn):
    noise: Tensor | None = None
    """[P, K, C, H, W] the samples' first states."""
    stop: int = 0
    """The first step that carries a gradient."""


class Direct:
    """See the module. Raises InputError where a reward needs pictures: the gradient goes through latents."""

    def __init__(
        self,
        policy: Policy,
        reward: StateReward,
        *,
        form: str,
        steps: int,
        num_inference_steps: int,
        group_size: int,
        window: tuple[float, float],
        kl_beta: float,
        shape: tuple[int, int, int],
        micro_batch_size: int,
        seed: int,
        autocast: Any = nullcontext,
    ):
        if reward.rewards.needs_pictures:
            raise InputError(
                "--algorithm direct: a reward that needs pictures has no gradient here",
                hint="use reward models alone, or another --algorithm",
            )
        for model in reward.rewards.models:
            model.requires_grad_(False)
        self.policy, self.reward, self.form, self.group_size, self.kl_beta = policy, reward, form, group_size, kl_beta
        self.shape, self.micro_batch_size, self.seed, self.autocast = shape, micro_batch_size, seed, autocast
        self.sigmas = policy.generator.sigmas(num_inference_steps, (shape[1], shape[2]))
        self.steps = min(steps, num_inference_steps)
        levels = self.sigmas.tolist()[:-1]
        self.stops = [i for i, s in enumerate(levels) if window[0] <= s <= window[1] + 1e-6]
        if form == "refl" and not self.stops:
            raise InputError(f"--set window: {list(window)} holds none of the steps", hint="widen the window")

    def states(self, prompts: int) -> int:
        return prompts * self.group_size

    def draw(self, prompts: Prompts, update: int) -> DrawnStarts:
        """First states and where the gradient begins. Samples are drawn with the losses: they are one graph."""
        stop = len(self.sigmas) - 1 - self.steps
        if self.form == "refl":
            rng = torch.Generator().manual_seed(seed_of("refl", self.seed, update))
            stop = self.stops[int(torch.randint(len(self.stops), (1,), generator=rng))]
        noise = prompts.noise(self.group_size, self.shape).to(self.policy.generator.device)
        return DrawnStarts(prompts, noise=noise, stop=stop)

    def parts(self, drawn: DrawnStarts) -> Iterator[Part]:
        assert drawn.noise is not None
        k, rewards = self.group_size, []
        for part in torch.arange(len(drawn.prompts) * k, device=drawn.noise.device).split(self.micro_batch_size):
            owner = part // k
            x, states = self._sample(drawn, drawn.noise.flatten(0, 1)[part], drawn.prompts.cond[owner])
            with self.autocast():
                found = self.reward(x, 0.0, drawn.prompts, owner)
            rewards.append(found.detach())
            new, reference = self._velocities(states, drawn.prompts.cond[owner])
            yield Part(direct(found, new, reference, kl_beta=self.kl_beta), len(part))
        values = torch.cat(rewards).reshape(-1, k)
        nan, kept = torch.full_like(values, torch.nan), torch.ones_like(values, dtype=torch.bool)
        signal = torch.ones(len(values), device=values.device, dtype=torch.bool)
        last = len(self.sigmas) - 1
        drawn.scored = [Scored(last, 0.0, 0.0, values, nan, nan, kept, signal)]

    def _sample(
        self, drawn: DrawnStarts, x: Tensor, cond: PromptEmbeds
    ) -> tuple[Tensor, list[tuple[Tensor, float, Tensor]]]:
        """Clean latents [B, C, H, W], and (state, sigma, velocity) of the steps that carry a gradient."""
        sigmas, states = self.sigmas.tolist(), []
        for i in range(len(sigmas) - 1):
            with torch.set_grad_enabled(i >= drawn.stop), self.autocast():
                velocity = self.policy.velocity(x, sigmas[i], cond)
            drawn.generator_calls += len(x) * self.policy.passes
            if i >= drawn.stop:
                states.append((x, sigmas[i], velocity))
            if self.form == "refl" and i == drawn.stop:
                return predict_x0(x, velocity, sigmas[i]), states
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        return x, states

    def _velocities(
        self, states: list[tuple[Tensor, float, Tensor]], cond: PromptEmbeds
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities of the policy and of the reference at the same states, one after the other: [steps B, C, H, W]."""
        if not self.kl_beta:
            return None, None
        with torch.no_grad(), self.policy.reference_policy(), self.autocast():
            reference = [self.policy.velocity(x, sigma, cond) for x, sigma, _ in states]
        return torch.cat([v for _, _, v in states]), torch.cat(reference)

    def check(self, drawn: DrawnStarts) -> tuple[float, float]:
        """The policy draws for itself; the reward of one sample has a gradient in it."""
        assert drawn.noise is not None
        first = torch.zeros(1, dtype=torch.long, device=drawn.noise.device)
        calls = drawn.generator_calls, self.reward.reward_calls
        x, _ = self._sample(drawn, drawn.noise[:1, 0], drawn.prompts.cond[first])
        with self.autocast():
            reward = self.reward(x, 0.0, drawn.prompts, first)
        drawn.generator_calls, self.reward.reward_calls = calls
        gradient = torch.autograd.grad(reward.sum(), self.policy.trained, allow_unused=True)
        return 0.0, max((float(g.abs().max()) for g in gradient if g is not None), default=0.0)
