"""Sampling with a reward model that judges noisy states: plain, best-of-N, step-wise search and its relatives.

All modes are one loop over noise levels. Each picture has n particles; a step gives each of them m children, the reward model
scores the children where they are, and some are kept:

- plain        n = 1, m = 1, nothing is scored until the end
- best-of-n    n = N, m = 1, the best final score is kept
- stepwise     n = 1, m = k, the best child is kept at every step (DRM, arXiv 2605.25661, section 5)
- beam         n = b, m = k, the best b of all b k children are kept
- halving      n = N, m = 1, the worse half is dropped at chosen noise levels
- smc          n = N, m = 1, particles are resampled with weights exp(score / temperature) when their effective number is low

Dimension letters: I pictures, N particles of a picture, K children of a particle, C, H, W latent channels, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drmcli.errors import RunError
from drmcli.flow import STEP_RULES, corrected, predict_x0
from drmcli.generator import Generator, PromptEmbeds
from drmcli.reward import RewardModel

MODES = ("plain", "best-of-n", "stepwise", "beam", "halving", "smc")
STOCHASTIC = ("stepwise", "beam", "smc")
"""Modes that need noise in their steps."""


@dataclass
class Search:
    """How to sample."""

    mode: str = "plain"
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    """1 is without guidance: half the cost."""
    step_rule: str | None = None
    """ode, flow-sde, dance-sde or cps; None is cps where the mode needs noise, else ode."""
    noise_level: float = 0.9
    """a of Flow-SDE and CPS, eta of Dance-SDE."""
    num_candidates: int = 4
    """k of stepwise and beam, N of the others."""
    num_beams: int = 1
    """Particles that beam keeps."""
    branch_sigmas: tuple[float, float] = (0.0, 1.0)
    """Steps that start at a noise level within branch; the others make one child and score nothing."""
    branch_steps: tuple[int, int] | None = None
    """The same by number, first and last step counted from 0; None is by noise level alone."""
    score_at: str = "noisy"
    """noisy: candidates are scored at their own level. clean: their predicted clean latents are, for one velocity each."""
    correct_noise: bool = False
    """Score what an SDE step leaves at the noise level that it really has."""
    halving_sigmas: tuple[float, ...] = (0.9, 0.75, 0.5)
    """Where halving drops the worse half."""
    temperature: float = 1.0
    """Of smc, in units of the score."""
    ess_threshold: float = 0.5
    """smc resamples when the effective share of its particles falls below."""
    max_batch: int = 64
    """Latents in one forward pass; halved when memory does not suffice."""
    share: bool = False
    """The reward model is a head on the generator's own first blocks: the kept candidate's velocity goes on from them."""

    def rule(self) -> str:
        return self.step_rule or ("cps" if self.mode in STOCHASTIC else "ode")

    def particles(self) -> int:
        """Trajectories that a picture starts with."""
        return {"plain": 1, "stepwise": 1, "beam": self.num_beams}.get(self.mode, self.num_candidates)

    def branches(self, step: int, sigma: float) -> bool:
        """Does this step make several children and keep the best?"""
        lo, hi = self.branch_sigmas
        inside = lo <= sigma <= hi + 1e-6
        if self.branch_steps is not None:
            inside = inside and self.branch_steps[0] <= step <= self.branch_steps[1]
        return self.mode in ("stepwise", "beam") and inside


@dataclass
class Calls:
    """Latents that went through each model. Guidance counts twice."""

    generator: int = 0
    reward: int = 0
    shared: int = 0
    """Generator forwards that went on from the reward model's blocks."""

    def cost(self, ratio: float) -> float:
        """In forward passes of the generator, a reward call costing `ratio` of one."""
        return self.generator + ratio * self.reward + (1 - ratio) * self.shared


@dataclass
class Candidates:
    """What was scored at one step: every child of every picture."""

    step: int
    sigma: float
    sigma_next: float
    score: Tensor
    """[I, N * K]."""
    kept: Tensor
    """[I, N * K] bool."""
    preview: Tensor | None = None
    """[I, N * K, C, H, W] predicted clean latents, where a trace was asked for."""


