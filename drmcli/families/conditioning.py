"""What a denoiser is told of prompts: tensors by name.

Dimension letters: B prompts, T text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(init=False)
class Conditioning:
    """What a denoiser is told of B prompts: tensors [B, ...] by name, read as attributes too.

    A tensor named `mask` [B, T], bool, says which of T text positions are read; the others are padding. Rows of unlike lengths can be
    joined only where there is a mask: models without one read their padding.
    """

    tensors: dict[str, Tensor]

    def __init__(self, tensors: dict[str, Tensor] | None = None, /, **named: Tensor):
        self.tensors = {**(tensors or {}), **named}

    def __getattr__(self, name: str) -> Tensor:
        if name == "tensors" or name not in self.tensors:
            raise AttributeError(f"no tensor {name!r} in this conditioning")
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Conditioning:
        """Rows by slice, list or tensor of positions."""
        return self._each(lambda t: t[index])

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As Tensor.to; masks and positions keep their kind when a dtype is given."""

        def moved(tensor: Tensor) -> Tensor:
            wanted = tensor.to(*args, **kwargs)
            return wanted if tensor.is_floating_point() else wanted.to(tensor.dtype)

        return self._each(moved)

    def expand(self, count: int) -> Conditioning:
        """One row as `count` rows, without a copy."""
        return self._each(lambda t: t.expand(count, *t.shape[1:]))

    def pad(self, length: int) -> Conditioning:
        """Text positions filled up to `length` with zeros that the mask leaves out. Without a mask nothing changes."""
        mask = self.tensors.get("mask")
        if mask is None or mask.shape[1] == length:
            return self
        short = mask.shape[1]
        assert short < length

        def padded(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2 or tensor.shape[1] != short:
                return tensor
            return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, length - short))

        return self._each(padded)

    def trimmed(self) -> Conditioning:
        """Without the text positions that no row reads at its end."""
        mask = self.tensors.get("mask")
        if mask is None:
            return self
        full = mask.shape[1]
        read = mask.any(0).nonzero()
        length = int(read[-1]) + 1 if len(read) else 1
        return self._each(lambda t: t[:, :length] if t.ndim > 1 and t.shape[1] == full else t)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows one below the other, padded to the longest where there is a mask."""
        if "mask" in parts[0].tensors:
            longest = max(p.mask.shape[1] for p in parts)
            parts = [p.pad(longest) for p in parts]
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()})
