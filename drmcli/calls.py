"""The models of a search, called in micro-batches and counted.

Dimension letters: I pictures, N states of a picture, R scorers, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from drmcli.errors import RunError
from drmcli.families.base import joined, rows_of
from drmcli.fitting import Batch
from drmcli.generator import Generator

T = TypeVar("T")


class States(Protocol):
    """A reward of noisy states: a `RewardModel`, a `StateScorer`, or several as one (`scorers.combine.Combined`)."""

    @property
    def score(self) -> Callable[..., Tensor]:
        """score(latents [B, C, H, W], sigma, cond) -> [B] or, of several scorers, [B, R]."""


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
class Models:
    """Generator and reward with what they are told of I pictures."""

    generator: Generator | None
    """None where somebody else computes the velocities."""
    reward: States | None
    cond: Any
    """The prompts for the generator; rows are picked by indexing."""
    reward_cond: Any
    """The prompts for the reward."""
    negative: Any
    """What guidance leads away from, one row; None is no guidance."""
    guidance_scale: float
    max_batch: Batch
    """Latents in one forward pass."""
    device: torch.device
    share: bool = False
    """The reward is a head on the generator's own first blocks."""
    pictures: bool = False
    """The reward looks at pictures: it is given the clean latents that each state points to."""
    calls: Calls = field(default_factory=Calls)

    def noise(self, rngs: Sequence[torch.Generator], count: int, shape: Sequence[int]) -> Tensor:
        """[I, count, C, H, W] from each picture's own source, so that no picture depends on its batch."""
        return torch.stack([torch.randn((count, *shape), generator=rng) for rng in rngs]).to(self.device)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """[I, N, C, H, W] -> the same. Raises RunError where the search has no generator of its own."""
        generator = self.generator
        if generator is None:
            raise RunError(
                "scoring predicted clean latents needs the generator", hint="use score_at noisy, or drm sample"
            )
        self.calls.generator += x.shape[0] * x.shape[1] * generator.passes(self.negative, self.guidance_scale)
        flat, owner = x.flatten(0, 1), self._owner(x)

        def some(i: Tensor) -> Tensor:
            return generator.velocity(flat[i], sigma, self.cond[owner[i]], self.negative, self.guidance_scale)

        return torch.cat(self.in_batches(some, len(owner))).unflatten(0, x.shape[:2])

    def opinions(self, x: Tensor, sigma: float | Tensor, clean: Tensor | None = None) -> tuple[Tensor, Any]:
        """Scores [I, N, R] of latents [I, N, C, H, W]; and, with `share`, what the last shared block returned for all I * N, else None.

        clean: the clean latents that the states point to, for rewards of pictures.
        """
        reward = self.reward
        assert reward is not None
        self.calls.reward += x.shape[0] * x.shape[1]
        flat, owner = x.flatten(0, 1), self._owner(x)
        seen = None if clean is None else clean.flatten(0, 1)

        def some(i: Tensor) -> tuple[Tensor, list[Any]]:
            cond = self.reward_cond[owner[i]]
            if self.pictures:
                assert seen is not None
                return reward.score(flat[i], sigma, cond, clean=seen[i]), []
            if not self.share:
                return reward.score(flat[i], sigma, cond), []
            heard: list[Any] = []
            return reward.score(flat[i], sigma, cond, states=heard), heard

        parts = self.in_batches(some, len(owner))
        scores = torch.cat([found for found, _ in parts]).unflatten(0, x.shape[:2])
        states = joined([state for _, heard in parts for state in heard]) if self.share else None
        return (scores if scores.ndim == 3 else scores[..., None]), states

    def velocity_from(self, states: Any, x: Tensor, where: Tensor, sigma: float) -> Tensor:
        """Velocities of kept states x [I, N, C, H, W], whose shared states are at `where` [I, N] of all that were scored."""
        generator, reward = self.generator, self.reward
        assert generator is not None
        assert reward is not None
        rows = where.flatten()
        first, scale = len(reward.blocks), self.guidance_scale  # type: ignore[attr-defined]
        self.calls.shared += len(rows)
        flat, owner = x.flatten(0, 1), self._owner(x)

        def rest(i: Tensor) -> Tensor:
            picked = rows_of(states, rows[i])
            return generator.velocity_from(picked, first, flat[i], sigma, self.cond[owner[i]], scale)

        v = torch.cat(self.in_batches(rest, len(rows)))
        if generator.passes(self.negative, scale) == 1:
            return v.unflatten(0, x.shape[:2])
        self.calls.generator += len(rows)

        def opposed(i: Tensor) -> Tensor:
            return generator.velocity(flat[i], sigma, self.negative[torch.zeros_like(i)], None, scale)

        u = torch.cat(self.in_batches(opposed, len(rows)))
        return generator.family.guide(v, u, scale).unflatten(0, x.shape[:2])

    def in_batches(self, run: Callable[[Tensor], T], count: int) -> list[T]:
        """`run` of all positions, so many at once as memory allows."""
        every = torch.arange(count, device=self.device)
        return self.max_batch.each(lambda part: run(every[part]), count)

    def _owner(self, x: Tensor) -> Tensor:
        """[I * N] which picture a state belongs to."""
        return torch.arange(len(x), device=self.device).repeat_interleave(x.shape[1])
