"""Published weights: where a file is, what it holds, and a model that is filled with all of it, or one clear error.

Only safetensors are read, and .pt or .pth files by PyTorch's weights-only reader, which builds tensors and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

from drmcli.errors import DrmError, InputError, MissingError
from drmcli.hub import explained
from drmcli.parts import quiet_libraries

UnpicklingError = torch.serialization.pickle.UnpicklingError
"""What PyTorch's weights-only reader raises for anything but tensors."""


CHECKED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Have transformers report what does not fit, so that the error is ours and names it; see `_ready`."""


@dataclass(frozen=True)
class Source:
    """Where a scorer's weights come from: the hub, or a folder with the same files."""

    name: str
    """Of the scorer."""
    folder: str | None
    """None: the hub and its local cache."""
    flag: str
    """Of the command line, for errors."""

    def __str__(self) -> str:
        """As the user gave it, with the flag."""
        return f"{self.flag} {self.name}={self.folder}" if self.folder else f"{self.flag} {self.name}"

    def file(self, repo: str, name: str) -> Path:
        """A weights file. A folder may hold it as .safetensors instead. Raises MissingError when it is not there."""
        if self.folder is None:
            return self._fetched(repo, name)
        choices = [name] if name.endswith(".json") else [name, str(Path(name).with_suffix(".safetensors"))]
        for choice in reversed(choices):
            if (self._folder() / choice).is_file():
                return self._folder() / choice
        wanted = " or ".join(dict.fromkeys(choices))
        hint = f"get it from https://huggingface.co/{repo}, or give {self.flag} {self.name} to fetch it"
        raise MissingError(f"{self}: the folder holds no {wanted}", hint=hint)

    def part(self, repo: str, marker: str, *, own: bool = False) -> str:
        """Where `from_pretrained` finds a model or tokenizer: a folder with the file `marker`, or the hub id `repo`.

        Looked for in the folder itself, then in a subfolder named like the repository; then, unless it is the scorer's `own` model, on
        the hub. Raises MissingError when it is in no place.
        """
        if self.folder is not None:
            for place in (self._folder(), self._folder() / repo.rpartition("/")[2]):
                if (place / marker).is_file():
                    return str(place)
            if own:
                hint = f"give the folder with the files of https://huggingface.co/{repo}"
                raise MissingError(f"{self}: the folder holds no {marker}", hint=hint)
        self._fetched(repo, marker)  # says exactly what is wrong when it cannot be had
        return repo

    def whole(self, repo: str, patterns: list[str], marker: str) -> Path:
        """The folder with all of a model's files, from the hub where none is named. Raises MissingError without the file `marker`."""
        if self.folder is None:
            with self.explained(repo):
                return Path(snapshot_download(repo, allow_patterns=patterns))
        if not (self._folder() / marker).exists():
            hint = f"get it from https://huggingface.co/{repo}, or give {self.flag} {self.name} to fetch it"
            raise MissingError(f"{self}: the folder holds no {marker}", hint=hint)
        return self._folder()

    def _fetched(self, repo: str, name: str) -> Path:
        with self.explained(repo):
            return Path(hf_hub_download(repo, name))

    def _folder(self) -> Path:
        assert self.folder is not None
        path = Path(self.folder).expanduser()
        if not path.is_dir():
            hint = f"give {self.flag} {self.name}=FOLDER with the published weights, or {self.flag} {self.name} to fetch them"
            raise MissingError(f"{self}: there is no such folder", hint=hint)
        return path

    @contextmanager
    def explained(self, repo: str | None = None):
        """Turn what loading can raise into one clear error: InputError for weights of another kind, MissingError for absent ones.

        repo: what is being fetched, for the hint.
        """
        ref = str(self).removeprefix(f"{self.flag} ")
        ours: DrmError | None = None
        try:
            with explained(ref, self.flag), quiet_libraries():
                try:
                    yield
                except DrmError as error:  # it has a hint of its own
                    ours = error
                    raise
        except DrmError as error:
            if error is ours:
                raise
            cause = error.__cause__
            if isinstance(error, MissingError) or (isinstance(cause, OSError) and (repo or not self.folder)):
                place = (
                    f"put it into {self.folder}"
                    if self.folder
                    else f"give {self.flag} {self.name}=FOLDER with its files"
                )
                hint = f"connect once to download {repo or 'the weights'}, or {place}"
                raise MissingError(error.message, hint=hint) from cause
            hint = f"check that these are the published weights of {self.name}, or download them again"
            raise InputError(error.message, hint=hint) from cause


