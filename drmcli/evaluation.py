"""Is the gain real? Plain samples of held-out prompts, an independent judge, and the alarm: functions of numbers.

Dimension letters: P prompts, n pictures (seeds) of a prompt, B = P n pictures in order of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.fitting import Batch
from drmcli.kernels import PLAIN, Kernels
from drmcli.measure.intervals import paired_ci
from drmcli.scorers import load_scorer

ALARM_SHARE = 0.25
"""Share of its gain that the judge must have lost, beyond noise, before the alarm sounds: the best of many noisy points is a lucky one."""


class Judge:
    """The independent yardstick, any scorer; none where the name is `none`."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, flag: str = "--judge", kernels: Kernels = PLAIN
    ):
        self.name = name
        self.batch = Batch(64, hint="another scorer")
        self.scorer = (
            None if name == "none" else load_scorer(name, device=device, dtype=dtype, flag=flag, kernels=kernels)
        )

    def __bool__(self) -> bool:
        return self.scorer is not None

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """A score a picture, higher is better; NaN where there is no judge."""
        if self.scorer is None:
            return np.full(len(images), np.nan)
        scorer = self.scorer
        parts = self.batch.each(lambda at: scorer.score_images(images[at], prompts[at]), len(images))
        return torch.cat(parts).cpu().numpy().astype(float)


@dataclass
class Evaluation:
    """Plain samples of held-out prompts with fixed seeds."""

    prompt: np.ndarray
    """[B] number of the prompt."""
    reward: np.ndarray
    """[B]."""
    judge: np.ndarray
    """[B]; NaN without a judge."""
    apart: np.ndarray
    """[B, n] distance to each picture of the same prompt in latent space, root mean square."""
    images: list[Image.Image]

    @property
    def diversity(self) -> float | None:
        """Mean distance of two pictures of a prompt; None where a prompt has one picture."""
        return mean_distance(self.apart, np.ones(len(self.apart), dtype=bool))

    def flawless(self, level: float) -> tuple[float | None, float | None]:
        """Share of pictures that the judge puts at `level` or above, and the mean distance of two of them of one prompt.

        None where there is no judge, or no two such pictures. Diversity that consists of flaws is not in this figure.
        """
        if np.isnan(self.judge).any():
            return None, None
        good = self.judge >= level
        return float(good.mean()), mean_distance(self.apart, good)


def mean_distance(apart: np.ndarray, counted: np.ndarray) -> float | None:
    """Mean over prompts of the mean distance of two counted pictures; apart [B, n], counted [B]. None where no prompt has two."""
    n = apart.shape[1]
    distance, both = apart.reshape(-1, n, n), counted.reshape(-1, n)
    pairs = both[:, :, None] & both[:, None, :] & ~np.eye(n, dtype=bool)
    count = pairs.sum((1, 2))
    if not count.any():
        return None
    with_pairs = count > 0
    return float(((distance * pairs).sum((1, 2))[with_pairs] / count[with_pairs]).mean())


@torch.no_grad()
def evaluate(
    draw: Callable[[list[str], list[int]], tuple[Tensor, Tensor, list[Image.Image]]],
    judge: Judge,
    prompts: Sequence[str],
    seeds: int,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda mine: mine,
) -> Evaluation:
    """Judge what `draw(texts, seeds)` gives: latents [B, C, H, W], rewards [B] and pictures. Every process draws for its share of the
    prompts.

    All processes return the same, and so decide the same.
    """
    # Every process draws for as many prompts: what is gathered must have one shape. The surplus is cut afterwards.
    each = -(-len(prompts) // world)
    mine = [prompts[i % len(prompts)] for i in range(rank * each, (rank + 1) * each)]
    texts = [text for text in mine for _ in range(seeds)]
    latents, rewards, images = draw(texts, list(range(seeds)) * each)
    groups = latents.float().unflatten(0, (-1, seeds)).flatten(2)
    apart = torch.cdist(groups, groups).flatten(0, 1) / groups.shape[2] ** 0.5
    judged = torch.as_tensor(judge(images, texts), dtype=torch.float64, device=latents.device)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(latents.device)
    count = len(prompts) * seeds
    rows = torch.cat([rewards.double()[:, None], judged[:, None], apart.double()], 1)
    rows, pixels = (gather(t.contiguous())[:count].cpu() for t in (rows, pixels))
    return Evaluation(
        prompt=np.repeat(np.arange(len(prompts)), seeds),
        reward=rows[:, 0].numpy(),
        judge=rows[:, 1].numpy(),
        apart=rows[:, 2:].numpy(),
        images=[Image.fromarray(p) for p in pixels.numpy()],
    )


def reward_is_hacked(
    history: Sequence[Mapping[str, Any]], judge_now: np.ndarray, judge_best: np.ndarray, prompts: np.ndarray
) -> str | None:
    """Why the reward model is being fooled at the last point of a history, or None.

    history: {update, reward, judge} of every evaluation. judge_now and judge_best [B]: the judge's scores of the same
    prompts and seeds at the last point and at the best one; prompts [B]: whose they are. It sounds when the reward is
    above the best point's while the judge is below it, beyond the noise of the paired prompts (95 %), by more than a
    quarter of what it had gained. One prompt has no noise to compare with: None.
    """
    last, best = history[-1], max(history, key=lambda row: row["judge"])
    if best is last or last["reward"] <= best["reward"]:
        return None
    gap = paired_ci(judge_now, judge_best, prompts)
    lost = -gap.value > ALARM_SHARE * (best["judge"] - history[0]["judge"])
    if not (lost and gap.ci95[1] < 0):
        return None
    return (
        f"update {last['update']}: the reward rose to {last['reward']:+.3f} while the judge fell by {-gap.value:.3f} since"
        f" update {best['update']}: the reward model is being fooled"
    )
