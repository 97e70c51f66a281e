"""What a caller from Python may hand over as pictures, prompts and sigmas, brought into one form or refused by what it is.

Dimension letters: B pictures, H, W height and width, C channels (1, 3 or 4).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from drmcli.data.images import FileImage, eight_bits, load_image
from drmcli.data.text import cut, short, sound
from drmcli.errors import InputError

Picture: TypeAlias = Any
"""A PIL picture, a path, an array [H, W] or [H, W, C], or a tensor [C, H, W]; uint8 from 0 to 255, or floats from 0 to 1."""
KINDS = "a PIL picture, a path, an array [H, W, 3] or a tensor [3, H, W]"


def as_pictures(images: Picture | Iterable[Picture]) -> list[Image.Image]:
    """RGB pictures of one picture, several, or a batch [B, H, W, C] (a tensor [B, C, H, W]).

    Files are turned as their EXIF data say, as `drm score` turns them. Raises InputError, a BadImage for a file that cannot be read, naming
    the entry.
    """
    dimensions = getattr(images, "ndim", None)
    single = isinstance(images, (Image.Image, str, os.PathLike)) or dimensions in (2, 3)
    if single:
        return [_picture(images, "images")]
    if dimensions == 0 or isinstance(images, (bytes, dict)) or not isinstance(images, Iterable):
        raise InputError(f"images: {_what(images)}", hint=f"give {KINDS}, or a list of them")
    entries = list(images)
    if not entries:
        raise InputError("images: there is none", hint=f"give {KINDS}, or a list of them")
    return [_picture(entry, f"images: entry {i}") for i, entry in enumerate(entries, 1)]


def as_prompts(prompts: str | Iterable[str], count: int | None = None) -> list[str]:
    """A prompt a picture: one text stands for all `count` of them; None takes any number.

    Raises InputError for another number, for what is no text, and for an empty one.
    """
    if isinstance(prompts, str):
        entries = [prompts] * (1 if count is None else count)
    elif prompts is None or isinstance(prompts, (bytes, dict, os.PathLike)) or not isinstance(prompts, Iterable):
        raise InputError(
            f"prompts: {_what(prompts)}", hint="give a text, or a list of them; pictures come first, then prompts"
        )
    else:
        entries = list(prompts)
    for i, text in enumerate(entries, 1):
        where = "prompts" if isinstance(prompts, str) else f"prompts: entry {i}"
        if not isinstance(text, str):
            raise InputError(f"{where}: {_what(text)}, not text", hint="give a text for each picture")
        if not text.strip():
            raise InputError(f"{where}: is empty", hint="say what the picture should show")
        sound(text, where)
    if count is not None and len(entries) != count:
        raise InputError(
            f"{count} images and {len(entries)} prompts", hint="give a prompt an image, or one text for all of them"
        )
    return entries


def as_sigmas(sigmas: float | Iterable[float]) -> list[float]:
    """Sigmas, from 0 to 1, of one or several. Raises InputError for others, and for none."""
    alone = isinstance(sigmas, Real) or getattr(sigmas, "ndim", None) == 0
    if isinstance(sigmas, str) or not (alone or isinstance(sigmas, Iterable)):
        raise InputError(
            f"sigmas: {_what(sigmas)}", hint="give a number from 0 (clean) to 1 (noise), or a list of them"
        )
    levels = []
    for value in [sigmas] if alone else list(sigmas):  # type: ignore[arg-type]
        try:
            level = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            level = math.nan
        if not 0 <= level <= 1:
            raise InputError(f"sigmas: {short(value)} is no sigma", hint="give numbers from 0 (clean) to 1 (noise)")
        levels.append(level)
    if not levels:
        raise InputError("sigmas: there is none", hint="give a number from 0 (clean) to 1 (noise), or a list of them")
    return levels


def as_count(value: int, name: str, *, least: int = 1) -> int:
    """A whole number of at least `least`. Raises InputError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: {short(value)}", hint=f"give a whole number of at least {least}")
    return int(value)


def _what(value: Any) -> str:
    """What was given in place of something else."""
    if value is None:
        return "None"
    name = type(value).__name__
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{name} of shape {list(shape)}"
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    return f"{article} {name}" + (f" ({short(value, 40)})" if isinstance(value, (str, bytes, int, float)) else "")


def _picture(value: Picture, where: str) -> Image.Image:
    """One RGB picture."""
    if isinstance(value, Image.Image):
        try:
            value = eight_bits(value, where) if value.mode.startswith(("I", "F")) else value
            return value if value.mode == "RGB" else value.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # a file that PIL opened and reads only now
            raise InputError(
                f"{where}: damaged: {cut(str(error))}", hint="replace the picture, or leave it out"
            ) from None
    if isinstance(value, (str, os.PathLike)):
        path = Path(value).expanduser()
        return load_image(FileImage(f"{where}: {cut(str(value))}", path), upright=True)
    if hasattr(value, "detach"):  # a tensor of torch, which puts channels first
        if value.ndim != 3:
            raise InputError(f"{where}: {_what(value)}", hint=f"give {KINDS}")
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
        return _of_array(value.permute(1, 2, 0).numpy(), where, f"Tensor of shape {list(value.shape)}")
    if isinstance(value, np.ndarray):
        return _of_array(value, where, _what(value))
    raise InputError(f"{where}: {_what(value)}, not a picture", hint=f"give {KINDS}")


def _of_array(pixels: np.ndarray, where: str, what: str) -> Image.Image:
    """A picture of pixels [H, W] or [H, W, C]."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise InputError(f"{where}: {what}", hint=f"give {KINDS}")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"{where}: floats from {low:g} to {high:g}", hint="give floats from 0 to 1, or uint8 from 0 to 255"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise InputError(f"{where}: pixels of {pixels.dtype}", hint="give uint8 from 0 to 255, or floats from 0 to 1")
    rgb = pixels[:, :, :3] if pixels.shape[2] > 1 else np.repeat(pixels, 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(rgb))
