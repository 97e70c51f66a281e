"""The parts of a pipeline, from a folder or the hub: what its files say of them, and the parts with their weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import PreTrainedModel

from drmcli.data.text import short
from drmcli.errors import InputError
from drmcli.families.base import Family
from drmcli.fingerprints import at_hand, reach
from drmcli.hub import AGAIN, quiet_hub
from drmcli.kernels import PLAIN, Kernels
from drmcli.loading import denoiser_files, fill, finite, lend, opened, skeleton, variant_of
from drmcli.quantize import quantize

if TYPE_CHECKING:
    from drmcli.generator import Generator

TEXT = ("tokenizer", "text_encoder")
"""The encoders that no pipeline is without; a second and third may be left out."""


def sorted_parts(
    family: Family, kind: Any, index: dict[str, Any], components: Sequence[str], text_encoder_3: bool, what: str
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The names of a pipeline's parts, those that stay out (None each), and the classes of the models that are to be loaded.

    kind, index: the pipeline's class and its model_index.json; components: see `Generator`. Raises InputError, beginning with `what`,
    where the index lacks a part that is asked for, or names one that is none.
    """
    known = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in index.items() if name in known and isinstance(value, list | tuple)}
    absent: dict[str, Any] = {name: None for name, value in given.items() if not any(value)}
    absent |= {name: None for name in family.optional if name in given}
    if not text_encoder_3:
        absent |= {name: None for name in ("text_encoder_3", "tokenizer_3") if name in known}
    if "text" not in components:
        absent |= {name: None for name in family.text if name in known}
    if "vae" not in components:
        absent |= {"vae": None}
    if "transformer" not in components:
        absent |= {family.denoiser: None}
    asked = {"transformer": (family.denoiser,), "vae": ("vae",), "text": TEXT}
    for name in (name for component in components for name in asked[component]):
        if name in (family.denoiser, "vae", *family.text) and (name not in given or not any(given[name])):
            raise InputError(f"{what}: its model_index.json names no {name}", hint=AGAIN)
    wanted = {n: part_class(n, v, what) for n, v in given.items() if n not in absent}
    return list(given), absent, {n: part for n, part in wanted.items() if issubclass(part, torch.nn.Module)}


def part_class(name: str, entry: Any, what: str) -> type:
    """The class of a part by its entry in model_index.json, [library, class]. Raises InputError, beginning with `what`, for another."""
    try:
        library, kind = entry
        found = getattr(import_module(library), kind)
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise InputError(f"{what}: its model_index.json names {short(entry)} for {name}, which is no class", hint=AGAIN)
    return found


def load_parts(
    family: Family,
    wanted: dict[str, Any],
    where: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Any]:
    """The models of these classes, by name."""
    denoiser = family.denoiser
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    made = {name: load_part(part, where, name, **options) for name, part in wanted.items() if name != denoiser}
    return made | ({denoiser: load_denoiser(family, where, **options)} if denoiser in wanted else {})


def settle(pipe: Any, family: Family, device: torch.device | str, kernels: Kernels, *, whole: bool) -> None:
    """Have a pipeline's models computed by these kernels, frozen and on a device, and the pipeline quiet.

    whole: has the denoiser weights? Raises what `Kernels.use` does.
    """
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if whole:
        kernels.use(models[family.denoiser], family, device)
    quantize([part for name, part in models.items() if name in family.text], kernels.quantize, device)
    for name, module in models.items():
        module.eval().requires_grad_(False)
        if whole or name != family.denoiser:
            module.to(device)
    pipe.set_progress_bar_config(disable=True)


def read_index(where: str, revision: str | None) -> dict[str, Any]:
    """model_index.json of a pipeline's folder or hub id."""
    reach(where, revision)
    return dict(DiffusionPipeline.load_config(where, revision=revision))


def denoiser_config(family: Family, where: str, revision: str | None) -> dict[str, Any]:
    """A pipeline's denoiser's config, without weights."""
    kind: Any = family.denoiser_class
    return dict(kind.load_config(where, subfolder=family.denoiser, revision=revision))


