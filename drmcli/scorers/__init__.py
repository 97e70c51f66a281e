"""Everything that scores: pictures and prompts in, one number a picture out; some judge noisy latents too.

A scorer is asked for in one way, whatever it is and whichever flag names it (`--reward`, `--scorer`, `--judge`, `--against`,
`--add-reward`):

- a name of `NAMES`, such as `pickscore`, with the weights from the hub, or from a folder: `pickscore=/models/PickScore_v1`
- a reward model of this package: its folder or hub id
- any callable of the user's: `module:function`
- the address of a `drm serve`: `http://host:port`, or `http://host:port#pickscore` for another than its first scorer

Weights are read as safetensors, or by PyTorch's weights-only reader where only a .pt file is published.

This file imports no torch, so that names can be listed and checked without it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from drmcli.config import local_or_hub, package_path, split_ratio
from drmcli.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from drmcli.kernels import Kernels


class Scorer(Protocol):
    """Judges finished pictures."""

    name: str
    """As it was asked for."""

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32 on the CPU, one a picture, whatever else is in the batch. Raises RunError for one that is not finite."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError for a prompt that the scorer cannot judge, before minutes are spent on pictures of it."""


@runtime_checkable
class StateScorer(Protocol):
    """A scorer that judges noisy latents as well: a diffusion-based reward model."""

    name: str

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """As `Scorer`."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """As `Scorer`."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """What it needs to know of B prompts; rows are picked by indexing."""

    def score(self, latents: Tensor, sigma: float | Tensor, cond: Any) -> Tensor:
        """Scores [B], float32, differentiable, of latents [B, C, H, W] at sigma (one, or [B])."""


@dataclass(frozen=True)
class Named:
    """A scorer that has a name."""

    about: str
    """What it gives, where its weights are, their licence."""
    loader: str = ""
    """`module:function`, called as function(source, device, dtype), or the scoring function itself where there are no weights."""
    weights: bool = True
    states: bool = False
    """Is it a reward model that judges noisy latents too?"""
    check: str | None = None
    """`module:function` that raises InputError for prompts that cannot be judged."""


TABLE = {
    "pickscore": Named(
        "PickScore v1, scaled cosine (yuvalkirstain/PickScore_v1, MIT)", "drmcli.scorers.clip:pickscore"
    ),
    "clip": Named(
        "CLIP ViT-H/14, scaled cosine (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT)", "drmcli.scorers.clip:clip"
    ),
    "aesthetic": Named(
        "LAION aesthetic predictor v2 on CLIP ViT-L/14, no prompt (camenduru/improved-aesthetic-predictor, Apache-2.0)",
        "drmcli.scorers.clip:aesthetic",
    ),
    "hpsv2": Named("Human Preference Score v2.0, cosine (xswu/HPSv2, Apache-2.0)", "drmcli.scorers.clip:hpsv2"),
    "hpsv2.1": Named("Human Preference Score v2.1, cosine (xswu/HPSv2, Apache-2.0)", "drmcli.scorers.clip:hpsv2_1"),
    "imagereward": Named(
        "ImageReward v1.0, standardised (THUDM/ImageReward, Apache-2.0)", "drmcli.scorers.imagereward:imagereward"
    ),
    "hpsv3": Named(
        "Human Preference Score v3 on Qwen2-VL-7B, mean of the score (MizzenAI/HPSv3, MIT)",
        "drmcli.scorers.hpsv3:hpsv3",
    ),
    "dina-lrm": Named(
        "DiNa-LRM on Stable Diffusion 3.5 Medium, noisy latents too; 2.3 B parameters of a gated base, 0.9 GB of its own "
        "(liuhuohuo/DiNa-LRM-SD35M-12layers, Apache-2.0; the base's licence binds)",
        states=True,
    ),
    "lrm-sd15": Named(
        "LRM on the Stable Diffusion 1.5 U-Net, noisy latents too; 4 GB, of which half is read "
        "(casiatao/LRM, MIT code on CreativeML Open RAIL-M weights)",
        states=True,
    ),
    "lrm-sdxl": Named(
        "LRM on the Stable Diffusion XL U-Net, noisy latents too; 14 GB, of which half is read "
        "(casiatao/LRM, MIT code on CreativeML Open RAIL++-M weights)",
        states=True,
    ),
    "shapes": Named(
        "the judge of the embedded world, 0 to 1 (no weights)",
        "drmcli.scorers.plain:shapes",
        weights=False,
        check="drmcli.scorers.plain:check_shapes",
    ),
}
NAMES = {name: named.about for name, named in TABLE.items()}
"""Name of each scorer and one line on it."""


SCORER_HINT = "give --reward: a reward model's folder or hub id, or a name such as pickscore"
"""Where nothing is named that scores."""


@dataclass(frozen=True)
class Reference:
    """What a text that names a scorer means."""

    kind: Literal["named", "function", "model", "server"]
    text: str
    name: str = ""
    folder: str | None = None
    """Of a named scorer's weights; None is the hub."""


