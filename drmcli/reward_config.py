"""What rebuilds a saved reward model around its weights, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from drmcli.errors import InputError

FORMAT = 1


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
    max_sequence_length: int = 256
    """Tokens of the T5 part of a prompt in training."""
    text_encoder_3: bool = True
    """Was T5 there in training?"""
    resolution: int | None = None
    """Side of the training images, pixels; None is the base's own."""
    drop_layers: int = 3
    """Blocks cut off at the end."""
    tap_layers: list[int] | None = None
    """Blocks whose image tokens the head reads; None is the last kept one."""
    head_width: int = 512
    """Width of the head."""
    head_pool: str = "mean"
    """Pooling over the grid: mean or attention."""
    backbone: str = "full"
    """full: the backbone's weights are saved here; lora, frozen: they are the base's."""
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_targets: list[str] | None = None
    """Modules that carry the LoRA; None is the family's own list."""
    guidance: float | None = None
    """The guidance scale that a guidance-distilled base is told; None is the family's own."""
    format: int = FORMAT
    """Version of this layout."""


def read_config(folder: Path, where: str) -> RewardConfig:
    """config.json of a saved reward model. Raises InputError when it is missing, damaged or of another kind."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{where}: holds no config.json", hint="give the `reward` folder of a train-reward run"
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: config.json is damaged: {error}", hint="train or download it again") from None
    known = {f.name for f in fields(RewardConfig)}
    if not isinstance(values, dict) or not {"base_model", "transformer"} <= values.keys() or not values.keys() <= known:
        raise InputError(
            f"{where}: config.json is not a reward model's", hint="give the `reward` folder of a train-reward run"
        )
    if values.get("format", FORMAT) > FORMAT:
        raise InputError(
            f"{where}: written by a newer drm (format {values['format']})", hint="pip install --upgrade drmcli"
        )
    return RewardConfig(**values)


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