def scheduler_facts(family: Family, where: str, revision: str | None) -> dict[str, Any] | None:
    """What a family must know of a pipeline's scheduler, or None."""
    if not family.scheduler_facts:
        return None
    config = DDIMScheduler.load_config(where, subfolder="scheduler", revision=revision)
    return {name: config[name] for name in family.scheduler_facts if name in config}


def load_part(
    kind: type, where: str, name: str, *, revision: str | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Any:
    """One model of a pipeline as its library loads it, from safetensors. Raises InputError when weights are missing or not finite.

    The libraries fill in random values for what is missing; a score from those would mean nothing.
    """
    straight: dict[str, Any] = {}
    if issubclass(kind, PreTrainedModel) and torch.device(device).type != "cpu":
        straight["device_map"] = {"": device}
    home = at_hand(where, [name], revision)
    model, found = kind.from_pretrained(  # type: ignore[attr-defined]
        home, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, variant=variant_of(home, name),
        **straight,
    )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{where}: {name} lacks the weights of {missing[0]}", hint=AGAIN)
    model.to(device)
    _refuse_broken(model, f"{where}: {name}")
    return model


def load_denoiser(
    family: Family, where: str, *, revision: str | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Any:
    """A pipeline's denoiser alone, with its weights."""
    return with_denoiser(lambda denoiser: denoiser, family, where, revision=revision, dtype=dtype, device=device)


def with_denoiser(
    make: Callable[[Any], Any],
    family: Family,
    where: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    beside: Generator | None = None,
    kernels: Kernels = PLAIN,
) -> Any:
    """What `make` makes of a pipeline's denoiser. It is given one without weights: what it cuts off is not read.

    beside: a loaded generator, whose denoiser's weights are used where they are the same, not loaded a second time.
    kernels: those that it will `use`; weights that it will keep in 8 bits are read to the CPU.

    Raises InputError for weights that are missing, misshapen or not finite.
    """
    if denoiser_config(family, where, revision).get("quantization_config"):  # in a form that diffusers alone can read
        kind = family.denoiser_class
        return make(load_part(kind, where, family.denoiser, revision=revision, dtype=dtype, device=device))
    denoiser = empty_denoiser(family, where, revision)
    made = make(denoiser)
    if beside is not None and beside.lends(family, where, revision, dtype, device, kernels.quantize):
        lend(beside.transformer, denoiser)
        denoiser.to(device).eval()
        return made
    kept = tuple(denoiser._keep_in_fp32_modules or ())
    with opened(denoiser_files(where, family.denoiser, revision)) as tensors:
        fill(
            denoiser, tensors, f"{where}: {family.denoiser}", device=kernels.home(device),
            dtype=lambda name: torch.float32 if set(kept) & set(name.split(".")) else dtype,
        )  # fmt: skip
    denoiser.to(kernels.home(device))  # what is in no file
    denoiser.eval()
    return made


def empty_denoiser(family: Family, where: str, revision: str | None) -> Any:
    """A pipeline's denoiser without weights: on the meta device, but for tables that no file holds."""
    kind: Any = family.denoiser_class
    config = denoiser_config(family, where, revision)
    return skeleton(lambda: kind.from_config(config))


def _refuse_broken(module: torch.nn.Module, where: str) -> None:
    """Weights that are not finite would only show as a useless score much later."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_meta and not finite(tensor):
            raise InputError(f"{where}: the weights of {name} are not finite", hint=AGAIN)


@contextmanager
def quiet_libraries():
    """Keep the progress bars and notices of diffusers, transformers and the hub's client out of the user's terminal while loading."""
    from transformers.utils import logging as transformers_logging

    libraries = diffusers_logging, transformers_logging
    before = [lib.get_verbosity() for lib in libraries]
    for lib in libraries:
        lib.set_verbosity(logging.CRITICAL)
        lib.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        for lib, level in zip(libraries, before):
            lib.set_verbosity(level)