def read_reference(text: str, flag: str = "--scorer") -> Reference:
    """What a text that names a scorer means; nothing is loaded, and torch is not imported.

    A folder that exists is a reward model whatever its name. Raises InputError (exit code 2) for an unknown name, MissingError (3)
    for a folder that is not there; each names `flag`.
    """
    if text.startswith(("http://", "https://")):
        return Reference("server", text)
    name, mark, folder = text.partition("=")
    if text and Path(package_path(text)).is_dir():
        return Reference("model", text)
    if name in TABLE:
        if mark and not TABLE[name].weights:
            raise InputError(f"{flag} {text}: has no weights", hint=f"give {name} without a folder")
        if mark and not folder:
            raise InputError(f"{flag} {text}: no folder is named", hint=f"give {flag} {name} or {flag} {name}=FOLDER")
        return Reference("named", text, name, folder or None)
    if ":" in text and "/" not in text:
        return Reference("function", text)
    if text and not any(mark in text for mark in "/\\{~") and not text.startswith(".") and not Path(text).exists():
        raise InputError(f"{flag} {text}: there is no such scorer", hint=_hint(name))
    local_or_hub(text, flag)
    return Reference("model", text)


def parse_term(text: str, flag: str = "--reward") -> tuple[str, float]:
    """`SCORER=WEIGHT` as its parts; the weight is 1 where none is given. Raises InputError for a weight that is not finite."""
    ref, value = split_ratio(text)
    if value is None:
        return ref, 1.0
    if not math.isfinite(value):
        raise InputError(f"{flag} {text}: the weight {value} is not finite", hint=f"for example {flag} {ref}=0.5")
    return ref, value


def load_scorer(
    text: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    flag: str = "--scorer",
    kernels: Kernels | None = None,
    sigma: float | None = None,
    noise_samples: int = 4,
    seed: int = 0,
    beside: Any = None,
) -> Scorer:
    """A scorer by whatever names it; see `read_reference`. A reward model comes as a `StateScorer`.

    sigma, noise_samples, seed: how a reward model judges finished pictures (sigma None: where it does best); others have no such
    choice. kernels: how a reward model's blocks are computed. beside: a loaded `Generator`, whose weights a reward model on the same
    base uses too. Raises what `read_reference` does, InputError for weights of another kind, MissingError for weights that are not there.
    """
    ref = read_reference(text, flag)
    if ref.kind == "model" or (ref.kind == "named" and TABLE[ref.name].states):
        from drmcli.kernels import PLAIN
        from drmcli.scorers.drm import RewardScorer

        return RewardScorer.load(
            text, device=device, dtype=dtype, flag=flag, kernels=kernels or PLAIN, sigma=sigma, noise_samples=noise_samples,
            seed=seed, beside=beside,
        )  # fmt: skip
    if ref.kind == "server":
        from drmcli.scorers.remote import connect

        return connect(text, flag=flag, sigma=0.25 if sigma is None else sigma, noise_samples=noise_samples, seed=seed)
    from drmcli.scorers import plain

    if ref.kind == "function":
        return plain.Scoring(text, flag, plain.named_callable(text, flag))
    named = TABLE[ref.name]
    loader = _function(named.loader)
    if not named.weights:
        return plain.Scoring(ref.name, flag, loader, _function(named.check) if named.check else None)
    from drmcli.scorers.weights import Source

    source = Source(ref.name, ref.folder, flag)
    with source.explained():
        return plain.Scoring(ref.name, flag, loader(source, device, dtype))


def _function(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(NAMES)}"
    return f"{known}; or give module:function, or a reward model's folder or hub id"
