"""Values in a pipeline's configs that are used late: looked at when it is loaded, not after all steps.

The libraries take a config as it is. A number that is none there would only fail where it is first computed with, in a line that names
no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from drmcli.data.text import cut, is_number, short
from drmcli.errors import InputError
from drmcli.hub import AGAIN

if TYPE_CHECKING:
    from drmcli.generator import Generator

LARGEST = 65_536
"""Pixels on a picture's side, as for --height."""
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What computing with values of other kinds raises."""


def checked(generator: Generator, components: Sequence[str], what: str) -> Generator:
    """The generator itself. Raises InputError, beginning with `what` and the file, for values that drm could not compute with.

    components: those that are loaded.
    """
    checks = [(f"{generator.family.denoiser}/config.json", _denoiser)]
    if "vae" in components:
        checks.append(("vae/config.json", _vae))
    if "text" in components:
        checks += [("its text encoders", _text_encoders), ("its tokenizers", _tokenizers)]
    if "transformer" in components:
        checks.append(("scheduler/scheduler_config.json", _scheduler))
    for file, check in checks:
        try:
            check(generator)
        except (*WRONG, RuntimeError) as error:
            raise InputError(f"{what}: {file}: {cut(str(error), 200)}", hint=AGAIN) from error
    return generator


def _denoiser(generator: Generator) -> None:
    family, config = generator.family, generator.model_config
    family.guides(config, 2.0)
    family.largest_side(config, generator.factor)
    sizes = {
        "blocks": family.depth(config),
        "latent channels": family.channels(config),
        "pixels a token": family.patch(config),
        "pixels on a side": generator.image_size,
    }
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST:
            raise ValueError(f"makes {size} {name}")


def _vae(generator: Generator) -> None:
    family, config = generator.family, generator.pipe.vae.config
    _check_sizes("", {size: config.get(size) for size in ("layers_per_block", "norm_num_groups")})
    channels = family.channels(generator.model_config)
    values = {name: config[name] for name in family.vae_values if name in config}
    if config.get("shift_factor") is not None:
        values["shift_factor"] = config["shift_factor"]
    for name, value in values.items():
        several = isinstance(value, list | tuple)
        if several and len(value) != channels:
            raise ValueError(f"{name} holds {len(value)} numbers for {channels} channels")
        divides = name in ("scaling_factor", "latents_std")
        for number in value if several else [value]:
            if not is_number(number) or (divides and not number):
                kind = "a finite number other than 0" if divides else "a finite number"
                raise ValueError(f"{name} must be {kind}, got {short(number)}")


def _text_encoders(generator: Generator) -> None:
    for name in generator.family.text:
        config = getattr(getattr(generator.pipe, name, None), "config", None)
        sizes = {size: getattr(config, size, None) for size in ("num_hidden_layers", "num_attention_heads")}
        _check_sizes(f"{name}: ", sizes)
        end = getattr(config, "eos_token_id", None)
        if getattr(config, "model_type", "") == "clip_text_model" and not isinstance(end, int):
            raise ValueError(f"{name}: eos_token_id must be a number, got {short(end)}")


def _tokenizers(generator: Generator) -> None:
    for name in generator.family.text:
        tokenizer = getattr(generator.pipe, name, None)
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        length = getattr(tokenizer, "model_max_length", None)
        if getattr(tokenizer, "pad_token", "") is None:
            raise ValueError(f"{name}: has no pad token")
        if length is not None and not (is_number(length) and length >= 1):
            raise ValueError(f"{name}: model_max_length must be a number above 0, got {short(length)}")


def _scheduler(generator: Generator) -> None:
    if not torch.isfinite(generator.sigmas(2)).all():
        raise ValueError("makes noise levels that are not finite")


def _check_sizes(where: str, sizes: dict[str, Any]) -> None:
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{where}{name} must be above 0, got {size}")
