"""What drawing pictures and scoring them need in memory, from configs alone: models that are held, and the largest pass.

Passes run on fake tensors, and the bytes that are alive at once are added up as they come and go. Nothing of the models' size is
allocated. Training keeps tensors for the backward pass; that is `drmcli.memory`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drmcli.families.base import Family
from drmcli.loading import base_weights
from drmcli.memory import FIXED, RealMasks, blank_states, cast, make_fake
from drmcli.quantize import saving
from drmcli.reward import RewardModel
from drmcli.reward_config import RewardConfig


@dataclass
class Footprint:
    """Bytes of a command that trains nothing."""

    models: dict[str, int]
    """Weights by model."""
    passes: dict[str, int]
    """The most that is alive in one pass beside the weights, by kind of pass; they come one after the other."""
    gone: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Models that have been let go before a kind of pass; all others are held at once."""

    def total(self, *, cuda: bool) -> int:
        """At the pass that needs most."""
        held = {
            name: sum(size for model, size in self.models.items() if model not in self.gone.get(name, ()))
            for name in self.passes
        }
        return int(max(held[name] + size for name, size in self.passes.items()) + (FIXED if cuda else 0))

    def to_dict(self, *, cuda: bool) -> dict[str, Any]:
        """With the total."""
        return {"models": self.models, "passes": self.passes, "total": self.total(cuda=cuda)}


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside are alive at once, real ones or fake."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive and self._alive[key].alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def imagined(model: nn.Module) -> Iterator[None]:
    """Inside, a model of the meta device computes with fake tensors, without gradients."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), RealMasks():
        make_fake(model)
        yield


def bytes_of(model: nn.Module) -> int:
    """Of weights and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def alive_in(work: Callable[[], Any]) -> int:
    """The most bytes alive at once in some work."""
    with PeakBytes() as counter:
        work()
    return counter.peak


def generator_pass(
    family: Family,
    config: dict[str, Any],
    *,
    count: int,
    size: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    bits: str = "none",
) -> tuple[int, int]:
    """Bytes of a denoiser's weights, and of one forward pass of `count` latents of H x W. bits: `Kernels.quantize`."""
    with torch.device("meta"):
        model: Any = cast(family.denoiser_class.from_config(config), dtype)  # type: ignore[attr-defined]
    less, largest = saving(family.blocks(model), bits)
    with imagined(model):
        latents, sigma, cond = blank_states(family, config, count, size, tokens)

        def work() -> Tensor:
            inputs = family.inputs(model, latents, sigma, cond, None)
            return family.velocity(model(**inputs, return_dict=False), latents, sigma)

        return bytes_of(model) - less, alive_in(work) + largest


def reward_pass(
    config: RewardConfig,
    *,
    count: int,
    size: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    lent: bool = False,
    bits: str = "none",
) -> tuple[int, int]:
    """The same of a reward model: its kept blocks, LoRA and head. lent: the blocks' weights are a generator's, and not counted."""
    with torch.device("meta"):
        model = RewardModel.from_config(config)
        model.set_trainable()
        cast(model.transformer, dtype)
    less, largest = saving(model.blocks, bits)
    with imagined(model):
        latents, sigma, cond = blank_states(model.family, config.transformer, count, size, tokens)
        lends = sum(t.nbytes for t in base_weights(model.transformer).values()) if lent else less
        return bytes_of(model) - lends, alive_in(lambda: model.score(latents, sigma, cond)) + largest


def vae_passes(
    family: Family, vae: Any, channels: int, *, encode: int, decode: int, size: tuple[int, int], factor: int
) -> dict[str, int]:
    """Bytes of encoding and of decoding so many pictures at once, 0 of them leaves it out. vae: on the meta device.

    channels, size, factor: C, H and W of the canonical latents, and pixels on the side of one of theirs.
    """
    pipe, found = SimpleNamespace(vae=vae), {}
    height, width = size

    def encoding() -> Tensor:
        return family.encode_images(pipe, torch.randn(encode, 3, height * factor, width * factor).to(vae.dtype))

    with imagined(vae):
        if encode:
            found["encode pictures"] = alive_in(encoding)
        if decode:
            latents = torch.randn(decode, channels, height, width)
            found["decode pictures"] = alive_in(lambda: family.decode(pipe, latents))
    return found


def text_pass(model: Any, *, prompts: int, tokens: int, bits: str = "none") -> int:
    """Bytes of encoding so many prompts of so many tokens by a text encoder of transformers on the meta device, all its layers kept."""
    _, largest = saving([model], bits)
    with imagined(model):
        return alive_in(lambda: read_ids(model, prompts, tokens)) + largest


def read_ids(model: Any, prompts: int, tokens: int) -> Any:
    """What a text encoder of transformers returns for prompts of one token repeated; CLIP reads its own number of them."""
    if model.config.model_type == "clip_text_model":
        tokens = int(model.config.max_position_embeddings)
    ids = torch.zeros(prompts, tokens, dtype=torch.long, device=model.device)
    return model(input_ids=ids, output_hidden_states=True)
