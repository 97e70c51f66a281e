"""Sampling with a scorer that judges noisy states: plain, best-of-N, step-wise search and its relatives.

All modes are one loop over sigmas. Each picture has some trajectories; a step gives each of them some children, the
children are scored where they are, and some of them live on:

- plain        one trajectory, one child a step, nothing is scored until the end
- best-of-n    N starts, one child a step, the best end is kept
- stepwise     one trajectory, k children a step, the best child is kept at every step (DRM, arXiv 2605.25661, section 5)
- beam         N starts, of which the best b live on after the first cut; then k children each, of which the best b are kept
- halving      N starts, one child a step, the worse half is dropped at chosen sigmas
- smc          N starts, resampled with weights exp(score / temperature) when their effective number is low

The best end may be refined: noised again part of the way, sampled anew from there, and replaced where the new end scores better.

Dimension letters: I pictures, N trajectories of a picture, K children of one, M = N * K, R scorers, C, H, W latent channels,
height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drmcli.calls import Calls, Models, States
from drmcli.errors import RunError
from drmcli.fitting import MAX_BATCH, SMALLER, Batch, batch_of
from drmcli.flow import STEP_RULES, corrected, predict_x0, renoise
from drmcli.generator import Generator, PromptEmbeds
from drmcli.scorers.combine import COMBINE

STOCHASTIC = ("stepwise", "beam", "smc")
"""Modes that need noise in their steps."""
REFINE_BRANCH = (0.5, 1.0)
"""Sigmas where a refinement with several children makes them: from 0.7 that is two steps of ten."""


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
    beams: int = 4
    """k: children of a trajectory at each step, of stepwise and beam."""
    starts: int | None = None
    """N: trajectories that a picture starts with; None is 4, and what is kept of beam. plain and stepwise have one."""
    keep: int = 2
    """b: trajectories that beam keeps."""
    first_cut: float | None = None
    """Of beam: the sigma at which the starts are cut to those kept, and before which there are no children; None is at once."""
    share_first: bool = False
    """All starts share the first forward pass and differ by the noise of the first step: nothing is lost with CPS and a = 1, which
    draws all noise anew."""
    branch_sigmas: tuple[float, float] = (0.0, 1.0)
    """Steps that start at a sigma within branch; the others make one child and score nothing."""
    branch_steps: tuple[int, int] | None = None
    """The same by number, first and last step counted from 0; None is by sigma alone."""
    score_at: str = "noisy"
    """noisy: candidates are scored at their own level. clean: their predicted clean latents are, for one velocity each."""
    correct_noise: bool = False
    """Score what an SDE step leaves at the sigma that it really has."""
    halving_sigmas: tuple[float, ...] = (0.9, 0.75, 0.5)
    """Where halving drops the worse half."""
    temperature: float = 1.0
    """Of smc, in units of the score."""
    ess_threshold: float = 0.5
    """smc resamples when the effective share of its trajectories falls below."""
    refine: int = 0
    """How often the best end is noised again and sampled anew; kept if better."""
    refine_sigma: float = 0.7
    """To which sigma, or the schedule's nearest."""
    refine_beams: int = 1
    """Children a step while refining, at the sigmas `REFINE_BRANCH`."""
    combine: str = "sum"
    """How several scorers' opinions become one score; see `scorers.combine.COMBINE`."""
    pictures: bool = False
    """The reward looks at pictures: a state is shown to it by the clean latents that it points to, for one velocity each."""
    max_batch: int | Batch = 64
    """Latents in one forward pass; halved when memory does not suffice."""
    share: bool = False
    """The reward model is a head on the generator's own first blocks: the kept candidate's velocity goes on from them."""

    def latents_at_once(self) -> Batch:
        """What memory has allowed serves the next pictures."""
        self.max_batch = batch_of(self.max_batch, "latents", flag=MAX_BATCH, hint=SMALLER)
        return self.max_batch

    def rule(self) -> str:
        return self.step_rule or ("cps" if self.mode in STOCHASTIC else "ode")

    def trajectories(self) -> int:
        """That a picture starts with."""
        if self.mode in ("plain", "stepwise"):
            return 1
        return self.starts or (self.keep if self.mode == "beam" else 4)

    def begun(self) -> int:
        """States of a picture before the first step."""
        return 1 if self.share_first else self.trajectories()

    def standing(self, step: int, states: int) -> int:
        """Trajectories that so many states of a picture are, at a step: the first state may be that of all of them."""
        return self.trajectories() if step == 0 and self.share_first else states

    def looks(self, trace: bool) -> bool:
        """Are noisy candidates, before some are kept, seen by the clean latents that they point to, for a velocity each?"""
        return self.score_at == "clean" or self.pictures or trace

    def children(self, step: int, sigma: float, sigma_next: float, trajectories: int) -> int:
        """Of each trajectory at a step."""
        if step == 0 and self.share_first and self.trajectories() > 1:
            return self.trajectories()
        low, high = self.branch_sigmas
        branching = self.mode in ("stepwise", "beam") and low <= sigma <= high + 1e-6
        if self.branch_steps is not None:
            branching = branching and self.branch_steps[0] <= step <= self.branch_steps[1]
        if self.mode == "beam" and self.first_cut is not None and trajectories > self.keep:
            branching = False
        # The last step of CPS takes no noise: all candidates would be one.
        return self.beams if branching and (sigma_next > 0 or self.rule() != "cps") else 1

    def survivors(self, sigma_next: float, trajectories: int, candidates: int) -> int | None:
        """How many of the candidates live on; None where there is nothing to choose."""
        if self.mode == "smc":
            return candidates if sigma_next > 0 else None
        count = candidates
        if self.mode == "stepwise":
            count = 1
        elif self.mode == "beam":
            waiting = self.first_cut is not None and trajectories > self.keep and sigma_next > self.first_cut + 1e-6
            branched = candidates > trajectories
            cut = self.first_cut is not None and trajectories > self.keep
            count = self.keep if not waiting and (branched or cut) else candidates
        elif self.mode == "halving":
            count = max(1, self.trajectories() >> sum(sigma_next <= level for level in self.halving_sigmas))
        return count if count < candidates else None


