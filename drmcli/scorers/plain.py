"""Scorers without weights: the embedded world's judge and callables of the user's; and what is common to all of them.

Dimension letters: B pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.errors import InputError, RunError
from drmcli.tiny import world
from drmcli.tiny.judge import judge


@dataclass
class Scoring:
    """A scorer: a name and the function behind it, whose answer is brought into one form and checked."""

    name: str
    """As in `drmcli.scorers.NAMES`, or `module:function`."""
    flag: str
    """Of the command line, for errors."""
    function: Callable[[list[Image.Image], list[str]], Any]
    """B pictures and B prompts to B numbers."""
    check: Callable[[Sequence[str]], None] | None = None
    """Raises InputError for prompts that cannot be judged."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError for a prompt that the scorer cannot judge."""
        if self.check is not None:
            self.check(prompts)

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32 on the CPU. Raises RunError when they are not one finite number a picture."""
        assert len(images) == len(prompts)
        if not images:
            return torch.zeros(0)
        with torch.no_grad():
            found = self.function(list(images), list(prompts))
        try:
            scores = torch.as_tensor(found).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.flag} {self.name}: gave {type(found).__name__}, not numbers", hint="return one number a picture"
            ) from error
        if scores.shape != (len(images),):
            raise RunError(
                f"{self.flag} {self.name}: {list(scores.shape)} scores for {len(images)} pictures",
                hint="return one number a picture",
            )
        if not bool(torch.isfinite(scores).all()):
            raise RunError(
                f"{self.flag} {self.name}: a score is not finite", hint="try --dtype fp32, or look at the pictures"
            )
        return scores


def shapes(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """The judge's verdict [B] in [0, 1]; pictures of another size are resized. Raises InputError for other prompts than the world's."""
    side = (world.SIZE, world.SIZE)
    rgb = [image.convert("RGB") for image in images]
    fitted = [image if image.size == side else image.resize(side, Image.Resampling.BOX) for image in rgb]
    return judge(np.stack([np.asarray(image) for image in fitted]), prompts).score


def check_shapes(prompts: Sequence[str]) -> None:
    """Raises InputError for a prompt that is no caption of the embedded world."""
    for prompt in prompts:
        world.parse(prompt)


def named_callable(ref: str, flag: str) -> Callable[[list[Image.Image], list[str]], Any]:
    """The callable that `module:function` names; modules of the current folder are found. An error inside the module is let through."""
    module_name, _, attribute = ref.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: Any = import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        missing = getattr(error, "name", None) or module_name
        if missing.split(".")[0] != module_name.split(".")[0]:
            hint = f"install {missing.split('.')[0]}, which {module_name} imports"
        else:
            hint = f"known names are those of drmcli.scorers.NAMES; a module must lie in {here} or be installed"
        raise InputError(f"{flag} {ref}: there is no module {missing}", hint=hint) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        hint = "name a function that takes pictures and prompts and returns numbers"
        raise InputError(f"{flag} {ref}: {module_name} has no callable {attribute!r}", hint=hint)
    return found
