"""Trajectories and their branches with what reinforcement learning needs of them.

- step-grpo   at every step k candidates of one state, scored where they are, noisy (DRM, arXiv 2605.25661, section 4)
- tempflow    the same candidates, each finished by the ODE and scored clean (TempFlow-GRPO)
- flow-grpo   G whole trajectories a prompt, scored clean, one advantage for all their steps (arXiv 2505.05470)

All candidates of a state share its velocity, so the update needs one forward and one backward pass a state, however many
candidates there are.

Dimension letters: P prompts, K candidates or group members, S states (P of step-grpo, P * K of flow-grpo), C, H, W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drmcli.errors import RunError
from drmcli.fitting import MAX_BATCH, SMALLER, Batch, batch_of
from drmcli.flow import STEP_RULES, Step, predict_x0, sample_step
from drmcli.generator import Generator, PromptEmbeds
from drmcli.losses import group_advantages


@dataclass
class Plan:
    """How trajectories are made."""

    algorithm: str = "step-grpo"
    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    step_rule: str = "cps"
    noise_level: float = 0.7
    group_size: int = 8
    """k of step-grpo and tempflow, G of flow-grpo."""
    window: tuple[float, float] = (0.0, 1.0)
    """Sigmas where steps are stochastic and trained; outside the ODE is used."""
    follow: str = "random"
    """Which candidate the trajectory goes on from: random, best or mean (the state without noise)."""
    min_std: float = 0.0
    """Reward spread below which a group teaches nothing."""
    global_std: bool = False
    """One spread for the whole batch."""
    diversity_bonus: float = 0.0
    """Reward for each unit of a candidate's mean distance to the rest of its group."""


@dataclass
class Visit:
    """One step of all trajectories. float32 throughout, so that the ratio before an update is exactly 1."""

    step: int
    sigma: float
    sigma_next: float
    states: Tensor
    """[S, C, H, W]."""
    owner: Tensor
    """[S] which prompt a state belongs to."""
    actions: Tensor
    """[S, K', C, H, W] the candidates drawn; K' = 1 for flow-grpo."""
    mean: Tensor
    """[S, C, H, W] of the policy that drew them."""
    std: float
    rewards: Tensor
    """[P, K] one a candidate or trajectory."""
    advantages: Tensor
    """[S, K']."""
    signal: Tensor
    """[P] did the group have any spread?"""
    kept: Tensor
    """[P, K] bool: the candidate that the trajectory went on from."""


@dataclass
class Rollouts:
    """What one update learns from."""

    visits: list[Visit]
    rewards: Tensor
    """[P, K] of the last scored step (step-grpo) or the final ones."""
    generator_calls: int
    reward_calls: int


Score = Callable[[Tensor, float, Tensor], Tensor]
"""Reward [B] of latents [B, C, H, W] at a sigma, for prompts by position [B]."""


@dataclass
class Share:
    """This process's part of an update's prompts. Every process has as many."""

    rank: int = 0
    gather: Callable[[Tensor], Tensor] = lambda mine: mine
    """[P, ...] of every process, one after the other, as one tensor."""

    def mine(self, everyone: Tensor, count: int) -> Tensor:
        """The rows of this process, which has `count` of them."""
        return everyone[self.rank * count : (self.rank + 1) * count]