@dataclass
class Samples:
    """Finished latents and how they came about."""

    latents: Tensor
    """[I, C, H, W] clean."""
    score: Tensor
    """[I] of the reward model at noise level 0; NaN without one."""
    candidates: list[Candidates] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)


@torch.no_grad()
def sample(
    generator: Generator,
    reward: RewardModel | None,
    cond: PromptEmbeds,
    reward_cond: PromptEmbeds | None,
    seeds: Sequence[int],
    search: Search,
    *,
    negative: PromptEmbeds | None = None,
    shape: tuple[int, int, int],
    trace: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Draw I pictures' latents, one a row of `cond` and a seed.

    shape: C, H, W of the latents. reward_cond: the same prompts through the reward model's own encoders. Everything random
    comes from a picture's own seed, so no picture depends on its batch; the first draw is the initial noise that diffusers'
    pipelines take from the same seed. Raises RunError naming the step when latents are not finite.
    """
    device = cond.prompt_embeds.device
    sigmas = generator.sigmas(search.num_inference_steps)
    total = len(sigmas) - 1
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    loop = _Loop(reward, reward_cond, search, Calls(), trace, device, generator, cond, negative)
    n = search.particles()
    x = loop.noise(rngs, n, shape)  # [I, N, C, H, W]
    out: list[Candidates] = []
    velocity: Tensor | None = None
    for step in range(total):
        if velocity is None:
            velocity = loop.velocity(x, float(sigmas[step]))
        x, scored = loop.advance(x, velocity, step, sigmas, rngs)
        velocity, loop.following = loop.following, None
        if scored is not None:
            out.append(scored)
        on_step(step + 1, total)
    final = torch.full(x.shape[:2], math.nan)
    if reward is not None:
        scored_last = bool(out) and out[-1].step == total - 1 and x.shape[1] == 1 and search.score_at == "noisy"
        final = out[-1].score[out[-1].kept].reshape(-1, 1) if scored_last else loop.rewards(x, 0.0).cpu()
    best = final.nan_to_num(0.0).argmax(1)
    rows = torch.arange(len(seeds))
    return Samples(x[rows, best.to(device)], final[rows, best], out, loop.calls)


def _rows(x: Tensor, keep: Tensor) -> Tensor:
    """x [I, M, ...] at keep [I, N] -> [I, N, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], keep]


