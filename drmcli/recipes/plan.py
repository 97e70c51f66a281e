"""What `--dry-run` can tell of a generator without loading its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from drmcli.config import local_or_hub
from drmcli.families import family_of
from drmcli.families.base import Family
from drmcli.generator import denoiser_config, quiet_libraries, read_index
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

    family: Family

    def beside(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the pipeline's other models, by name."""
        with explained(self.where, "--generator"), quiet_libraries():
            index = read_index(self.where, self.revision)
            names = [name for name in index if name != self.family.denoiser and name not in self.family.optional]
            return component_bytes(self.where, index, names, dtype, revision=self.revision)


def describe_generator(config: Any) -> Known:
    """Read the configs of config.generator: a few kilobytes, also from the hub."""
    where = local_or_hub(config.generator, "--generator")
    with explained(config.generator, "--generator"), quiet_libraries():
        index = read_index(where, config.revision)
        family = family_of(str(index.get("_class_name")), f"--generator {config.generator}")
        denoiser = denoiser_config(family, where, config.revision)
        library, kind = index["vae"]
        vae = getattr(import_module(library), kind).load_config(where, subfolder="vae", revision=config.revision)
        tokens = family.text_tokens(config.max_sequence_length, _tokenizer_length(where))
    factor = family.vae_factor(vae)
    return Known(
        transformer={k: v for k, v in denoiser.items() if not k.startswith("_")},
        vae_factor=factor,
        image_size=family.image_size(denoiser, factor),
        prompt_tokens=tokens,
        download=_download(where, config.revision),
        where=where,
        revision=config.revision,
        family=family,
    )


def _tokenizer_length(where: str) -> int:
    """Tokens that the pipeline's first tokenizer reads at most; CLIP's 77 where its config is not at hand."""
    file = Path(where) / "tokenizer" / "tokenizer_config.json"
    length = json.loads(file.read_text(encoding="utf-8")).get("model_max_length") if file.is_file() else None
    return int(min(length or CLIP_TOKENS, 10_000))


def _download(where: str, revision: str | None) -> str:
    if Path(where).is_dir():
        return "nothing"
    try:
        files = HfApi().model_info(where, revision=revision, files_metadata=True).siblings or []
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, OSError):
        return "not known: the hub cannot be reached"
    size = sum(f.size or 0 for f in files if "/" in f.rfilename and f.rfilename.endswith(".safetensors"))
    return f"at most {size / 1e9:.1f} GB from {where}, less what is cached"