@dataclass
class Candidates:
    """What was scored at one step: every child of every picture."""

    step: int
    """Counted on over the refinements."""
    sigma: float
    sigma_next: float
    score: Tensor
    """[I, M]."""
    kept: Tensor
    """[I, M] bool."""
    preview: Tensor | None = None
    """[I, M, C, H, W] predicted clean latents, where a trace was asked for."""


@dataclass
class Samples:
    """Finished latents and how they came about."""

    latents: Tensor
    """[I, C, H, W] clean."""
    score: Tensor
    """[I] of the reward at sigma 0; NaN without one."""
    candidates: list[Candidates] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)


@torch.no_grad()
def sample(
    generator: Generator,
    reward: States | None,
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
    device = cond.device
    models = Models(
        generator, reward, cond, reward_cond, negative, search.guidance_scale, search.latents_at_once(), device, search.share,
        search.pictures,
    )  # fmt: skip
    sigmas = generator.sigmas(search.num_inference_steps, (shape[1], shape[2]))
    total = len(sigmas) - 1
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = torch.arange(len(seeds))
    start = nearest_step(sigmas, search.refine_sigma) if search.refine else total
    whole = total + search.refine * (total - start)

    def after(begun: int) -> Callable[[int], None]:
        return lambda done: on_step(begun + done, whole)

    # Down from pure noise; of several ends the best is kept.
    x = models.noise(rngs, search.begun(), shape)  # [I, N, C, H, W]
    x = generator.first_state(x, float(sigmas[0]))
    x, found, opinions = descend(models, search, x, sigmas, 0, rngs, trace, after(0))
    if reward is None:
        return Samples(x[rows, 0], torch.full((len(seeds),), math.nan), found, models.calls)
    if opinions is None:
        opinions = models.opinions(x, 0.0, x)[0]
    combine = COMBINE[search.combine]
    ends = combine(opinions).cpu()
    keep = ends.argmax(1, keepdim=True)
    score, x, opinions = ends.gather(1, keep), _rows(x, keep.to(device)), _rows(opinions, keep.to(device))

    # Noise the best end again, sample anew from there, and keep what is better.
    again = refining(search)
    for turn in range(search.refine):
        noise = models.noise(rngs, 1, shape)
        level = float(sigmas[start])
        noised = renoise(x.flatten(0, 1), 0.0, level, noise.flatten(0, 1)).unflatten(0, x.shape[:2])
        begun, offset = total + turn * (total - start), (turn + 1) * total
        new, more, _ = descend(models, again, noised, sigmas, start, rngs, trace, after(begun))
        found += [replace(c, step=offset + c.step) for c in more]
        both = torch.cat([opinions, models.opinions(new, 0.0, new)[0]], 1)  # [I, 2, R]
        ends = combine(both).cpu()
        keep = ends.argmax(1, keepdim=True)
        score = ends.gather(1, keep)
        x, opinions = _rows(torch.cat([x, new], 1), keep.to(device)), _rows(both, keep.to(device))
    return Samples(x[:, 0], score[:, 0], found, models.calls)


def nearest_step(sigmas: Tensor, level: float) -> int:
    """The step of a schedule that starts nearest to a sigma, neither at pure noise nor at the end."""
    return min(range(1, len(sigmas) - 1), key=lambda i: abs(float(sigmas[i]) - level))


def refining(search: Search) -> Search:
    """How one end is sampled anew."""
    return replace(
        search, mode="stepwise" if search.refine_beams > 1 else "plain", step_rule=search.rule(), beams=search.refine_beams,
        branch_sigmas=REFINE_BRANCH, branch_steps=None, share_first=False,
    )  # fmt: skip


def descend(
    models: Models,
    search: Search,
    x: Tensor,
    sigmas: Tensor,
    first: int,
    rngs: Sequence[torch.Generator],
    trace: bool,
    on_step: Callable[[int], None],
) -> tuple[Tensor, list[Candidates], Tensor | None]:
    """From states x [I, N, C, H, W] before step `first` down to clean ends.

    Returns the ends, what was scored on the way, and the opinions [I, 1, R] of the ends where the last step has judged them.
    """
    found: list[Candidates] = []
    velocity: Tensor | None = None
    opinions: Tensor | None = None
    for step in range(first, len(sigmas) - 1):
        if velocity is None:
            velocity = models.velocity(x, float(sigmas[step]))
        taken = take_step(models, search, x, velocity, step, sigmas, rngs, trace)
        x, velocity, opinions = taken.x, taken.velocity, taken.opinions
        if taken.candidates is not None:
            found.append(taken.candidates)
        on_step(step + 1 - first)
    judged = x.shape[1] == 1 and search.score_at == "noisy"
    return x, found, opinions if judged else None


@dataclass
class Taken:
    """One step of a search."""

    x: Tensor
    """[I, N', C, H, W] the candidates that live on."""
    velocity: Tensor | None = None
    """Theirs, where it is known already."""
    opinions: Tensor | None = None
    """[I, N', R] theirs, where they were scored."""
    candidates: Candidates | None = None


def take_step(
    models: Models,
    search: Search,
    x: Tensor,
    velocity: Tensor,
    step: int,
    sigmas: Tensor,
    rngs: Sequence[torch.Generator],
    trace: bool = False,
) -> Taken:
    """From states x [I, N, C, H, W] and their velocities to the children that live on.

    sigmas: the whole schedule [n + 1]. Raises RunError when latents are not finite.
    """
    sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
    # One velocity serves all children of a state.
    k = search.children(step, sigma, sigma_next, x.shape[1])
    children = draw_children(models, search, x, velocity, step, sigmas, k, rngs)  # [I, M, C, H, W]
    if not bool(torch.isfinite(children).all()):
        raise RunError(
            f"step {step} of {len(sigmas) - 1}: latents are not finite",
            hint="use --dtype fp32 or bf16, or a lower guidance scale",
        )
    count = search.survivors(sigma_next, search.standing(step, x.shape[1]), children.shape[1])
    if models.reward is None or count is None:
        return Taken(children)

    # Who lives on?
    following, preview = None, None
    if sigma_next == 0:
        preview = children
    elif search.looks(trace):
        following = models.velocity(children, sigma_next)
        flat = predict_x0(children.flatten(0, 1), following.flatten(0, 1), sigma_next)
        preview = flat.unflatten(0, children.shape[:2])
    if search.score_at == "clean" and preview is not None:
        opinions, states = models.opinions(preview, 0.0, preview)
    else:
        opinions, states = models.opinions(*_as_seen(search, children, step, sigmas, models.device), preview)
    scores = COMBINE[search.combine](opinions)
    keep = SELECT[search.mode](scores, count, search, rngs)  # [I, N']

    # What was computed for them serves the next step.
    kept = _rows(children, keep)
    known = None
    if following is not None:
        known = _rows(following, keep)
    elif states is not None and sigma_next > 0:
        where = keep + torch.arange(len(keep), device=keep.device)[:, None] * children.shape[1]
        known = models.velocity_from(states, kept, where, sigma_next)
    marked = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, keep, True)
    shown = preview.cpu() if trace and preview is not None else None
    candidates = Candidates(step, sigma, sigma_next, scores.cpu(), marked.cpu(), shown)
    return Taken(kept, known, _rows(opinions, keep), candidates)


