"""Scores of clean latents: noised by keyed draws and averaged.

Dimension letters: B latents, C channels, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.errors import RunError
from drmcli.families.base import Conditioning
from drmcli.fitting import SMALLER, Batch, batch_of
from drmcli.flow import add_noise
from drmcli.run import seed_of


@torch.no_grad()
def score_pictures(
    model: Callable[[Tensor, float, Conditioning], Tensor],
    encoders: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    sigmas: Sequence[float],
    *,
    resolution: int | None,
    noise_samples: int,
    seed: int,
    batch_size: int | Batch,
) -> Tensor:
    """Scores [B, len(sigmas)] of B pictures for B prompts, each encoded once by `encoders`, a Generator. See `score_clean`."""
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    names, batch = list(unique), batch_of(batch_size, "pictures", flag="--batch-size", hint=SMALLER)
    parts = [encoders.encode_prompts(names[i : i + batch.size]) for i in range(0, len(names), batch.size)]
    embeds = Conditioning.cat(parts)

    def some(at: slice) -> Tensor:
        latents = encoders.encode_images(images[at], resolution)
        cond = embeds[torch.tensor([unique[p] for p in prompts[at]], device=latents.device)]
        keys = [hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() for image in images[at]]
        return score_clean(model, latents, cond, keys, sigmas, noise_samples=noise_samples, seed=seed)

    return torch.cat(batch.each(some, len(images)))


@torch.no_grad()
def score_clean(
    model: Callable[[Tensor, float, Conditioning], Tensor],
    latents: Tensor,
    cond: Conditioning,
    keys: Sequence[str],
    sigmas: Sequence[float],
    *,
    noise_samples: int,
    seed: int,
) -> Tensor:
    """Scores [B, len(sigmas)] of clean latents, noised and averaged over the draws. See `keyed_noise` for the B keys.

    Raises RunError for a score that is not finite.
    """
    scores = torch.zeros(len(latents), len(sigmas), device=latents.device)
    for draw in range(noise_samples if any(s > 0 for s in sigmas) else 1):
        noise = keyed_noise(keys, latents.shape[1:], seed=seed, draw=draw).to(latents.device)
        for j, sigma in enumerate(sigmas):
            if sigma > 0:
                scores[:, j] += model(add_noise(latents, noise, sigma), sigma, cond) / noise_samples
            elif draw == 0:
                scores[:, j] = model(latents, 0.0, cond)
    if not bool(torch.isfinite(scores).all()):
        raise RunError("scoring: a score is not finite", hint="check the reward model's weights, or use --dtype fp32")
    return scores


def keyed_noise(keys: Sequence[str], shape: Sequence[int], *, seed: int, draw: int) -> Tensor:
    """Gaussian noise [B, *shape] that depends on each key, the seed and the draw, and so never on the batch.

    A picture's key names its content: two pictures of a prompt have noise of their own, as a sampler's candidates have.
    """
    unique: dict[str, Tensor] = {}
    for key in keys:
        if key not in unique:
            rng = torch.Generator().manual_seed(seed_of("noise", seed, draw, key))
            unique[key] = torch.randn(tuple(shape), generator=rng)
    return torch.stack([unique[key] for key in keys])
