"""Batches found to fit memory: what does not fit is tried again with half as much, for good, and a warning says so once.

What comes out does not depend on it: everything that goes through a model here is independent of the rest of its batch. An optimizer's
micro-batches are not touched: a training that does not fit says so, and its plan told before.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from drmcli.errors import DrmError, DrmWarning, RunError, is_out_of_memory

T = TypeVar("T")
MAX_BATCH = "--set max_batch"
SMALLER = "a smaller --resolution (of drm sample --height and --width), or --dtype bf16"
EVERYTHING = 2**31
"""A batch without a limit of its own."""


class Batch:
    """How many of something go through a model at once."""

    def __init__(self, size: int = EVERYTHING, what: str = "pictures", *, flag: str = "", hint: str = "--dtype bf16"):
        """what: of what, in the plural; flag: where the size comes from; hint: what helps where even one is too much."""
        self.size, self.what, self.flag, self.hint = size, what, flag, hint
        self._said = False

    def each(self, work: Callable[[slice], T], count: int) -> list[T]:
        """`work` of all positions up to `count`, in order, so many at once as memory allows. Raises RunError where one is too much."""
        parts: list[T] = []
        start = 0
        while start < count:
            stop = min(start + self.size, count)
            try:
                parts.append(work(slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, DrmError) or not is_out_of_memory(error):
                    raise
                if stop - start == 1:
                    raise RunError(
                        f"out of memory with one of the {self.what} at a time{': ' + self.flag if self.flag else ''}",
                        hint=f"{self.hint}; --dry-run shows what needs how much",
                    ) from error
            else:
                start = stop
                continue
            self._halve(stop - start)  # outside: what the error holds of the failed pass is gone by now
        return parts

    def _halve(self, tried: int) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = tried // 2
        if not self._said:
            self._said = True
            flag = f" ({self.flag})" if self.flag else ""
            warnings.warn(
                f"memory does not suffice for {tried} {self.what} at once{flag}: going on with {self.size}, or fewer where need be",
                DrmWarning,
                stacklevel=3,
            )


def batch_of(size: int | Batch, what: str, *, flag: str = "", hint: str = "--dtype bf16") -> Batch:
    """A batch of a size, or one that has been found already."""
    return size if isinstance(size, Batch) else Batch(size, what, flag=flag, hint=hint)


# --- the VAE ----------------------------------------------------------------------------------------------------------

DECODED_PIXELS = 2**20
"""Pixels that the VAE decodes at once, at least one picture: 64 pictures of 512 pixels would be tensors of 8 GB each."""
TILED_PIXELS = 2**21
"""Pixels of a picture above which the VAE works on overlapping tiles where nothing else is asked."""
SMALLER_VAE = "--set vae_tiling=on for large pictures, a smaller --resolution, or --dtype bf16"


class Room:
    """What a pipeline's encoders and decoder take at once."""

    def __init__(self) -> None:
        self.prompts = Batch(what="prompts", hint="--set text_encoder_3=false where there is T5, or --dtype bf16")
        self.encoded = Batch(what="pictures to encode", hint=SMALLER_VAE)
        self.decoded = Batch(what="pictures to decode", hint=SMALLER_VAE)


def at_once(pixels: int) -> int:
    """Pictures of so many pixels that the VAE decodes at once."""
    return max(1, DECODED_PIXELS // pixels)


def tile(vae: Any, asked: str, pixels: int) -> None:
    """Have a VAE work on tiles (of its own size, 1024 pixels of Stable Diffusion 3.5's) or not. pixels: of a picture."""
    if hasattr(vae, "enable_tiling"):
        vae.enable_tiling() if asked == "on" or (asked == "auto" and pixels > TILED_PIXELS) else vae.disable_tiling()
