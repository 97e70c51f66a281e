"""`drm doctor`: what this machine has, whether drm works on it, and what to do where it does not."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_token

from drmcli.config import local_or_hub, resolve, spoken
from drmcli.data.cache import cache_root
from drmcli.errors import DrmError, InputError
from drmcli.generator import pick_device, pick_dtype
from drmcli.hub import explained, quiet_hub
from drmcli.reward import RewardModel
from drmcli.run import environment

GIB = 2**30
ROOM = 60
"""GiB of disk that a real model, its cache of encoded pictures and a few checkpoints take."""


@dataclass(frozen=True)
class Check:
    """One line of the findings."""

    what: str
    state: str
    """OK, WARN (works, but look at it) or FAIL (drm does not work here, or not with this preset)."""
    found: str
    remedy: str = ""


def examine(*, device: str, preset: str) -> dict[str, Any]:
    """Versions, findings by name, and the checks behind them. What fails is a finding, not an error."""
    known = environment("", None)
    checks: list[Check] = []
    try:
        where = pick_device(device)
        checks.append(_device(where))
    except InputError as error:
        where = torch.device("cpu")
        checks.append(Check("device", "FAIL", error.message, error.hint))
    real = preset != "tiny"
    checks += [_memory(), _disk(real), _hub(), *_models(preset), _forward(preset, where)]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found = f"{torch.cuda.get_device_name(i)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        busy = free < total / 2
        remedy = "other processes hold its memory: see nvidia-smi" if busy else ""
        checks.append(Check(f"cuda:{i}", "WARN" if busy else "OK", found, remedy))
    return {
        "versions": known["versions"] | {"python": known["python"]},
        **{check.what: check.found for check in checks},
        "ok": all(check.state != "FAIL" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _device(where: torch.device) -> Check:
    found = f"{where}, {pick_dtype('auto', where)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads".replace(
        "torch.", ""
    )
    if where.type == "cpu" and os.path.exists("/dev/nvidiactl") and not torch.cuda.is_available():
        remedy = (
            f"a GPU is there, but torch {torch.__version__} cannot use it: install a CUDA build that fits its driver"
        )
        return Check("device", "FAIL", found, remedy)
    if where.type == "cpu":
        return Check("device", "WARN", found, "enough for the embedded world; a real model needs a CUDA GPU")
    return Check("device", "OK", found)


def _memory() -> Check:
    if not hasattr(os, "sysconf"):
        return Check("memory", "WARN", "not known on this system")
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Check(
        "memory", "OK" if size >= 4 else "WARN", f"{size:.1f} GiB", "" if size >= 4 else "close other programs"
    )


def _disk(real: bool) -> Check:
    cache = cache_root(None)
    place = next(p for p in (cache, *cache.parents, Path.cwd()) if p.exists())
    free = shutil.disk_usage(place).free / GIB
    needed = ROOM if real else 1
    remedy = "" if free >= needed else f"make room for {needed} GiB, or set DRM_CACHE and HF_HOME to another disk"
    return Check("disk", "OK" if free >= needed else "WARN", f"{free:.0f} GiB free for {cache}", remedy)


def _hub() -> Check:
    found = f"{'logged in' if get_token() else 'not logged in'}, cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", "WARN", found + ", offline", "unset HF_HUB_OFFLINE to download models")
    return Check(
        "hub", "OK" if get_token() else "WARN", found, "" if get_token() else "hf auth login, for gated models"
    )


def _models(preset: str) -> list[Check]:
    """Licence of, and access to, the models that a preset names."""
    checks = []
    for command, key in (("sample", "generator"), ("score", "reward")):
        ref = getattr(resolve(command, preset=preset), key)
        if not ref:
            checks.append(Check(key, "WARN", f"preset {preset} has none", f"train one, and name it with --{key}"))
            continue
        try:
            where = local_or_hub(ref, f"--{key}")
            if Path(where).is_dir():
                checks.append(Check(key, "OK", spoken(ref)))
                continue
            with explained(ref, f"--{key}"), quiet_hub():
                info = HfApi().model_info(where)
                HfApi().auth_check(where)
            licence = (
                (info.card_data or {}).get("license_name") or (info.card_data or {}).get("license") or "not stated"
            )
            checks.append(Check(key, "OK", f"{ref}: you have access; licence {licence}"))
        except DrmError as error:
            offline = constants.HF_HUB_OFFLINE or "cannot be reached" in error.message
            checks.append(Check(key, "WARN" if offline else "FAIL", error.message, error.hint))
    return checks


def _forward(preset: str, where: torch.device) -> Check:
    """Scores of plain pictures by the preset's reward model, or by the embedded one where the preset has none."""
    from PIL import Image

    ref = resolve("score", preset=preset).reward
    named = preset if ref else "tiny"
    try:
        model = RewardModel.from_pretrained(
            ref or resolve("score", preset="tiny").reward, device=where, dtype=pick_dtype("auto", where)
        )
        pictures, prompts = [Image.new("RGB", (64, 64), (200, 40, 40))] * 8, ["a large red square in the center"] * 8
        model.score_images(pictures, prompts)
        began = time.monotonic()
        model.score_images(pictures, prompts, noise_samples=4)
        return Check(
            "forward pass", "OK", f"works, {8 / (time.monotonic() - began):.0f} pictures/s with preset {named}"
        )
    except DrmError as error:
        return Check("forward pass", "FAIL", f"failed: {error.message}", error.hint)
