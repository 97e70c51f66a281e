"""`drm serve`: models loaded once, then scores over HTTP until it is told to stop. See `drmcli.service.scoring` for the interface."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.config.serving import Serve
from drmcli.errors import InputError, Interrupted, MissingError
from drmcli.generator import pick_device, pick_dtype
from drmcli.run import Reporter
from drmcli.scorers import load_scorer
from drmcli.scorers.drm import RewardScorer

GRACE = 30
"""Seconds that requests in flight have to end after a signal."""


def run(config: Serve, reporter: Reporter, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then raise Interrupted. `ready` is told the address once requests are taken."""
    need("fastapi", "uvicorn", "multipart")
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


def need(*modules: str) -> None:
    """Raises MissingError unless the packages of the extra `serve` are there."""
    from importlib.util import find_spec

    for name in modules:
        if find_spec(name) is None:
            raise MissingError(f"drm serve: the package {name} is missing", hint="pip install 'drmcli[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError for an address or a port that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            hint = "use 127.0.0.1 or 0.0.0.0"
            raise InputError(f"--host {host}: not an address of this machine", hint=hint) from None
        hint = "choose another --port, or 0 for a free one"
        raise InputError(f"--port {port}: {os.strerror(error.errno or 0)} on {host}", hint=hint) from None


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, listening: socket.socket, ready: Callable[[], None], *, grace: int) -> None:
    """Run the application until SIGINT or SIGTERM; requests in flight are answered first. A second Ctrl-C ends at once."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # uvicorn's own would raise the signal again at the end
            yield

    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=grace, server_header=False
        )
    )

    def stop(number: int, frame: Any) -> None:
        if server.should_exit:
            raise KeyboardInterrupt
        server.should_exit = True

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    app.state.stop = lambda: setattr(server, "should_exit", True)
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        ref, device=device, dtype=dtype, flag=flag, attention=config.attention, sigma=config.sigma,
        noise_samples=config.noise_samples, seed=config.seed,
    )  # fmt: skip
    if not isinstance(scorer, RewardScorer):
        return Served(name, lambda images, prompts, _: scorer.score_images(images, prompts).tolist())
    model = scorer.model
    if config.resolution:
        model.config.resolution = config.resolution
    model.generator()  # loaded now, not by the first request

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
