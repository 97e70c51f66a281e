"""PIL pictures as the pixels that a vision model was trained on, without torchvision.

Two ways are in use: the shorter side is fitted and the middle is cut out (CLIP, Radford et al. 2021, arXiv 2103.00020, and nearly all
that stands on it), or the longer side is fitted and the rest is black (HPSv2).

Dimension letters: B pictures, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, per channel, of values in [0, 1]. All scorers here use them."""


def cropped(images: Sequence[Image.Image], side: int, *, nearest: bool = False) -> Tensor:
    """Shorter side bicubically resized to S, centre S x S cut out: float32 [B, 3, S, S], normalised.

    An odd rest cannot be halved: transformers' processors round down; `nearest` rounds half to even, as torchvision does. They differ by
    one pixel, and on square pictures not at all.
    """
    return normalised(torch.stack([_unit(_middle(image, side, nearest)) for image in images]))


def padded(images: Sequence[Image.Image], side: int) -> Tensor:
    """Longer side bicubically resized to S, black bars around: float32 [B, 3, S, S], normalised.

    HPSv2's own way (its open_clip fork, transform.py and factory.py with light_augmentation): values become floats before the resize, so
    nothing is rounded or clipped, and the bars are black before normalisation. Resized with antialiasing, as torchvision does from 0.17 on.
    """
    return normalised(torch.stack([_barred(image, side) for image in images]))


def normalised(pixels: Tensor) -> Tensor:
    """Values [..., 3, H, W] in [0, 1] shifted and scaled to CLIP's mean and deviation."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resized(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture bicubically resized by PIL: float32 [3, height, width], normalised."""
    return normalised(_unit(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)))


def _middle(image: Image.Image, side: int, nearest: bool) -> Image.Image:
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    width, height = side * width // short, side * height // short
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round(rest / 2) if nearest else rest // 2 for rest in (width - side, height - side))
    return image.crop((left, top, left + side, top + side))


def _barred(image: Image.Image, side: int) -> Tensor:
    pixels = _unit(image.convert("RGB"))
    scale = side / max(pixels.shape[1:])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[1:])
    if scale != 1.0:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))


def _unit(image: Image.Image) -> Tensor:
    """RGB picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
