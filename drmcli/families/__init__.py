"""Kinds of text-to-image pipelines, one file each.

A family says what drm must know of one kind: see `base.Family`. To add one, write a file with an instance of a subclass and a line
in `FAMILIES`; or, from outside of this package, call `register` before anything is loaded (`examples/own_family.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from drmcli.errors import InputError

if TYPE_CHECKING:
    from drmcli.families.base import Family

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "StableDiffusionPipeline": "sdxl",
    "StableDiffusionXLPipeline": "sdxl",
}
"""The module of this folder for each pipeline class, as model_index.json names it. A module's family is its `FAMILY`."""

_registered: dict[str, Family] = {}


def register(pipeline: str, family: Family) -> None:
    """Let `family` serve all pipelines of this class name. It takes the place of one that drm knows by that name."""
    _registered[pipeline] = family


def family_of(pipeline: str, where: str = "--generator") -> Family:
    """The family of a pipeline class. Raises InputError, beginning with `where`, for a class that no family knows."""
    if pipeline in _registered:
        return _registered[pipeline]
    if pipeline not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *_registered}))
        raise InputError(
            f"{where}: holds a {pipeline}", hint=f"drm works with {known}; `drmcli.families.register` adds others"
        )
    return import_module(f"{__name__}.{FAMILIES[pipeline]}").FAMILY


def family_named(name: str, where: str = "--reward") -> Family:
    """The family of a saved reward model. Raises InputError, beginning with `where`, for a name that is not known."""
    for family in _registered.values():
        if family.name == name:
            return family
    if name not in FAMILIES.values():
        hint = "pip install --upgrade drmcli, or register the family before loading"
        raise InputError(f"{where}: of the family {name!r}, which this drm does not know", hint=hint)
    return import_module(f"{__name__}.{name}").FAMILY
