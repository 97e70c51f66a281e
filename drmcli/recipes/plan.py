"""What `--dry-run` can tell of a generator without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from drmcli.config import local_or_hub
from drmcli.generator import quiet_libraries, reach
from drmcli.hub import explained
from drmcli.memory import component_bytes

CLIP_TOKENS = 77
"""Tokens of CLIP where the tokenizer's config does not say."""


@dataclass
class Known:
    """Configs of a generator's parts."""

    transformer: dict[str, Any]
    vae_factor: int
    image_size: int
    """Its own side in pixels."""
    prompt_tokens: int
    download: str
    """What a run would fetch, in words."""
    where: str
    revision: str | None

    def beside(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the pipeline's other models, by name; those that it does not have are left out."""
        with explained(self.where, "--generator"), quiet_libraries():
            index = StableDiffusion3Pipeline.load_config(self.where, revision=self.revision)
            return component_bytes(self.where, index, names, dtype, revision=self.revision)


def describe_generator(config: Any) -> Known:
    """Read the configs of config.generator: a few kilobytes, also from the hub."""
    where = local_or_hub(config.generator, "--generator")
    with explained(config.generator, "--generator"), quiet_libraries():
        reach(where, config.revision)
        transformer = SD3Transformer2DModel.load_config(where, subfolder="transformer", revision=config.revision)
        vae = AutoencoderKL.load_config(where, subfolder="vae", revision=config.revision)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Known(
        transformer={k: v for k, v in transformer.items() if not k.startswith("_")},
        vae_factor=factor,
        image_size=int(transformer["sample_size"]) * factor,
        prompt_tokens=_clip_tokens(where) + config.max_sequence_length,
        download=_download(where, config.revision),
        where=where,
        revision=config.revision,
    )


def _clip_tokens(where: str) -> int:
    from transformers import CLIPTokenizer

    if not Path(where).is_dir():
        return CLIP_TOKENS
    return int(min(CLIPTokenizer.from_pretrained(where, subfolder="tokenizer").model_max_length, 10_000))


def _download(where: str, revision: str | None) -> str:
    if Path(where).is_dir():
        return "nothing"
    try:
        files = HfApi().model_info(where, revision=revision, files_metadata=True).siblings or []
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, OSError):
        return "not known: the hub cannot be reached"
    size = sum(f.size or 0 for f in files if "/" in f.rfilename and f.rfilename.endswith(".safetensors"))
    return f"at most {size / 1e9:.1f} GB from {where}, less what is cached"
