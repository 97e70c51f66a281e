"""LoRAs as people have them: of diffusers, of PEFT, of kohya's trainers; a folder, one file of a folder, or a file.

What a file holds is told from its keys. All are brought to one form, tensors by the denoiser's own module names with a scale each, checked
against the denoiser, and put on through diffusers. Strength: alpha / rank, from the file's own adapter metadata, an adapter_config.json,
or alphas beside the tensors; of LoRAs that an older drm saved without any of these from its run's config.yaml or the card.
Without a word about alpha it is the rank, as for diffusers.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, list_repo_files
from safetensors import safe_open
from torch import Tensor, nn

from drmcli.config import local_or_hub, package_path
from drmcli.data.text import is_number, parse_json, parse_yaml, read_text, short
from drmcli.errors import InputError
from drmcli.hub import explained
from drmcli.loading import finite

if TYPE_CHECKING:
    from drmcli.generator import Generator

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file."""
PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.", "model.")
"""What may stand before the denoiser's own module names."""
ENDINGS = {
    ".lora_A.default.weight": "down", ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.default.weight": "up", ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
"""Ends of keys, and what stands there: down [rank, in], up [out, rank], or a scale."""
AGAIN = "download or train it again"


def load_lora(generator: Generator, ref: str, flag: str = "--lora") -> None:
    """Put a LoRA on a generator's denoiser.

    Raises InputError for a file that is not one, is another model's, or holds parts that drm leaves out; MissingError where it is
    not there.
    """
    with explained(ref, flag):
        file = find_file(ref, flag)
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    denoiser = generator.transformer
    parts = by_module(tensors, denoiser, type(generator.pipe).__name__, f"{flag} {ref}")
    ranks = {name: len(part["down"]) for name, part in parts.items()}
    alphas = {name: float(part["alpha"].float()) for name, part in parts.items() if "alpha" in part}
    if not alphas:
        alphas = alphas_beside(file, metadata, generator.family.denoiser, ranks, f"{flag} {ref}")
    state = {
        f"{name}.lora_{side}.weight": _computable(part[key])
        for name, part in parts.items()
        for side, key in (("A", "down"), ("B", "up"))
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    full = {name: alphas.get(name, float(ranks[name])) for name in parts}
    alpha = Counter(full.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(parts),
        "rank_pattern": {f"^{re.escape(n)}$": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}$": a for n, a in full.items() if a != alpha},
        "bias": "none",
    }
    with explained(ref, flag):
        denoiser.load_lora_adapter(state, prefix=None, metadata=config)


def find_file(ref: str, flag: str) -> Path:
    """The one file of a LoRA: a file, FOLDER/name.safetensors, OWNER/REPOSITORY/name.safetensors, or the only one of a folder.

    Raises InputError where there is none, or several; MissingError where the folder or file is not there.
    """
    ref = os.path.expanduser(ref)
    what, path = f"{flag} {ref}", Path(package_path(ref))
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{what}: not a .safetensors file", hint="drm reads weights from safetensors only")
        return path
    if (
        ref.endswith(".safetensors")
        and ref.count("/") == 2
        and not ref.startswith((".", "/", "~"))
        and not path.parent.is_dir()
    ):
        repo, _, name = ref.rpartition("/")
        return Path(hf_hub_download(repo, name))
    where = local_or_hub(ref, flag)
    local = Path(where).is_dir()
    names = [f.name for f in Path(where).iterdir()] if local else list_repo_files(where)
    found = sorted(name for name in names if name.endswith(".safetensors"))
    named = [name for name in found if name in NAMES]
    if len(named) == 1:
        found = named
    if not found:
        hint = "give the `lora` folder of a grpo run, or a LoRA's file"
        raise InputError(f"{what}: holds no .safetensors file", hint=hint)
    if len(found) > 1:
        listed = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise InputError(f"{what}: holds {len(found)} LoRAs: {listed}", hint=f"name one: {ref.rstrip('/')}/{found[-1]}")
    return Path(where) / found[0] if local else Path(hf_hub_download(where, found[0]))


def by_module(
    tensors: dict[str, Tensor], denoiser: nn.Module, pipeline: str, what: str
) -> dict[str, dict[str, Tensor]]:
    """`down` [rank, in], `up` [out, rank] and, where the file has it, `alpha` by the denoiser's module names.

    Raises InputError for keys of other models, wrong shapes and numbers that are not finite.
    """
    modules = {name: m for name, m in denoiser.named_modules() if getattr(m, "weight", None) is not None}
    flat = {name.replace(".", "_"): name for name in modules}
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        end = next((e for e in ENDINGS if key.endswith(e)), "")
        name = _own_name(key.removesuffix(end), modules, flat) if end else None
        if name is None:
            strange.append(key)
        else:
            parts.setdefault(name, {})[ENDINGS[end]] = tensor
    if strange:
        texts = [k for k in strange if k.startswith(("text_encoder", "lora_te", "te_"))]
        if len(texts) == len(strange) and parts:
            raise InputError(
                f"{what}: changes the text encoders too ({texts[0]}), which drm leaves as they are",
                hint="use a LoRA of the denoiser alone, or save the merged pipeline and give it as --generator",
            )
        share = f"{len(strange)} of {len(tensors)} tensors" if parts else "its tensors"
        raise InputError(
            f"{what}: {share} belong to another model than this {pipeline}, the first is {strange[0]}",
            hint="use a LoRA that was trained on this pipeline",
        )
    for name, part in parts.items():
        _check_part(name, part, modules[name].weight, what)
    if not parts:
        raise InputError(
            f"{what}: holds no weights for the denoiser", hint="use a LoRA that was trained on this pipeline"
        )
    return parts


def _check_part(name: str, part: dict[str, Tensor], weight: Tensor, what: str) -> None:
    """Raises InputError unless `down` and `up` are there, fit the weights of their module and are finite, and an alpha is a number."""
    if not {"down", "up"} <= part.keys():
        raise InputError(f"{what}: half of the LoRA of {name} is missing", hint=AGAIN)
    down, up = part["down"], part["up"]
    fits = down.ndim >= 2 <= up.ndim and down.shape[1:] == weight.shape[1:] and up.shape[0] == weight.shape[0]
    if not fits or up.shape[1] != down.shape[0]:
        raise InputError(
            f"{what}: {name} has shapes {list(up.shape)} and {list(down.shape)} for weights of {list(weight.shape)}",
            hint="use a LoRA that was trained on this pipeline",
        )
    for tensor in (down, up):
        if not tensor.is_floating_point():
            raise InputError(f"{what}: the weights of {name} are {tensor.dtype}, which drm does not read", hint=AGAIN)
        if not finite(tensor):
            raise InputError(f"{what}: the weights of {name} are not finite", hint=AGAIN)
    alpha = part.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not finite(alpha)):
        raise InputError(f"{what}: the alpha of {name} is not one finite number", hint=AGAIN)


def _computable(tensor: Tensor) -> Tensor:
    """A tensor in a number format that layers compute in: those of eight bits are for keeping alone."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _own_name(key: str, modules: dict[str, nn.Module], flat: dict[str, str]) -> str | None:
    """The denoiser's module that a key without its ending names, or None: kohya writes underscores for dots."""
    name = key
    while name not in modules:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    if name in modules:
        return name
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
        if key.startswith(prefix):
            return flat.get(key.removeprefix(prefix))
    return None


def alphas_beside(
    file: Path, metadata: dict[str, str], prefix: str, ranks: dict[str, int], what: str
) -> dict[str, float]:
    """Alphas by module from what stands beside the tensors; empty where nobody says one."""
    if "lora_adapter_metadata" in metadata:
        source = f"{what}: its metadata lora_adapter_metadata"
        return _of_config(_object(metadata["lora_adapter_metadata"], source, f"{prefix}."), ranks, source)
    config = file.with_name("adapter_config.json")
    if config.is_file():
        source = f"{what}: its adapter_config.json"
        return _of_config(_object(read_text(config, name=source, hint=AGAIN), source), ranks, source)
    for folder in (file.parent, file.parent.parent):  # a run's `lora` folder, or a checkpoint in it
        values = _of_others(folder / "config.yaml", lambda text: parse_yaml(text, "config.yaml"))
        alpha = values.get("lora_alpha") if isinstance(values, dict) else None
        if isinstance(alpha, int) and is_number(alpha):
            return dict.fromkeys(ranks, float(alpha))
    said = _of_others(
        file.with_name("README.md"), lambda text: re.search(r"A LoRA of rank \d+, alpha (\d{1,9})\b", text)
    )
    return dict.fromkeys(ranks, float(said[1])) if said else {}


def _of_others(file: Path, read: Callable[[str], Any]) -> Any:
    """What a file beside a LoRA says; None where it is not there or not readable: files of these names may be anybody's."""
    if not file.is_file():
        return None
    try:
        return read(read_text(file))
    except InputError:
        return None


def _object(text: str, source: str, prefix: str = "") -> dict[str, Any]:
    """A JSON object, its keys without the prefix. Raises InputError, beginning with `source`, for anything else."""
    values = parse_json(text, source, hint=AGAIN)
    if not isinstance(values, dict):
        raise InputError(f"{source} is no JSON object", hint=AGAIN)
    return {key.removeprefix(prefix): value for key, value in values.items()}


def _of_config(config: dict[str, Any], ranks: dict[str, int], source: str) -> dict[str, float]:
    """Alphas by module of a PEFT config. Raises InputError, beginning with `source`, for one that is damaged or of no plain LoRA."""
    for kind in ("use_dora", "modules_to_save"):
        if config.get(kind):
            raise InputError(f"{source} asks for {kind}", hint="use a plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{source}: alpha_pattern is no JSON object", hint=AGAIN)
    said = {"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {}
    for key, value in (said | {f"alpha_pattern of {name}": a for name, a in patterns.items()}).items():
        if not is_number(value):
            raise InputError(f"{source}: {key} must be a finite number, got {short(value)}", hint=AGAIN)
    compiled = []
    for pattern, alpha in patterns.items():
        try:
            compiled.append((re.compile(rf"(.*\.)?({pattern})"), alpha))
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{source}: alpha_pattern {short(pattern)} is no pattern: {error}", hint=AGAIN) from None
    alphas = {}
    for name, rank in ranks.items():
        alpha = next((a for pattern, a in compiled if pattern.fullmatch(name)), config.get("lora_alpha", rank))
        alphas[name] = float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
    return alphas
