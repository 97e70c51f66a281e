"""What can be set of `drm reproduce`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from drmcli.config.schema import Common, Positive, Sigma, Timed, strict

Part = Literal["reward", "rl", "sampling"]
PARTS: tuple[Part, ...] = ("reward", "rl", "sampling")


@dataclass(config=strict, kw_only=True)
class Reproduce(Common, Timed):
    """`drm reproduce`."""

    only: list[Part] = Field(default_factory=lambda: list(PARTS), min_length=1)
    """Parts to run."""
    data_dir: str | None = None
    """Folder with a folder for each dataset; named like it, in its published layout."""
    datasets: list[str] = Field(default_factory=lambda: ["imagereward", "hpdv2", "pickapic", "hpdv3"])
    """Test sets of preferences."""
    sigmas: list[Sigma] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9])
    """Sigmas at which the pre-trained reward model is measured."""
    resolutions: list[Positive] = Field(default_factory=list)
    """Sides in pixels at which a reward model is trained besides the preset's own."""
    train_steps: Positive | None = None
    """Steps of each reward model; None is the preset's."""
    bench_pairs: Positive | None = None
    """Pairs of each test set; None is all."""
    rewards: list[str] = Field(default_factory=lambda: ["pickscore", "hpsv3"], max_length=2)
    """Scorers that Flow-GRPO is rewarded by, besides the reward model."""
    scorers: list[str] = Field(default_factory=lambda: ["imagereward", "pickscore", "hpsv3"], max_length=3)
    """Scorers of what is drawn."""
    prompts: str | None = None
    """Prompts to align with, as of `drm grpo`."""
    eval_prompts: str | None = None
    """Prompts whose pictures are compared; the embedded world has its own."""
    num_prompts: Positive = 96
    """How many of them are drawn."""
    num_images: Positive = 4
    """Pictures a prompt."""
    geneval_prompts: Positive | None = None
    """Prompts of GenEval, the first; None is all."""
    updates: Positive | None = None
    """Updates of each alignment; None is the preset's."""
    beams: list[Positive] = Field(default_factory=lambda: [1, 2, 4, 6], min_length=1)
    """Candidates a step of Step-wise Sampling."""
    batch_size: Positive = 16
    """Pictures scored at once."""
