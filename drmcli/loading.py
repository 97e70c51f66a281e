"""Weights from safetensors files into a model that has none yet: each tensor is read once, in its place, in the wanted number format.

A model is first built without weights (`skeleton`), cut if it is to be cut, and filled with what it still has a place for (`fill`): what
was cut away is never read, and there is no second copy of anything. Files are read, not mapped: mapped pages would count beside the
tensors that are made of them until the file is closed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from drmcli.errors import InputError
from drmcli.fingerprints import at_hand
from drmcli.hub import AGAIN

READERS = min(4, os.cpu_count() or 1)
"""Tensors that are read at once: a read from the page cache keeps one core busy, a GPU's transfer another."""
NAME = "diffusion_pytorch_model"
"""Of a denoiser's files, without endings, as diffusers has it."""


# --- files ------------------------------------------------------------------------------------------------------------


def variant_of(folder: str, name: str) -> str | None:
    """The number format in the names of a part's weights (`*.fp16.safetensors`), where there are no others."""
    files = [f.name for f in (Path(folder) / name).glob("*.safetensors")]
    found = {v for f in files for v in ("fp16", "bf16", "fp8", "non_ema") if f".{v}." in f or f".{v}-0" in f}
    plain = [f for f in files if not any(f".{v}" in f for v in found)]
    return sorted(found)[0] if found and not plain else None


def denoiser_files(where: str, name: str, revision: str | None) -> list[Path]:
    """The files with a denoiser's weights, of a folder or fetched from the hub: one, or the shards that its index names.

    Raises InputError for one that holds none.
    """
    home = at_hand(where, [name], revision)
    folder, variant = Path(home) / name, variant_of(home, name)
    ending = f".{variant}" if variant else ""
    names = [f"{NAME}{ending}.safetensors"]
    for index in (f"{NAME}.safetensors.index{ending}.json", f"{NAME}{ending}.safetensors.index.json"):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            break
    files = [folder / file for file in names]
    for file in files:
        if not file.is_file():
            raise InputError(f"{where}: {name} has no {file.name}", hint="drm reads weights from safetensors only")
    return files


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def opened(files: Sequence[Path]) -> Iterator[dict[str, Stored]]:
    """The tensors of these files by name, none of which is read yet; readable inside."""
    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
            for name in file.offset_keys():
                found[name] = Stored(tuple(file.get_slice(name).get_shape()), _reader(file, name))
        yield found


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


# --- models -----------------------------------------------------------------------------------------------------------


def skeleton(make: Callable[[], Any]) -> Any:
    """The model that `make` makes, its weights on the meta device. Tables that its constructor computes and no file holds are real."""
    with torch.device("meta"):
        model = make()
    if not _computes(model):
        return model
    with weightless():
        return make()


@contextmanager
def weightless() -> Iterator[None]:
    """Inside, parameters that modules are given are on the meta device."""
    hook: Any = _weightless  # PyTorch's annotation forgets that what it returns takes the parameter's place
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _weightless(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    if parameter.is_meta:  # as it is: one that two modules share stays one
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def _computes(model: nn.Module) -> bool:
    """Does a model on the meta device hold tensors that are in no file?"""
    saved = model.state_dict().keys()
    if any(name not in saved for name, _ in model.named_buffers()):
        return True
    plain = (v for m in model.modules() for k, v in vars(m).items() if k not in ("_parameters", "_buffers", "_modules"))
    return any(
        isinstance(t, Tensor) for value in plain for t in (value if isinstance(value, list | tuple) else [value])
    )


def fill(
    model: nn.Module,
    tensors: Mapping[str, Stored],
    where: str,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    device: torch.device | str = "cpu",
    only: Collection[str] | None = None,
) -> None:
    """Give a model the tensors that it has a place for, in this number format (one, or by name), on this device. Others are not read.

    only: the names that are looked at (None: all). Raises InputError, beginning with `where`, for missing, misshapen and non-finite ones.
    """
    places = {name: place for name, place in model.state_dict().items() if only is None or name in only}
    if missing := sorted(places.keys() - tensors.keys()):
        raise InputError(f"{where} lacks the weights of {missing[0]}", hint=AGAIN)
    for name, place in places.items():
        if tensors[name].shape != tuple(place.shape):
            raise InputError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, not {list(place.shape)}",
                hint="its config.json and weights do not belong together; download or build the model again",
            )

    def read(name: str) -> Tensor:
        tensor = tensors[name].read()
        if not finite(tensor):
            raise InputError(f"{where}: the weights of {name} are not finite", hint=AGAIN)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype(name) if callable(dtype) else dtype)
        return tensor.to(device)

    names = [name for name in tensors if name in places]
    with ThreadPoolExecutor(READERS) as pool:
        for name, tensor in zip(names, pool.map(read, names)):
            _assign(model, name, tensor)


def fill_at_random(model: nn.Module, *, device: torch.device | str, dtype: Callable[[str], torch.dtype]) -> None:
    """Give a model without weights normal ones of deviation 0.02, in a number format by name; what holds whole numbers, zeros.

    A parameter of several names, as of tied embeddings, is one tensor, in the format of its first name.
    What is on no meta device stays as it is.
    """
    rng = torch.Generator(device).manual_seed(0)
    shared = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    made: dict[Any, Tensor] = {}
    for name, place in model.state_dict().items():
        if not place.is_meta:
            continue
        key = shared.get(name, name)
        if key not in made:
            kind = dtype(name) if place.is_floating_point() else place.dtype
            made[key] = torch.zeros(place.shape, dtype=kind, device=device)
            if place.is_floating_point():
                made[key].normal_(std=0.02, generator=rng)
        _assign(model, name, made[key])
    model.to(device)  # tables that the constructor computed


def lend(whole: nn.Module, model: nn.Module) -> None:
    """Give a model without weights those of a whole one: the tensors themselves, so that there is one copy in memory.

    A LoRA on either stays its own. What changes the whole one's weights in place changes the other.
    """
    lent = base_weights(whole)
    for name in model.state_dict():
        _assign(model, name, lent[name])


def borrow(model: nn.Module, whole: nn.Module) -> int:
    """Use a whole model's tensors for those of a model that are equal to them. Returns the bytes that are needed no longer."""
    lent, saved = base_weights(whole), 0
    for name, mine in model.state_dict().items():
        theirs = lent.get(name.replace(".base_layer.", "."))
        if ".lora_" in name or theirs is None or theirs.data_ptr() == mine.data_ptr():
            continue
        if (theirs.dtype, theirs.device, theirs.shape) == (mine.dtype, mine.device, mine.shape) and theirs.equal(mine):
            _assign(model, name, theirs)
            saved += mine.nbytes
    return saved


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors without its LoRA's, by the names that they have where there is none."""
    return {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if ".lora_" not in n}


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    module = model.get_submodule(".".join(path))
    if last in module._parameters:
        old = module._parameters[last]
        module._parameters[last] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
    else:
        module._buffers[last] = tensor


def finite(tensor: Tensor) -> bool:
    """Are all numbers of a tensor finite? Its extremes tell: one pass, and no mask of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # eight bits: no extremes of these on a CPU
        tensor = tensor.float()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
