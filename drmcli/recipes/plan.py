"""What `--dry-run` can tell of a generator without loading its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors

from drmcli.config import local_or_hub
from drmcli.data.text import parse_yaml
from drmcli.errors import MissingError
from drmcli.families import family_of
from drmcli.families.base import Family, check_side, latent_shape
from drmcli.hub import explained
from drmcli.memory import cast, component_maker
from drmcli.parts import denoiser_config, part_class, quiet_libraries, read_index

CLIP_TOKENS = 77
"""Tokens of CLIP where the tokenizer's config does not say."""


@dataclass
class Known:
    """Configs of a generator's parts."""

    ref: str
    """As it was asked for."""
    transformer: dict[str, Any]
    vae_factor: int
    image_size: int
    """Its own side in pixels."""
    prompt_tokens: int
    max_sequence_length: int
    download: str
    """What a run would fetch, in words."""
    where: str
    revision: str | None
    family: Family

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """As `Generator.latent_shape`."""
        return latent_shape(self.family, self.transformer, self.vae_factor, height, width)

    def latent_side(self, resolution: int | None) -> int:
        """Side of the latents of square pictures, of the model's own size for None. Raises InputError for one that it cannot take."""
        side = resolution or self.image_size
        check_side("--resolution", side, self.family, self.transformer, self.vae_factor)
        return side // self.vae_factor

    def makers(self, names: tuple[str, ...] | None = None) -> dict[str, Callable[[], Any]]:
        """What makes the pipeline's models beside the denoiser (or those of `names`) from their configs, by name."""
        with explained(self.ref, "--generator"), quiet_libraries():
            index = read_index(self.where, self.revision)
            wanted = [name for name in index if name != self.family.denoiser and name not in self.family.optional]
            made = {
                name: component_maker(self.where, index, name, revision=self.revision)
                for name in wanted
                if names is None or name in names
            }
            return {name: make for name, make in made.items() if make is not None}

    def parts(self, dtype: torch.dtype, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """These models on the meta device."""
        makers = self.makers(names)
        with quiet_libraries(), torch.device("meta"):
            return {name: cast(make(), dtype) for name, make in makers.items()}

    def beside(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the pipeline's other models, by name."""
        return {
            name: sum(p.numel() for p in part.parameters()) * dtype.itemsize for name, part in self.parts(dtype).items()
        }


def describe_generator(config: Any) -> Known:
    """Read the configs of config.generator: a few kilobytes, also from the hub."""
    return describe(config.generator, config.revision, config.max_sequence_length)


def describe(ref: str, revision: str | None, max_sequence_length: int, flag: str = "--generator") -> Known:
    """Read a pipeline's configs. Of a preset's that cannot be had they are those that ship with drm, and `download` says so.

    Raises MissingError or InputError, naming `flag`.
    """
    where = local_or_hub(ref, flag)
    try:
        return _read(ref, where, revision, max_sequence_length, flag)
    except MissingError as error:
        shipped = published_configs(ref)
        if shipped is None:
            raise
        known = _read(ref, shipped, None, max_sequence_length, flag)
        known.download = f"not known: {error.message}; planned with its published configs"
        return known


def _read(ref: str, where: str, revision: str | None, max_sequence_length: int, flag: str) -> Known:
    with explained(ref, flag), quiet_libraries():
        index = read_index(where, revision)
        family = family_of(str(index.get("_class_name")), f"{flag} {ref}")
        denoiser = denoiser_config(family, where, revision)
        kind: Any = part_class("vae", index.get("vae"), f"{flag} {ref}")
        vae = kind.load_config(where, subfolder="vae", revision=revision)
        tokens = family.text_tokens(max_sequence_length, _tokenizer_length(where))
    factor = family.vae_factor(vae)
    return Known(
        ref=ref,
        transformer={k: v for k, v in denoiser.items() if not k.startswith("_")},
        vae_factor=factor,
        image_size=family.image_size(denoiser, factor),
        prompt_tokens=tokens,
        max_sequence_length=max_sequence_length,
        download=_download(where, revision),
        where=where,
        revision=revision,
        family=family,
    )


def published(ref: str) -> dict[str, dict[str, Any]] | None:
    """The published configs of a preset's model by part, `index` for its model_index.json; None for a model that drm has none of."""
    text = (resources.files("drmcli.config") / "published.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, "published.yaml")["models"].get(ref)


@lru_cache
def published_configs(ref: str) -> str | None:
    """A folder with the published configs of a preset's model, kept while the process lives; None for a model that drm has none of."""
    parts = published(ref)
    if parts is None:
        return None
    home = tempfile.TemporaryDirectory(prefix="drmcli-")
    _KEPT.append(home)
    folder = Path(home.name)
    for name, config in parts.items():
        file = folder / "model_index.json" if name == "index" else folder / name / "config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


_KEPT: list[Any] = []


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


def as_set(settings: Any, memory: dict[str, Any]) -> int:
    """The bytes of a memory plan with the gradient checkpointing that is set, or while pictures are drawn where that is more."""
    kept = "total_checkpointed" if getattr(settings, "gradient_checkpointing", False) else "total"
    return int(max(memory[kept], memory.get("total_drawing", 0)))