class Weights(dict[str, Tensor]):
    """Tensors by name. One that is not there is an InputError that names it."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], source: Source):
        super().__init__(tensors)
        self.source = source
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Tensor:
        raise self.refused(f"the weights lack {key}")

    def below(self, prefix: str) -> Weights:
        """Those whose name starts with a prefix, without it. Raises InputError when there are none."""
        found = Weights(((k.removeprefix(prefix), v) for k, v in self.items() if k.startswith(prefix)), self.source)
        if not found:
            raise self.refused(f"the weights lack {prefix}*")
        return found

    def count(self, prefix: str) -> int:
        """How many blocks `prefix0.`, `prefix1.`, ... there are."""
        return len({key.removeprefix(prefix).partition(".")[0] for key in self if key.startswith(prefix)})

    def refuse_unused(self, *known: str) -> None:
        """Weights that were not asked for are of another model; `known` may be left."""
        if left := sorted(set(self) - self.used - set(known)):
            raise self.refused(f"the weights hold {left[0]}, which is not of this model")

    def refused(self, fact: str) -> InputError:
        hint = f"give the published weights of {self.source.name}"
        return InputError(f"{self.source}: {fact}", hint=hint)


def read(path: Path, source: Source) -> Weights:
    """Tensors of a .safetensors, .pt or .pth file; a `state_dict` inside is unwrapped."""
    if path.suffix == ".safetensors":
        return Weights(load_file(path).items(), source)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError) as error:
        hint = "convert it to .safetensors, or download it again"
        raise InputError(f"{source}: {path.name} holds more than tensors, or is damaged", hint=hint) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        hint = f"give the published weights of {source.name}"
        raise InputError(f"{source}: {path.name} holds no state dict", hint=hint)
    return Weights(found.items(), source)


def published(kind: Any, where: str, source: Source, device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model from a folder or hub id in Hugging Face layout, ready to score with."""
    model, found = kind.from_pretrained(where, dtype=dtype, use_safetensors=True, **CHECKED)
    return _ready(model, found["missing_keys"], found["mismatched_keys"], source, device)


def filled(
    kind: Any, config: Any, state: dict[str, Tensor], source: Source, device: torch.device, dtype: torch.dtype
) -> Any:
    """A transformers model of this config with these weights, which must be all of its own and no others, ready to score with."""
    state = {key: value.contiguous() for key, value in state.items()}
    model, found = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **CHECKED)
    strange = [*found["missing_keys"], *found["unexpected_keys"]]
    return _ready(model, strange, found["mismatched_keys"], source, device)


def _ready(
    model: nn.Module, strange: Iterable[str], mismatched: Iterable[Any], source: Source, device: torch.device
) -> nn.Module:
    """The libraries fill in random values for what is missing; a score from those would mean nothing."""
    names = [
        *strange,
        *(m if isinstance(m, str) else m[0] for m in mismatched),
    ]  # a mismatch: a name, or it and two shapes
    if names:
        hint = f"give the published weights of {source.name}"
        raise InputError(f"{source}: the weights do not fit at {min(names)}", hint=hint)
    return model.eval().requires_grad_(False).to(device)


def linear_layers(weights: Weights, width: int, device: torch.device) -> list[nn.Linear]:
    """Linear layers `N.weight`, `N.bias` in the order of N, in float32, from `width` features on.

    Raises InputError when one does not fit on the one before.
    """
    layers = []
    for number in sorted({key.partition(".")[0] for key in weights}, key=lambda text: (len(text), text)):
        weight, bias = weights[f"{number}.weight"], weights[f"{number}.bias"]
        if weight.shape != (len(bias), width):
            raise weights.refused(f"layer {number} is {list(weight.shape)}, and {width} features come in")
        width = len(bias)
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], width)
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer.eval().requires_grad_(False).to(device))
    return layers
