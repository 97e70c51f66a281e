"""What rebuilds a saved reward model around its weights, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from drmcli.config.schema import Finite, Layer, Pixels, Width
from drmcli.data.text import cut, short
from drmcli.errors import InputError
from drmcli.families import family_named

FORMAT = 1
Backbone = Literal["full", "lora", "frozen", "head"]


@dataclass
class RewardConfig:
    """Everything that rebuilds a reward model around its weights."""

    base_model: str
    """Pipeline that the backbone was cut from; its VAE and text encoders make the inputs."""
    transformer: dict[str, Any]
    """Config of the base's whole denoiser, as diffusers writes it."""
    family: str = "sd3"
    """Kind of the base's pipeline, see `drmcli.families`."""
    scheduler: dict[str, Any] | None = None
    """What the family must know of the base's scheduler; None where that is nothing."""
    base_revision: str | None = None
    """Revision of the base on the hub."""
    max_sequence_length: Annotated[int, Field(ge=0, le=4096)] = 256
    """Tokens of the T5 part of a prompt in training."""
    text_encoder_3: bool = True
    """Was T5 there in training?"""
    resolution: Pixels | None = None
    """Side of the training images, pixels; None is the base's own."""
    drop_layers: Layer = 3
    """Blocks cut off at the end."""
    tap_layers: Annotated[list[Layer], Field(min_length=1)] | None = None
    """Blocks whose image tokens the head reads; None is the last kept one."""
    head_width: Width = 512
    """Width of the head."""
    head_pool: Literal["mean", "attention"] = "mean"
    """Pooling over the grid: mean or attention."""
    backbone: Backbone = "full"
    """full: the backbone's weights are saved here; lora, frozen: they are the base's."""
    lora_rank: Width = 64
    lora_alpha: Width = 128
    lora_targets: list[str] | None = None
    """Modules that carry the LoRA; None is the family's own list."""
    guidance: Finite | None = None
    """The guidance scale that a guidance-distilled base is told; None is the family's own."""
    format: Annotated[int, Field(ge=1)] = FORMAT
    """Version of this layout."""


def read_config(folder: Path, where: str) -> RewardConfig:
    """config.json of a saved reward model. Raises InputError when it is missing, damaged or of another kind."""
    again = "train or download it again"
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{where}: holds no config.json", hint="give the `reward` folder of a train-reward run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: config.json is damaged: {cut(str(error))}", hint=again) from None
    rules = _rules()
    if not isinstance(values, dict) or not {"base_model", "transformer"} <= values.keys() <= rules.keys():
        raise InputError(
            f"{where}: config.json is not a reward model's", hint="give the `reward` folder of a train-reward run"
        )
    for key, value in values.items():
        try:
            rules[key].validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            fact = first["msg"].replace("Input should", "must").replace("should", "must")
            raise InputError(
                f"{where}: config.json: {key} {fact[0].lower()}{fact[1:]}, got {short(first['input'])}", hint=again
            ) from None
    config = RewardConfig(**values)
    if config.format > FORMAT:
        raise InputError(
            f"{where}: written by a newer drm (format {config.format})", hint="pip install --upgrade drmcli"
        )
    _check_layers(config, where, again)
    return config


@lru_cache
def _rules() -> dict[str, TypeAdapter[Any]]:
    """What each key may hold."""
    return {key: TypeAdapter(kind) for key, kind in get_type_hints(RewardConfig, include_extras=True).items()}


def _check_layers(config: RewardConfig, where: str, hint: str) -> None:
    """Raises InputError, beginning with `where`, unless the base's denoiser has the blocks that are cut off and tapped."""
    family = family_named(config.family, where)
    try:
        known = family.bound(config.scheduler or {})
        depth, channels, patch = (size(config.transformer) for size in (known.depth, known.channels, known.patch))
        if min(depth, channels, patch) < 1:
            raise ValueError(f"{depth} blocks, {channels} channels, patches of {patch}")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        fact = cut(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{where}: config.json: transformer and scheduler are not those of a pipeline of the family {family.name} ({fact})",
            hint=hint,
        ) from None
    tapped(config, depth, depth, source=f"{where}: config.json: ", hint=hint)


def tapped(config: RewardConfig, depth: int, there: int, *, source: str = "--set ", hint: str = "") -> list[int]:
    """The blocks that the head reads, of a base with `depth` of them and `there` at hand.

    Raises InputError, beginning with `source`, where the cut leaves none, or not these.
    """
    keep = depth - config.drop_layers
    if not 1 <= keep <= there:
        raise InputError(
            f"{source}drop_layers: {config.drop_layers} of {depth} blocks leave nothing",
            hint=hint or f"use 0 to {depth - 1}",
        )
    taps = [keep - 1] if config.tap_layers is None else list(config.tap_layers)
    if not taps or any(not 0 <= tap < keep for tap in taps):
        raise InputError(
            f"{source}tap_layers: {taps} for {keep} kept blocks", hint=hint or f"count from 0 to {keep - 1}"
        )
    return taps


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises InputError, beginning with `where`, for missing, surplus and misshapen weights."""
    problem = None
    if missing := sorted(expected.keys() - found.keys()):
        problem = f"lacks the tensor {missing[0]}"
    elif surplus := sorted(found.keys() - expected.keys()):
        problem = f"has a tensor {surplus[0]} that its config.json does not explain"
    elif odd := [name for name in expected if list(found[name]) != list(expected[name])]:
        problem = f"{odd[0]} has shape {list(found[odd[0]])}, not {list(expected[odd[0]])}"
    if problem:
        raise InputError(
            f"{where}: {problem}",
            hint="its config.json and weights do not belong together; train or download it again",
        )