def draw_children(
    models: Models,
    search: Search,
    x: Tensor,
    velocity: Tensor,
    step: int,
    sigmas: Tensor,
    k: int,
    rngs: Sequence[torch.Generator],
) -> Tensor:
    """k draws of the next state of each trajectory: [I, N, C, H, W] -> [I, N * k, C, H, W]."""
    law = STEP_RULES[search.rule()](
        x.flatten(0, 1),
        velocity.flatten(0, 1),
        float(sigmas[step]),
        float(sigmas[step + 1]),
        noise_level=search.noise_level,
        sigma_max=float(sigmas[1]),
    )
    mean = law.mean.unflatten(0, x.shape[:2])
    if search.rule() == "ode":
        return mean
    z = models.noise(rngs, x.shape[1] * k, x.shape[2:])  # [I, N * k, C, H, W]
    return mean.repeat_interleave(k, dim=1) + law.std.reshape(-1, 1, 1, 1, 1)[0] * z


def _as_seen(
    search: Search, children: Tensor, step: int, sigmas: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The children [I, M, C, H, W] as a reward model should see them, and their sigma [1]."""
    level = torch.tensor([float(sigmas[step + 1])], device=device)
    if not search.correct_noise or search.rule() == "ode":
        return children, level
    flat, level = corrected(
        children.flatten(0, 1), search.rule(), float(sigmas[step]), float(sigmas[step + 1]),
        noise_level=search.noise_level, sigma_max=float(sigmas[1]),
    )  # fmt: skip
    return flat.unflatten(0, children.shape[:2]), level


def best(scores: Tensor, count: int, search: Search, rngs: Sequence[torch.Generator]) -> Tensor:
    """Positions [I, count] of the highest of scores [I, M]."""
    return scores.argmax(1, keepdim=True) if count == 1 else scores.topk(count, dim=1).indices


def resample(scores: Tensor, count: int, search: Search, rngs: Sequence[torch.Generator]) -> Tensor:
    """Positions [I, M] by systematic resampling of each picture whose effective sample size is low.

    The weight of a trajectory is exp(score / temperature) of the state where it is now: the twisted target of Feynman-Kac
    steering, so that what was earned before is not counted again.
    """
    n = scores.shape[1]
    p = torch.softmax(scores.double() / search.temperature, dim=1).cpu()
    effective = 1 / p.square().sum(1) / n
    keep = torch.arange(n).expand(len(scores), n).clone()
    for i, rng in enumerate(rngs):
        if effective[i] < search.ess_threshold:
            points = (torch.rand(1, generator=rng, dtype=torch.float64) + torch.arange(n)) / n
            keep[i] = torch.searchsorted(p[i].cumsum(0), points).clamp(max=n - 1)
    return keep.to(scores.device)


Select = Callable[[Tensor, int, Search, Sequence[torch.Generator]], Tensor]
SELECT: dict[str, Select] = {"stepwise": best, "beam": best, "halving": best, "smc": resample}
"""Who lives on, by mode: rule(scores [I, M], how many, search, rngs) -> positions [I, N']."""


def _rows(x: Tensor, keep: Tensor) -> Tensor:
    """x [I, M, ...] at keep [I, N] -> [I, N, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], keep]