@torch.no_grad()
def roll_out(
    generator: Generator,
    score: Score,
    cond: PromptEmbeds,
    plan: Plan,
    *,
    negative: PromptEmbeds | None,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    max_batch: int | Batch = 64,
    share: Share | None = None,
) -> Rollouts:
    """Trajectories for P prompts, one seed each. Raises RunError for latents or rewards that are not finite.

    share: where other processes draw for other prompts of the same update; advantages are then those of the whole update.
    """
    share = share or Share()
    device = cond.device
    sigmas = generator.sigmas(plan.num_inference_steps, (shape[1], shape[2]))
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    grouped = plan.algorithm == "flow-grpo"
    k = plan.group_size
    p = len(seeds)
    owner = torch.arange(p, device=device).repeat_interleave(k if grouped else 1)
    x = (
        torch.stack([torch.randn((k if grouped else 1, *shape), generator=rng) for rng in rngs])
        .flatten(0, 1)
        .to(device)
    )
    x = generator.first_state(x, float(sigmas[0]))
    count = Counter(
        generator,
        score,
        cond,
        negative,
        plan.guidance_scale,
        batch_of(max_batch, "latents", flag=MAX_BATCH, hint=SMALLER),
    )
    visits: list[Visit] = []
    for step in range(len(sigmas) - 1):
        sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
        velocity = count.velocity(x, sigma, owner)
        if not trained(plan, sigmas, step):
            x = x + (sigma_next - sigma) * velocity
            continue
        law = STEP_RULES[plan.step_rule](
            x, velocity, sigma, sigma_next, noise_level=plan.noise_level, sigma_max=float(sigmas[1])
        )
        each = 1 if grouped else k
        z = torch.stack([torch.randn((len(x) // p * each, *shape), generator=rng) for rng in rngs]).to(device)
        z = z.reshape(len(x), each, *shape)
        actions = sample_step(Step(law.mean[:, None], law.std[:, None]), z)
        if not bool(torch.isfinite(actions).all()):
            raise RunError(
                f"rollout step {step}: latents are not finite", hint="use --dtype fp32 or bf16, or a lower --lr"
            )
        empty = torch.zeros(0, device=device)
        std = float(law.std.flatten()[0])
        visit = Visit(step, sigma, sigma_next, x, owner, actions, law.mean, std, empty, empty, empty, empty)
        visits.append(visit)
        if grouped:
            x = actions[:, 0]
            continue
        rewards = _rewards_of_candidates(count, actions.flatten(0, 1), owner.repeat_interleave(k), sigmas, step, plan)
        _teach(visit, rewards, plan, share)
        choice = _choose(plan, rewards, rngs)
        visit.kept = torch.zeros_like(rewards, dtype=torch.bool).scatter_(1, choice[:, None], plan.follow != "mean")
        x = law.mean if plan.follow == "mean" else actions[torch.arange(p, device=device), choice]
    if grouped:
        rewards = count.score(x, 0.0, owner).reshape(p, k)
        if plan.diversity_bonus:
            rewards = rewards + plan.diversity_bonus * distance_to_others(x, k)
        for visit in visits:
            _teach(visit, rewards, plan, share)
            visit.advantages = visit.advantages.reshape(-1, 1)
            visit.kept = torch.ones_like(rewards, dtype=torch.bool)
    return Rollouts(
        visits, visits[-1].rewards if visits else torch.zeros(p, k), count.generator_calls, count.reward_calls
    )


def _rewards_of_candidates(count: Counter, flat: Tensor, who: Tensor, sigmas: Tensor, step: int, plan: Plan) -> Tensor:
    """Rewards [P, k] of candidates [P k, C, H, W] of the next state: where they are, or at their ends by the ODE (TempFlow)."""
    if plan.algorithm == "tempflow":
        ends, level = finish(count, flat, who, sigmas, step + 1), 0.0
    else:
        ends, level = flat, float(sigmas[step + 1])
    rewards = count.score(ends, level, who).reshape(-1, plan.group_size)
    if plan.diversity_bonus:
        clean = predict_x0(ends, count.velocity(ends, level, who), level) if level else ends
        rewards = rewards + plan.diversity_bonus * distance_to_others(clean, plan.group_size)
    return rewards


def trained(plan: Plan, sigmas: Tensor, step: int) -> bool:
    """Is this step stochastic? The last one never: its noise is nothing or only spoils the picture."""
    lo, hi = plan.window
    return lo <= float(sigmas[step]) <= hi + 1e-6 and float(sigmas[step + 1]) > 0


def _teach(visit: Visit, rewards: Tensor, plan: Plan, share: Share) -> None:
    """Advantages within each group; the spread of the whole batch is that of all processes."""
    try:
        found = group_advantages(share.gather(rewards), min_std=plan.min_std, global_std=plan.global_std)
    except ValueError:
        raise RunError(
            f"rollout step {visit.step}: a reward is not finite", hint="check the reward model; use --dtype fp32"
        ) from None
    visit.rewards = rewards
    visit.advantages = share.mine(found.values, len(rewards))
    visit.signal = share.mine(found.signal, len(rewards))


def distance_to_others(clean: Tensor, k: int) -> Tensor:
    """[P, K] mean distance of clean latents [P K, C, H, W] to the others of their group, root mean square over C, H, W."""
    groups = clean.float().unflatten(0, (-1, k)).flatten(2)
    return torch.cdist(groups, groups).sum(2) / max(1, k - 1) / groups.shape[2] ** 0.5


def _choose(plan: Plan, rewards: Tensor, rngs: list[torch.Generator]) -> Tensor:
    """Positions [P] of the candidates to go on from."""
    if plan.follow == "best":
        return rewards.argmax(1)
    drawn = torch.stack([torch.randint(rewards.shape[1], (1,), generator=rng)[0] for rng in rngs])
    return drawn.to(rewards.device)


def finish(count: Counter, x: Tensor, owner: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """The ODE from a step to the end."""
    for i in range(step, len(sigmas) - 1):
        x = x + float(sigmas[i + 1] - sigmas[i]) * count.velocity(x, float(sigmas[i]), owner)
    return x


@dataclass
class Counter:
    """Model calls in micro-batches, counted."""

    generator: Generator
    scorer: Score
    cond: PromptEmbeds
    negative: PromptEmbeds | None
    guidance_scale: float
    max_batch: Batch
    generator_calls: int = 0
    reward_calls: int = 0

    def velocity(self, x: Tensor, sigma: float, owner: Tensor) -> Tensor:
        self.generator_calls += len(x) * self.generator.passes(self.negative, self.guidance_scale)

        def some(i: slice) -> Tensor:
            return self.generator.velocity(x[i], sigma, self.cond[owner[i]], self.negative, self.guidance_scale)

        return torch.cat(self.max_batch.each(some, len(x)))

    def score(self, x: Tensor, sigma: float, owner: Tensor) -> Tensor:
        self.reward_calls += len(x)
        return torch.cat(self.max_batch.each(lambda i: self.scorer(x[i], sigma, owner[i]), len(x)))
