"""A diffusion-based reward model as a scorer: of pictures at one sigma, and of noisy latents where they are.

Dimension letters: B pictures or latents, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.config import package_path
from drmcli.encoders import share
from drmcli.generator import Generator, PromptEmbeds
from drmcli.kernels import PLAIN, Kernels
from drmcli.reward import RewardModel
from drmcli.scorers import dina, lrm
from drmcli.scorers.weights import Source

KINDS: dict[str, Any] = {"dina-lrm": dina, "lrm-sd15": lrm, "lrm-sdxl": lrm}
"""The module that reads each public reward model."""


def published(ref: str, flag: str) -> tuple[Any, Path] | None:
    """The module that reads a public reward model and the folder with its files; None for one in drm's own layout.

    Named by a name of `KINDS` (then from the hub), NAME=FOLDER, the hub id, or a folder in its layout. Raises MissingError.
    """
    place = Path(package_path(ref))
    if place.is_dir():
        return next(((kind, place) for kind in KINDS.values() if kind.is_published_layout(place)), None)
    name, _, folder = ref.partition("=")
    if ref == dina.REPOSITORY:
        name = "dina-lrm"
    if name not in KINDS:
        return None
    kind = KINDS[name]
    return kind, kind.files(Source(name, folder or None, flag))


@dataclass
class RewardScorer:
    """A loaded `RewardModel` and how it judges finished pictures."""

    name: str
    """Folder or hub id."""
    model: RewardModel
    sigma: float = 0.25
    """Sigma at which pictures are judged."""
    noise_samples: int = 4
    """Noise draws a picture, averaged."""
    seed: int = 0
    """Of that noise."""

    @classmethod
    def load(
        cls,
        ref: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        flag: str = "--reward",
        kernels: Kernels = PLAIN,
        sigma: float | None = None,
        noise_samples: int = 4,
        seed: int = 0,
        beside: Generator | None = None,
    ) -> RewardScorer:
        """From a folder or the hub, in drm's layout or that of a public reward model; sigma None: where the model judges pictures best.

        beside: see `RewardModel.from_pretrained`. Raises what `RewardModel.from_pretrained` does.
        """
        found = published(ref, flag)
        if found is None:
            model = RewardModel.from_pretrained(
                ref, device=device, dtype=dtype, kernels=kernels, beside=beside, flag=flag
            )
        else:
            kind, folder = found
            model = kind.load(folder, ref, device=device, dtype=dtype, kernels=kernels, beside=beside, flag=flag)
        return cls(ref, model, model.picture_sigma if sigma is None else sigma, noise_samples, seed)

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32 on the CPU."""
        if not images:
            return torch.zeros(0)
        found = self.model.score_images(
            images, prompts, sigmas=[self.sigma], noise_samples=self.noise_samples, seed=self.seed
        )
        return found[:, 0].float().cpu()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Any prompt can be judged."""

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """B prompts by the encoders of the pipeline that the model was cut from."""
        return self.model.generator().encode_prompts(prompts)

    def score(
        self, latents: Tensor, sigma: float | Tensor, cond: PromptEmbeds, *, states: list[Any] | None = None
    ) -> Tensor:
        """Scores [B] of latents [B, C, H, W] at a sigma; `states` as in `RewardModel.features`."""
        return self.model.score(latents, sigma, cond, states=states)

    @property
    def cost(self) -> float:
        """Of one call, in forward passes of the generator that it was cut from."""
        return self.model.cost

    def share_encoders(self, generator: Generator) -> str | None:
        """Use a generator's text encoders where they are those of the training. Returns a warning or None: see `encoders.share`."""
        return share(self.model, generator)

    def check_latents(self, generator: Generator, flag: str) -> None:
        """Raises InputError where the model was made for latents of another kind than a generator's."""
        self.model.check_latents(generator, f"{flag} {self.name}")
