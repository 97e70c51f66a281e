"""`drm serve`: models loaded once, then scores over HTTP until it is told to stop. See `drmcli.service.scoring` for the interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.config.serving import Serve
from drmcli.errors import InputError, Interrupted
from drmcli.families.base import check_side
from drmcli.generator import pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.run import Reporter
from drmcli.scorers import load_scorer
from drmcli.scorers.drm import RewardScorer
from drmcli.service.server import address, listen, need, serve

GRACE = 30
"""Seconds that requests in flight have to end after a signal."""


def run(config: Serve, reporter: Reporter, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then raise Interrupted. `ready` is told the address once requests are taken."""
    need("drm serve", "fastapi", "uvicorn", "python_multipart")
    listening = listen(config.host, config.port)
    with contextlib.closing(listening):
        served = load(config)
        from drmcli.service.scoring import make_app

        app = make_app(config, served)
        url = address(listening)
        if config.host not in ("127.0.0.1", "::1", "localhost"):
            reporter.warn(f"--host {config.host}: whoever reaches this machine can use it; there is no password")
        names = [s.name for s in served]
        serve(app, listening, lambda: ready({"url": url, "scorers": names}), grace=GRACE)
    answered = sum(n for (path, code), n in app.state.metrics.requests.items() if path.startswith("/score"))
    raise Interrupted(f"interrupted: {answered} requests were answered", hint="run the same command again to serve on")


# --- models ---------------------------------------------------------------------------------------------------------------


def load(config: Serve) -> list[Any]:
    """The scorers that are asked for, the reward model first. Raises InputError for none and for a name that is there twice."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    asked = [] if config.reward == "none" else [("reward", config.reward, "--reward")]
    asked += [(ref.partition("=")[0], ref, "--scorer") for ref in config.scorers]
    names = [name for name, _, _ in asked]
    if not names:
        raise InputError("--reward none: nothing is left to serve", hint="name a scorer, for example --scorer clip")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--scorer {twice[0]}: is named twice", hint="name each scorer once")
    return [serve_one(name, ref, flag, config, device, dtype) for name, ref, flag in asked]


def serve_one(name: str, ref: str, flag: str, config: Serve, device: torch.device, dtype: torch.dtype) -> Any:
    """One scorer under the name by which requests ask for it."""
    from drmcli.service.scoring import Served

    scorer = load_scorer(
        ref, device=device, dtype=dtype, flag=flag, kernels=Kernels.of(config, device), sigma=config.sigma,
        noise_samples=config.noise_samples, seed=config.seed,
    )  # fmt: skip
    if not isinstance(scorer, RewardScorer):
        return Served(name, lambda images, prompts, _: scorer.score_images(images, prompts).tolist())
    model = scorer.model
    generator = model.generator()  # loaded now, not by the first request
    if config.resolution:
        model.config.resolution = config.resolution
        check_side("--resolution", config.resolution, generator.family, generator.model_config, generator.factor)

    def pictures(images: list[Image.Image], prompts: list[str], settings: dict[str, Any]) -> list[float]:
        scores = model.score_images(
            images, prompts, sigmas=[settings["sigma"]], noise_samples=settings["noise_samples"],
            seed=settings["seed"], batch_size=config.max_batch,
        )  # fmt: skip
        return scores[:, 0].tolist()

    @torch.no_grad()
    def latents(x: Tensor, sigma: Tensor, prompts: list[str]) -> list[float]:
        unique = list(dict.fromkeys(prompts))
        where = torch.tensor([unique.index(prompt) for prompt in prompts], device=device)
        return finite(scorer.score(x.to(device), sigma.to(device), scorer.encode(unique)[where]).tolist())

    channels = int(model.config.transformer["in_channels"])
    return Served(name, pictures, latents, takes_noise=True, channels=channels)


def finite(scores: list[float]) -> list[float]:
    """The scores, if all are finite numbers; else the batch fails, and its halves are tried."""
    if any(score != score or abs(score) == float("inf") for score in scores):
        raise InputError("latents: the score is not finite", hint="look at the latents, or serve with --dtype fp32")
    return scores


def plan(config: Serve) -> dict[str, Any]:
    """What `--dry-run` prints."""
    return {
        "address": f"http://{config.host}:{config.port}",
        "reward": config.reward,
        "scorers": config.scorers or "none",
        "a request, at most": f"{config.max_items} pictures, {config.max_body_mib} MiB",
    }
