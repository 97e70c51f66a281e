"""Other reward scorers: pictures and prompts in, one number a picture out.

They judge finished pictures, where a DRM judges noisy states: as a second reward, as a yardstick, as a column of a benchmark. A scorer
is named (`pickscore`), named with a folder that holds its published weights (`pickscore=/models/PickScore_v1`), or any callable of the
user's (`module:function`). Weights are read as safetensors, or by PyTorch's weights-only reader where only a .pt file is published.

This file imports no torch, so that names can be listed without it.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Protocol

from drmcli.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

NAMES = {
    "pickscore": "PickScore v1, scaled cosine (yuvalkirstain/PickScore_v1, MIT)",
    "clip": "CLIP ViT-H/14, scaled cosine (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT)",
    "aesthetic": "LAION aesthetic predictor v2 on CLIP ViT-L/14, no prompt (camenduru/improved-aesthetic-predictor, Apache-2.0)",
    "hpsv2": "Human Preference Score v2.0, cosine (xswu/HPSv2, Apache-2.0)",
    "hpsv2.1": "Human Preference Score v2.1, cosine (xswu/HPSv2, Apache-2.0)",
    "imagereward": "ImageReward v1.0, standardised (THUDM/ImageReward, Apache-2.0)",
    "hpsv3": "Human Preference Score v3 on Qwen2-VL-7B, mean of the score (MizzenAI/HPSv3, MIT)",
    "shapes": "the judge of the embedded world, 0 to 1 (no weights)",
}
"""Name of each scorer and one line on it: what it gives, where its weights are, their licence."""


class Scorer(Protocol):
    """Scores of pictures: float32 [B] on the CPU, one a picture, whatever else is in the batch."""

    name: str

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor: ...


def load_scorer(ref: str, *, device: torch.device, dtype: torch.dtype, flag: str = "--scorer") -> Scorer:
    """A scorer by name, NAME=FOLDER or `module:function`.

    Raises InputError (exit code 2) for an unknown name and for weights of another kind, MissingError (3) for weights that are not there
    and cannot be fetched; each names `flag`.
    """
    from drmcli.scorers import plain

    name, mark, folder = ref.partition("=")
    if name == "shapes" and not mark:
        return plain.Scoring(name, flag, plain.shapes)
    if name not in NAMES and ":" in ref:
        return plain.Scoring(ref, flag, plain.named_callable(ref, flag))
    if name not in NAMES or name == "shapes":
        raise InputError(f"{flag} {ref}: {_why(name, mark)}", hint=_hint(name))
    if mark and not folder:
        raise InputError(f"{flag} {ref}: no folder is named", hint=f"give {flag} {name} or {flag} {name}=FOLDER")

    from drmcli.scorers import clip, hpsv3, imagereward
    from drmcli.scorers.weights import Source

    loaders = {
        "pickscore": clip.pickscore,
        "clip": clip.clip,
        "aesthetic": clip.aesthetic,
        "hpsv2": clip.hpsv2,
        "hpsv2.1": clip.hpsv2_1,
        "imagereward": imagereward.imagereward,
        "hpsv3": hpsv3.hpsv3,
    }
    source = Source(name, folder or None, flag)
    with source.explained():
        return plain.Scoring(name, flag, loaders[name](source, device, dtype))


def _why(name: str, mark: str) -> str:
    return "has no weights" if name == "shapes" and mark else "there is no such scorer"


def _hint(name: str) -> str:
    if name == "shapes":
        return "give shapes without a folder"
    close = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(NAMES)}"
    return f"{known}; or give module:function"
