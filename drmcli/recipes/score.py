"""`drm score`: scores of pictures, or of saved latents, at one or more noise levels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drmcli import results
from drmcli.config import Score
from drmcli.data.images import FileImage, load_image
from drmcli.errors import InputError
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.reward import RewardModel, score_clean
from drmcli.run import Reporter, open_run


def run(config: Score, reporter: Reporter) -> dict[str, Any]:
    """Score what is named. Returns what summary.json holds."""
    prompts = matched_prompts(config)
    with open_run("score", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite scores again")
            return folder.finished
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        pictures = [i for i, name in enumerate(config.images) if not name.endswith(".safetensors")]
        loaded = {i: load_image(FileImage(config.images[i], Path(config.images[i]))) for i in pictures}
        saved = {i: read_latents(config.images[i]) for i in range(len(config.images)) if i not in loaded}
        reward = RewardModel.from_pretrained(config.reward, device=device, dtype=dtype, attention=config.attention)
        if config.resolution:
            reward.config.resolution = config.resolution
        rows: dict[int, list[dict[str, Any]]] = {}

        def add(i: int, sigmas: list[float], scores: Tensor) -> None:
            rows[i] = [
                {"image": config.images[i], "prompt": prompts[i], "sigma": s, "score": float(v)}
                for s, v in zip(sigmas, scores)
            ]

        for start in range(0, len(pictures), config.batch_size):
            some = pictures[start : start + config.batch_size]
            out = reward.score_images(
                [loaded[i] for i in some],
                [prompts[i] for i in some],
                sigmas=config.sigmas,
                noise_samples=config.noise_samples,
                seed=config.seed,
                batch_size=config.batch_size,
            )
            for i, scores in zip(some, out):
                add(i, config.sigmas, scores)
            folder.reporter.progress("score", len(rows), len(config.images))
        for i, (latents, sigma) in saved.items():
            cond = reward.generator().encode_prompts([prompts[i]])
            latents = latents.to(device)
            if sigma is None:  # clean: noised as a picture's would be
                scores = score_clean(
                    reward,
                    latents,
                    cond,
                    [config.images[i]],
                    config.sigmas,
                    noise_samples=config.noise_samples,
                    seed=config.seed,
                )
                add(i, config.sigmas, scores[0])
            else:
                add(i, [sigma], reward.score(latents, sigma, cond).detach())
            folder.reporter.progress("score", len(rows), len(config.images))
        flat = [row for i in sorted(rows) for row in rows[i]]
        table = [row | {"dataset": "images", "prompt_id": ""} for row in flat]
        results.write(folder.folder / "scores.parquet", "scores", table, folder.id)
        return folder.finish(
            {
                "seed": config.seed,
                "device": str(device),
                "dtype": {v: k for k, v in DTYPES.items()}[dtype],
                "seconds": round(time.monotonic() - folder.started, 2),
                "reward": config.reward,
                "noise_samples": config.noise_samples,
                "scores": flat,
            }
        )


def matched_prompts(config: Score) -> list[str]:
    """A prompt an image."""
    if not config.images:
        raise InputError(
            "IMAGE: none is given", hint="name pictures, or pipe their paths: ls *.png | drm score - --prompt TEXT"
        )
    if not config.prompts:
        raise InputError("--prompt: none is given", hint='for example --prompt "a large red circle on the left"')
    if len(config.prompts) not in (1, len(config.images)):
        raise InputError(
            f"--prompt: {len(config.prompts)} prompts for {len(config.images)} images",
            hint="give one prompt, or one an image in the same order",
        )
    if any(not p.strip() for p in config.prompts):
        raise InputError("--prompt: a prompt is empty", hint="say what the picture should show")
    return list(config.prompts) * (len(config.images) if len(config.prompts) == 1 else 1)


def read_latents(name: str) -> tuple[Tensor, float | None]:
    """Latents [1, C, H, W] of a safetensors file with a tensor `latents` and, if they are noisy, metadata `sigma`."""
    try:
        with safe_open(name, framework="pt") as file:
            if "latents" not in set(file.keys()):
                raise InputError(f"{name}: holds no tensor `latents`", hint="save latents [C, H, W] under that name")
            latents = file.get_tensor("latents").float()
            sigma = (file.metadata() or {}).get("sigma")
    except FileNotFoundError:
        raise InputError(f"{name}: missing", hint="check the path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name}: not a safetensors file: {error}", hint="save latents with safetensors") from None
    latents = latents[None] if latents.ndim == 3 else latents
    if latents.ndim != 4 or len(latents) != 1 or not bool(torch.isfinite(latents).all()):
        raise InputError(f"{name}: `latents` must be finite, of shape [C, H, W]", hint="one file a picture")
    try:
        return latents, None if sigma is None else float(sigma)
    except ValueError:
        raise InputError(f"{name}: its sigma {sigma!r} is no number", hint="write the noise level, 0 to 1") from None


def plan(config: Score) -> dict[str, Any]:
    """What `--dry-run` prints."""
    prompts = matched_prompts(config)
    return {
        "images": len(config.images),
        "prompts": len(set(prompts)),
        "noise levels": config.sigmas,
        "download": "nothing",
    }
