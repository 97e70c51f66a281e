"""Scorers without weights: the embedded world's judge and callables of the user's; and what is common to all of them.

Dimension letters: B pictures.
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.data.text import cut
from drmcli.errors import DrmError, InputError, RunError, is_out_of_memory
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
            scores = torch.as_tensor(found).detach()
            if scores.is_complex():
                raise TypeError("complex numbers")
            scores = scores.to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
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
    """The callable that `module:function` names; modules of the current folder are found.

    Raises InputError where there is none of that name. Whatever the module raises when it is imported, and the function when it is
    called, `sys.exit` included, becomes a RunError that names the file and the line; only Ctrl-C and a lack of memory are let through.
    """
    module_name, _, attribute = ref.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        with _theirs(ref, flag, importing=True):
            found: Any = import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        missing = getattr(error, "name", None) or module_name
        if missing.split(".")[0] != module_name.split(".")[0]:
            hint = f"install {missing.split('.')[0]}, which {module_name} imports"
        elif module_name.endswith(".py"):
            hint = f"write {module_name.removesuffix('.py').replace('/', '.')}:{attribute}, without .py"
        else:
            hint = f"known names are those of drmcli.scorers.NAMES; a module must lie in {here} or be installed"
        raise InputError(f"{flag} {ref}: there is no module {missing}", hint=hint) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        hint = "name a function that takes pictures and prompts and returns numbers"
        raise InputError(f"{flag} {ref}: {module_name} has no callable {attribute!r}", hint=hint)
    function = found

    def called(images: list[Image.Image], prompts: list[str]) -> Any:
        with _theirs(ref, flag):
            return function(images, prompts)

    return called


@contextmanager
def _theirs(ref: str, flag: str, *, importing: bool = False) -> Iterator[None]:
    """What the user's code raises is told as theirs, with the file and the line; `importing` lets through that a module is not there."""
    try:
        yield
    except (DrmError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        inner = [frame for frame in frames if not _is_foreign(frame.filename)]
        if importing and (
            isinstance(error, ModuleNotFoundError) or (isinstance(error, (ValueError, TypeError)) and not inner)
        ):
            raise
        if isinstance(error, SyntaxError) and error.filename:
            file, line = error.filename, error.lineno
        elif inner:
            file, line = inner[-1].filename, inner[-1].lineno
        else:
            file, line = ref.partition(":")[0], None
        place = Path(file).name + (f" line {line}" if line else "")
        what = "called sys.exit" if isinstance(error, SystemExit) else type(error).__name__
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        fact = f"{what}: {cut(said, 300)}" if said else what
        raise RunError(
            f"{flag} {ref}: {fact} ({place})", hint=f"mend {Path(file).name}, or leave {flag} {ref} out"
        ) from error


def _is_foreign(file: str) -> bool:
    """Whether a frame's file is of this package, the standard library or an installed package, and not the user's own."""
    if file.startswith("<"):
        return True
    path = Path(file).resolve()
    homes = (Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))
    return any(path.is_relative_to(home.resolve()) for home in homes)
