"""`drm score`: scores of pictures, or of saved latents, at one or more sigmas."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drmcli import results
from drmcli.config import Score
from drmcli.data.images import FileImage, load_image
from drmcli.data.text import cut, short
from drmcli.errors import InputError
from drmcli.fitting import SMALLER, Batch
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.noise import score_clean
from drmcli.run import SILENT, Reporter, Run, open_run
from drmcli.scorers import Scorer, load_scorer
from drmcli.scorers.drm import RewardScorer


def run(config: Score, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Score what is named. Returns what summary.json holds."""
    prompts = matched_prompts(config)
    with open_run("score", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite scores again")
            return folder.finished
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        loaded = {
            i: load_image(FileImage(name, Path(name)), upright=True)
            for i, name in enumerate(config.images)
            if not name.endswith(".safetensors")
        }
        saved = {i: read_latents(config.images[i]) for i in range(len(config.images)) if i not in loaded}
        scorer = load_scorer(
            config.reward,
            device=device,
            dtype=dtype,
            flag="--reward",
            kernels=Kernels.of(config, device),
            seed=config.seed,
        )
        if isinstance(scorer, RewardScorer):
            rows = by_noise_level(scorer, loaded, saved, prompts, config, folder)
        elif saved:
            raise InputError(
                f"--reward {config.reward}: judges pictures, and {config.images[next(iter(saved))]} holds latents",
                hint="score latents with a reward model",
            )
        else:
            folder.note(f"{scorer.name} judges finished pictures: sigmas do not matter to it")
            rows = of_pictures(scorer, loaded, prompts, config, folder)
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


def by_noise_level(
    scorer: RewardScorer,
    pictures: dict[int, Image.Image],
    saved: dict[int, tuple[Tensor, float | None]],
    prompts: list[str],
    config: Score,
    folder: Run,
) -> dict[int, list[dict[str, Any]]]:
    """A reward model's scores of pictures and saved latents, a row a sigma, by position in `config.images`."""
    reward = scorer.model
    if config.resolution:
        reward.config.resolution = config.resolution
    rows: dict[int, list[dict[str, Any]]] = {}
    noise: dict[str, Any] = {"noise_samples": config.noise_samples, "seed": config.seed}

    def add(i: int, sigmas: list[float], scores: Tensor) -> None:
        rows[i] = [_row(config, prompts, i, sigma, float(score)) for sigma, score in zip(sigmas, scores)]
        folder.reporter.progress("score", len(rows), len(config.images))

    where, batch = list(pictures), Batch(config.batch_size, flag="--batch-size", hint=SMALLER)
    for start in range(0, len(where), config.batch_size):
        some = where[start : start + config.batch_size]
        images, texts = [pictures[i] for i in some], [prompts[i] for i in some]
        out = reward.score_images(images, texts, sigmas=config.sigmas, batch_size=batch, **noise)
        for i, scores in zip(some, out):
            add(i, config.sigmas, scores)
    for i, (latents, sigma) in saved.items():
        cond = scorer.encode([prompts[i]])
        latents = latents.to(next(reward.parameters()).device)
        if sigma is None:  # clean: noised as a picture's would be
            add(i, config.sigmas, score_clean(reward, latents, cond, [config.images[i]], config.sigmas, **noise)[0])
        else:
            add(i, [sigma], reward.score(latents, sigma, cond).detach())
    return rows


def of_pictures(
    scorer: Scorer, pictures: dict[int, Image.Image], prompts: list[str], config: Score, folder: Run
) -> dict[int, list[dict[str, Any]]]:
    """A scorer's one score a picture, by position in `config.images`."""
    scorer.check_prompts(prompts)
    rows: dict[int, list[dict[str, Any]]] = {}
    where, batch = list(pictures), Batch(config.batch_size, flag="--batch-size", hint=SMALLER)

    def some(at: slice) -> list[float]:
        found = scorer.score_images([pictures[i] for i in where[at]], [prompts[i] for i in where[at]]).tolist()
        folder.reporter.progress("score", at.stop, len(config.images))
        return found

    scores = [score for part in batch.each(some, len(where)) for score in part]
    for i, score in zip(where, scores):
        rows[i] = [_row(config, prompts, i, 0.0, score)]
    return rows


def _row(config: Score, prompts: list[str], i: int, sigma: float, score: float) -> dict[str, Any]:
    return {"image": config.images[i], "prompt": prompts[i], "sigma": sigma, "score": score}


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
            found = file.get_tensor("latents")
            if found.is_complex():
                raise InputError(f"{name}: `latents` are complex numbers", hint="save real ones")
            latents = found.float()
            sigma = (file.metadata() or {}).get("sigma")
    except FileNotFoundError:
        raise InputError(f"{name}: missing", hint="check the path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{name}: not a safetensors file: {cut(str(error))}", hint="save latents with safetensors"
        ) from None
    latents = latents[None] if latents.ndim == 3 else latents
    if latents.ndim != 4 or len(latents) != 1 or not latents.numel() or not bool(torch.isfinite(latents).all()):
        raise InputError(f"{name}: `latents` must be finite, of shape [C, H, W]", hint="one file a picture")
    if sigma is None:
        return latents, None
    try:
        level = float(sigma)
    except ValueError:
        level = math.nan
    if not 0 <= level <= 1:
        raise InputError(f"{name}: its sigma {short(sigma)} is no noise level", hint="write one from 0 to 1")
    return latents, level


def plan(config: Score) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.recipes import hours
    from drmcli.recipes.footprints import of_score

    prompts = matched_prompts(config)
    for name in config.images:  # what cannot be read would fail
        if name.endswith(".safetensors"):
            read_latents(name)
        else:
            load_image(FileImage(name, Path(name)), upright=True)
    return (
        {
            "images": len(config.images),
            "prompts": len(set(prompts)),
            "sigmas": config.sigmas,
            "forward passes a picture": hours.passes(config.sigmas, config.noise_samples),
        }
        | of_score(config)
        | hours.of_score(config)
    )
