"""`drm doctor`: what this machine has and whether drm works on it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_token

from drmcli.config import resolve
from drmcli.data.cache import cache_root
from drmcli.errors import DrmError
from drmcli.generator import pick_device, pick_dtype
from drmcli.reward import RewardModel
from drmcli.run import environment


def examine(*, device: str, preset: str) -> dict[str, Any]:
    """Findings by name. A forward pass that fails is a finding, not an error."""
    where = pick_device(device)
    config = resolve("score", preset=preset)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cache = cache_root(None)
    disk = shutil.disk_usage(cache if cache.exists() else Path.home())
    findings: dict[str, Any] = {
        "versions": environment("", None)["versions"] | {"python": environment("", None)["python"]},
        "device": f"{where}, {pick_dtype('auto', where)}".replace("torch.", ""),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.1f} GiB of memory",
        "disk": f"{disk.free / 2**30:.0f} GiB free for {cache}",
        "hub": f"{'logged in' if get_token() else 'not logged in (`hf auth login`)'}, cache {constants.HF_HUB_CACHE}"
        + (", offline" if constants.HF_HUB_OFFLINE else ""),
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        findings[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    try:
        model = RewardModel.from_pretrained(config.reward, device=where, dtype=pick_dtype("auto", where))
        from PIL import Image

        pictures = [Image.new("RGB", (64, 64), (200, 40, 40))] * 8
        model.score_images(pictures, ["a large red square in the center"] * 8)
        began = time.monotonic()
        model.score_images(pictures, ["a large red square in the center"] * 8, noise_samples=4)
        findings["forward pass"] = f"works, {8 / (time.monotonic() - began):.0f} pictures/s with preset {preset}"
    except DrmError as error:
        findings["forward pass"] = f"failed: {error.message} ({error.hint})"
    return findings
