"""Step-GRPO, TempFlow-GRPO and Flow-GRPO: candidates of stochastic steps and PPO's clipped ratio. `drmcli.rollout` draws them.

All candidates of a state share its velocity, so a state costs one forward and one backward pass, however many candidates it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drmcli.algorithms.base import Drawn, Part, Prompts, Scored, StateReward
from drmcli.errors import InputError
from drmcli.fitting import Batch
from drmcli.flow import STEP_RULES, Step, log_prob, log_ratio
from drmcli.generator import PromptEmbeds
from drmcli.policy import Policy
from drmcli.policy_loss import Loss, clipped
from drmcli.rollout import Plan, Rollouts, Share, Visit, roll_out, trained


@dataclass
class DrawnGroups(Drawn):
    rollouts: Rollouts | None = None


class Groups:
    """See the module. `loss` holds the keywords of `policy_loss.clipped`; `autocast` makes the context of mixed precision."""

    def __init__(
        self,
        policy: Policy,
        reward: StateReward,
        plan: Plan,
        loss: dict[str, Any],
        *,
        shape: tuple[int, int, int],
        micro_batch_size: int,
        max_batch: Batch,
        share: Share,
        autocast: Any = nullcontext,
    ):
        self.policy, self.reward, self.plan, self.loss, self.share = policy, reward, plan, loss, share
        self.shape, self.micro_batch_size, self.max_batch, self.autocast = shape, micro_batch_size, max_batch, autocast
        self.sigmas = policy.generator.sigmas(plan.num_inference_steps, (shape[1], shape[2]))
        self.steps = sum(trained(plan, self.sigmas, i) for i in range(plan.num_inference_steps))
        if not self.steps:
            raise InputError(
                f"--set window: {list(plan.window)} holds none of the {plan.num_inference_steps} steps",
                hint="widen the window",
            )

    def states(self, prompts: int) -> int:
        return self.steps * prompts * (self.plan.group_size if self.plan.algorithm == "flow-grpo" else 1)

    def draw(self, prompts: Prompts, update: int) -> DrawnGroups:
        """Trajectories with candidates, rewards and advantages."""
        with self._autocast():
            rollouts = roll_out(
                self.policy.generator,
                lambda x, sigma, owner: self.reward(x, sigma, prompts, owner),
                prompts.cond,
                self.plan,
                negative=self.policy.negative,
                shape=self.shape,
                seeds=prompts.seeds,
                max_batch=self.max_batch,
                share=self.share,
            )
        return DrawnGroups(prompts, rollouts.generator_calls, [scored(v) for v in rollouts.visits], rollouts)

    def parts(self, drawn: DrawnGroups) -> Iterator[Part]:
        assert drawn.rollouts is not None
        for visit in drawn.rollouts.visits:
            for part in torch.arange(len(visit.states), device=visit.states.device).split(self.micro_batch_size):
                yield Part(self.part_loss(visit, part, drawn.prompts.cond), len(part))

    def part_loss(self, visit: Visit, part: Tensor, cond: PromptEmbeds) -> Loss:
        """Loss of some states of a visit, by their positions. One velocity serves all their candidates."""
        new, reference = self.law(visit, part, cond), None
        if self.loss.get("kl_beta"):
            with torch.no_grad(), self.policy.reference_policy():
                reference = self.law(visit, part, cond)
        dt = visit.sigma_next - visit.sigma
        actions, advantages = visit.actions[part], visit.advantages[part]
        return clipped(actions, advantages, new, visit.mean[part], reference, dt=dt, **self.loss)

    def law(self, visit: Visit, part: Tensor, cond: PromptEmbeds) -> Step:
        """The policy's Gaussian over the next states now. Only the velocity is in mixed precision."""
        x = visit.states[part]
        with self._autocast():
            velocity = self.policy.velocity(x, visit.sigma, cond[visit.owner[part]])
        rule, second = STEP_RULES[self.plan.step_rule], float(self.sigmas[1])
        return rule(x, velocity, visit.sigma, visit.sigma_next, noise_level=self.plan.noise_level, sigma_max=second)

    def check(self, drawn: DrawnGroups) -> tuple[float, float]:
        assert drawn.rollouts is not None
        visit = drawn.rollouts.visits[0]
        part = torch.arange(min(4, len(visit.states)), device=visit.states.device)
        new = self.law(visit, part, drawn.prompts.cond)
        old = Step(visit.mean[part], new.std)
        off = float(log_ratio(visit.actions[part][:, 0], new, old).abs().max().detach())
        pulled = (new.mean - old.mean.detach() + 1e-3).square().mean()
        gradient = torch.autograd.grad(pulled, self.policy.trained, allow_unused=True)
        return off, max((float(g.abs().max()) for g in gradient if g is not None), default=0.0)

    def _autocast(self) -> AbstractContextManager:
        return self.autocast()


def scored(visit: Visit) -> Scored:
    """What the tables show of a visit."""
    rewards = visit.rewards
    actions = visit.actions.flatten(0, 1)
    mean = visit.mean.repeat_interleave(visit.actions.shape[1], 0)
    std = torch.full((len(actions), 1, 1, 1), visit.std, device=mean.device)
    density = log_prob(actions, Step(mean, std)).reshape(rewards.shape)
    advantages = visit.advantages.reshape(rewards.shape)
    return Scored(
        visit.step, visit.sigma, visit.sigma_next, rewards, advantages, density, visit.kept, visit.signal
    )  # fmt: skip