@dataclass
class StepChoice:
    """One step of a search: candidates, scores, and who lives on."""

    reward: RewardModel | None
    reward_cond: PromptEmbeds | None
    search: Search
    calls: Calls
    trace: bool
    device: torch.device
    states: list[Tensor] | None = field(default=None, init=False)
    """Image tokens, context and time embedding [I * M, ...] behind the reward model's last block, where they are shared."""

    def advance(
        self, x: Tensor, velocity: Tensor, step: int, sigmas: Tensor, rngs: list[torch.Generator]
    ) -> tuple[Tensor, Candidates | None]:
        """The particles [I, N, C, H, W] of the next noise level, and what was scored if there was a choice.

        velocity: the model's at x. sigmas: the whole schedule [n + 1]. Raises RunError when latents are not finite.
        """
        search, sigma, sigma_next = self.search, float(sigmas[step]), float(sigmas[step + 1])
        # The last step of CPS takes no noise: all candidates would be one.
        branching = search.branches(step, sigma) and (sigma_next > 0 or search.rule() != "cps")
        k = search.num_candidates if branching else 1
        children = self.children(x, velocity, step, sigmas, k, rngs)  # [I, N * K, C, H, W]
        if not bool(torch.isfinite(children).all()):
            raise RunError(
                f"step {step} of {len(sigmas) - 1}: latents are not finite",
                hint="use --dtype fp32 or bf16, or a lower guidance scale",
            )
        if self.reward is None or not self.scores_here(sigma_next, branching, children.shape[1]):
            return children, None
        score, following, preview = self.score(children, step, sigmas)
        keep = self.select(score, sigma_next, rngs)
        self.keep_velocity(following, keep, children, sigma_next)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, keep, True)
        return _rows(children, keep), Candidates(step, sigma, sigma_next, score.cpu(), kept.cpu(), preview)

    def keep_velocity(self, following: Tensor | None, keep: Tensor, children: Tensor, sigma: float) -> None:
        """Velocities that had to be computed at the children: those of the kept ones serve the next step."""

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        raise RunError("scoring predicted clean latents needs the generator", hint="use score_at noisy, or drm sample")

    def noise(self, rngs: list[torch.Generator], count: int, shape: Sequence[int]) -> Tensor:
        """[I, count, C, H, W] from each picture's own source."""
        return torch.stack([torch.randn((count, *shape), generator=rng) for rng in rngs]).to(self.device)

    def rewards(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Scores [I, N] of latents [I, N, C, H, W] in micro-batches."""
        reward, conditions = self.reward, self.reward_cond
        assert reward is not None
        assert conditions is not None
        self.calls.reward += x.shape[0] * x.shape[1]
        owner = torch.arange(len(x), device=self.device).repeat_interleave(x.shape[1])

        parts: list[list[Tensor]] = []

        def some(index: Tensor) -> Tensor:
            flat, cond = x.flatten(0, 1)[index], conditions[owner[index]]
            if not self.search.share:
                return reward.score(flat, sigma, cond)
            if int(index[0]) == 0:  # the first part, perhaps once more after memory did not suffice
                parts.clear()
            parts.append([])
            return reward.score(flat, sigma, cond, states=parts[-1])

        scores = self._in_batches(some, len(owner)).unflatten(0, x.shape[:2])
        self.states = [torch.cat(each) for each in zip(*parts)] if self.search.share else None
        return scores

    def _in_batches(self, run: Callable[[Tensor], Tensor], count: int) -> Tensor:
        while True:
            try:
                parts = torch.arange(count, device=self.device).split(self.search.max_batch)
                return torch.cat([run(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.search.max_batch == 1:
                    raise
                self.search.max_batch //= 2
                torch.cuda.empty_cache()

    def children(
        self, x: Tensor, velocity: Tensor, step: int, sigmas: Tensor, k: int, rngs: list[torch.Generator]
    ) -> Tensor:
        """k draws of the next state of each particle: [I, N, C, H, W] -> [I, N * k, C, H, W]. They share one velocity."""
        law = STEP_RULES[self.search.rule()](
            x.flatten(0, 1),
            velocity.flatten(0, 1),
            float(sigmas[step]),
            float(sigmas[step + 1]),
            noise_level=self.search.noise_level,
            sigma_max=float(sigmas[1]),
        )
        if self.search.rule() == "ode":
            return law.mean.unflatten(0, x.shape[:2])
        z = self.noise(rngs, x.shape[1] * k, x.shape[2:])  # [I, N * k, C, H, W]
        mean = law.mean.unflatten(0, x.shape[:2]).repeat_interleave(k, dim=1)
        std = law.std.reshape(-1, 1, 1, 1, 1)[0]
        return mean + std * z

    def scores_here(self, sigma_next: float, branching: bool, children: int) -> bool:
        """Is there anything to choose among at this step?"""
        mode = self.search.mode
        if mode in ("stepwise", "beam"):
            return children > 1 and branching
        if mode == "halving":
            return children > 1 and self._halvings_passed(sigma_next) > math.log2(self.search.num_candidates / children)
        return mode == "smc" and sigma_next > 0

    def _halvings_passed(self, sigma: float) -> int:
        return sum(sigma <= level for level in self.search.halving_sigmas)

    def score(self, children: Tensor, step: int, sigmas: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores [I, M], the velocities at the children where they had to be computed, and previews for a trace."""
        search, sigma, sigma_next = self.search, float(sigmas[step]), float(sigmas[step + 1])
        following = preview = None
        if sigma_next > 0 and (search.score_at == "clean" or self.trace):
            following = self.velocity(children, sigma_next)
            preview = predict_x0(children.flatten(0, 1), following.flatten(0, 1), sigma_next).unflatten(
                0, children.shape[:2]
            )
        elif self.trace:
            preview = children
        if search.score_at == "clean" and preview is not None:
            return self.rewards(preview, 0.0), following, preview.cpu() if self.trace else None
        seen, level = children, torch.tensor([sigma_next], device=self.device)
        if search.correct_noise and search.rule() != "ode":
            flat, level = corrected(
                children.flatten(0, 1),
                search.rule(),
                sigma,
                sigma_next,
                noise_level=search.noise_level,
                sigma_max=float(sigmas[1]),
            )
            seen = flat.unflatten(0, children.shape[:2])
        kept_preview = preview.cpu() if self.trace and preview is not None else None
        return self.rewards(seen, level), following, kept_preview

    def select(self, score: Tensor, sigma_next: float, rngs: list[torch.Generator]) -> Tensor:
        """Positions [I, N] of the children that live on."""
        search = self.search
        if search.mode == "stepwise":
            return score.argmax(1, keepdim=True)
        if search.mode == "beam":
            return score.topk(search.num_beams, dim=1).indices
        if search.mode == "halving":
            left = max(1, search.num_candidates >> self._halvings_passed(sigma_next))
            return score.topk(min(left, score.shape[1]), dim=1).indices
        return self._resample(score, rngs)

    def _resample(self, score: Tensor, rngs: list[torch.Generator]) -> Tensor:
        """Systematic resampling of each picture whose effective sample size is low.

        The weight of a particle is exp(score / temperature) of the state where it is now: the twisted target of
        Feynman-Kac steering, so that what was earned before is not counted again.
        """
        n = score.shape[1]
        p = torch.softmax(score.double() / self.search.temperature, dim=1).cpu()
        effective = 1 / p.square().sum(1) / n
        keep = torch.arange(n).expand(len(score), n).clone()
        for i, rng in enumerate(rngs):
            if effective[i] < self.search.ess_threshold:
                points = (torch.rand(1, generator=rng, dtype=torch.float64) + torch.arange(n)) / n
                keep[i] = torch.searchsorted(p[i].cumsum(0), points).clamp(max=n - 1)
        return keep.to(score.device)


@dataclass
class _Loop(StepChoice):
    """Steps that compute their own velocities."""

    generator: Generator
    cond: PromptEmbeds
    negative: PromptEmbeds | None
    following: Tensor | None = None
    """Velocities of the particles that were kept, where they are known already."""

    def keep_velocity(self, following: Tensor | None, keep: Tensor, children: Tensor, sigma: float) -> None:
        if following is not None:
            self.following = _rows(following, keep)
        elif self.states is not None and sigma > 0:
            self.following = self._go_on(
                _rows(children, keep),
                keep + torch.arange(len(keep), device=keep.device)[:, None] * children.shape[1],
                sigma,
            )
        self.states = None

    def _go_on(self, x: Tensor, where: Tensor, sigma: float) -> Tensor:
        """Velocities of kept particles x [I, N, C, H, W] whose shared states are at `where` [I, N]."""
        assert self.states is not None
        assert self.reward is not None
        states, rows = self.states, where.flatten()
        first = len(self.reward.transformer.transformer_blocks)
        self.calls.shared += len(rows)
        size = x.shape[-2], x.shape[-1]
        v = self._in_batches(
            lambda i: self.generator.velocity_from([s[rows[i]] for s in states], first, *size), len(rows)
        )
        v = v.unflatten(0, x.shape[:2])
        if self.negative is None or self.search.guidance_scale == 1.0:
            return v
        self.calls.generator += len(rows)
        flat, negative = x.flatten(0, 1), self.negative

        def without(i: Tensor) -> Tensor:
            blank = PromptEmbeds(
                negative.prompt_embeds.expand(len(i), -1, -1), negative.pooled_prompt_embeds.expand(len(i), -1)
            )
            return self.generator.velocity(flat[i], sigma, blank)

        u = self._in_batches(without, len(rows)).unflatten(0, x.shape[:2])
        return u + self.search.guidance_scale * (v - u)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """[I, N, C, H, W] -> the same, in micro-batches."""
        guided = self.negative is not None and self.search.guidance_scale != 1.0
        self.calls.generator += x.shape[0] * x.shape[1] * (2 if guided else 1)
        owner = torch.arange(len(x), device=self.device).repeat_interleave(x.shape[1])

        def some(index: Tensor) -> Tensor:
            return self.generator.velocity(
                x.flatten(0, 1)[index], sigma, self.cond[owner[index]], self.negative, self.search.guidance_scale
            )

        return self._in_batches(some, len(owner)).unflatten(0, x.shape[:2])
