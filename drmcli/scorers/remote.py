"""A scorer behind `drm serve`, on this machine or another: the same functions, over HTTP.

`http://host:port` is the server's first scorer, `http://host:port#NAME` another of them. A request that finds the server busy (503) or
breaks off is sent again; scores are functions of what is sent, so that nothing is counted twice.

Dimension letters: B pictures or latents, C, H, W latent channels, height, width.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from drmcli.errors import DrmError, InputError, MissingError, RunError

HINT = "start it with `drm serve`, or check the address"


class Unreachable(Exception):
    """No answer came; or, with `wait`, one that says to come again after so many seconds."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def connect(
    ref: str, *, flag: str = "--scorer", sigma: float = 0.25, noise_samples: int = 4, seed: int = 0, **patience: Any
) -> RemoteScorer:
    """The scorer of a server, a `StateScorer` where it judges noisy latents. `patience`: of `Server`."""
    server = Server(ref, flag, **patience)
    said = server.ask("GET", "/health")
    try:
        served = {s["name"]: s for s in said["scorers"]}
        max_items = int(said["max_items"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{flag} {ref}: answers, but is no `drm serve`", hint=HINT) from None
    name = urlsplit(ref).fragment or next(iter(served))
    if name not in served:
        raise InputError(f"{flag} {ref}: does not serve {name!r}", hint=f"it serves {', '.join(served)}")
    settings = {"sigma": sigma, "noise_samples": noise_samples, "seed": seed} if served[name]["noise"] else {}
    if served[name]["latent_channels"] is None:
        return RemoteScorer(server, name, max_items, settings)
    return RemoteReward(server, name, max_items, settings, int(served[name]["latent_channels"]))


class RemoteScorer:
    """Judges finished pictures; see `drmcli.scorers.Scorer`."""

    def __init__(self, server: Server, remote: str, max_items: int, settings: dict[str, Any]):
        self.server, self.remote, self.max_items, self.settings = server, remote, max_items, settings
        self.name = server.ref

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Nothing is asked of the server before there are pictures."""

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32 on the CPU. Raises RunError naming the first picture that has no score."""
        return self._pictures(images, prompts, self.settings)

    def _pictures(self, images: Sequence[Image.Image], prompts: Sequence[str], settings: dict[str, Any]) -> Tensor:
        out: list[float] = []
        for at in range(0, len(images), self.max_items):
            some = slice(at, at + self.max_items)
            body = {"images": [_text(_png(image)) for image in images[some]], "prompts": list(prompts[some])}
            out += self._scores("/score", body | {"scorers": [self.remote]} | settings)
        return torch.tensor(out, dtype=torch.float32)

    def _scores(self, path: str, body: dict[str, Any]) -> list[float]:
        said = self.server.ask("POST", path, json.dumps(body).encode())
        if said["errors"]:
            first = said["errors"][0]
            raise RunError(
                f"{self.server}: picture {first['index']}: {first['error']}", hint="leave it out, or mend it"
            )
        return said["scores"][self.remote]


@dataclass(frozen=True)
class Prompts:
    """What a remote reward model needs to know of B prompts: themselves. Rows are picked as from a tensor."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Prompts:
        picked = torch.arange(len(self))[torch.as_tensor(index, device="cpu") if isinstance(index, Tensor) else index]
        return Prompts(tuple(self.texts[i] for i in picked.reshape(-1).tolist()))


class RemoteReward(RemoteScorer):
    """Judges noisy latents as well; see `drmcli.scorers.StateScorer`. Scores come without gradients."""

    def __init__(self, server: Server, remote: str, max_items: int, settings: dict[str, Any], channels: int):
        super().__init__(server, remote, max_items, settings)
        self.channels = channels
        """C of the latents that it judges."""

    def encode(self, prompts: Sequence[str]) -> Prompts:
        return Prompts(tuple(prompts))

    def score(self, latents: Tensor, sigma: float | Tensor, cond: Prompts) -> Tensor:
        """Scores [B], float32 on the latents' device, of latents [B, C, H, W] at a sigma (one, or [B])."""
        levels = torch.as_tensor(sigma, dtype=torch.float64).expand(len(latents)).tolist()
        out: list[float] = []
        for at in range(0, len(latents), self.max_items):
            some = slice(at, at + self.max_items)
            file = safetensors.torch.save({"latents": latents[some].detach().float().cpu().contiguous()})
            body = {"latents": _text(file), "sigma": levels[some], "prompts": list(cond.texts[some])}
            out += self._scores("/score/latents", body)
        return torch.tensor(out, dtype=torch.float32, device=latents.device)

    def score_at(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        sigmas: Sequence[float],
        noise_samples: int,
        seed: int,
    ) -> Tensor:
        """Scores [B, len(sigmas)] of pictures at several sigmas, as `RewardModel.score_images` gives them."""
        more: dict[str, Any] = {"noise_samples": noise_samples, "seed": seed}
        return torch.stack([self._pictures(images, prompts, more | {"sigma": s}) for s in sigmas], dim=1)


class Server:
    """The address of a `drm serve`, and asking it with patience."""

    def __init__(self, ref: str, flag: str, *, timeout: float = 120.0, retries: int = 5, backoff: float = 0.5):
        """timeout: seconds for one answer. retries: further tries, after backoff x 1, 2, 4, ... seconds or as the server says.

        Raises InputError for what is no address.
        """
        self.ref, self.flag = ref, flag
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        parts = urlsplit(ref)
        try:
            host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise InputError(f"{flag} {ref}: {error}", hint="give http://host:port") from None
        if not host or parts.query or parts.username:
            raise InputError(f"{flag} {ref}: not an address", hint="give http://host:port or http://host:port#scorer")
        self.host, self.secure, self.path = host, parts.scheme == "https", parts.path.rstrip("/")

    def __str__(self) -> str:
        return f"{self.flag} {self.ref}"

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """One answer, after as many tries as it takes. Raises MissingError when nothing answers at the start, later RunError."""
        for left in range(self.retries, -1, -1):
            try:
                return self._once(method, path, body)
            except Unreachable as error:
                if not left or (
                    method == "GET" and error.wait is None
                ):  # at the start: a wrong address need not be waited for
                    kind: type[DrmError] = MissingError if method == "GET" else RunError
                    raise kind(f"{self}: {error}", hint=HINT) from None
                time.sleep(self.backoff * 2 ** (self.retries - left) if error.wait is None else error.wait)
        raise AssertionError

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        try:
            connection.request(method, self.path + path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
        except TimeoutError:
            raise Unreachable(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"no answer: {getattr(error, 'strerror', None) or type(error).__name__}") from None
        finally:
            connection.close()
        try:
            said = json.loads(data)
        except ValueError:
            said = None
        if answer.status == 503:
            wait = answer.headers.get("Retry-After", "")
            raise Unreachable(_error(said) or "busy", min(float(wait), 60.0) if wait.isdigit() else None)
        if not isinstance(said, dict) or (answer.status != 200 and "error" not in said):
            raise InputError(f"{self}: answers {answer.status}, but is no `drm serve`", hint=HINT)
        if answer.status != 200:
            wrong: type[DrmError] = RunError if answer.status >= 500 else InputError
            raise wrong(f"{self}: {said['error']}", hint=str(said.get("hint") or HINT))
        return said


def _error(said: Any) -> str | None:
    return str(said["error"]) if isinstance(said, dict) and "error" in said else None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
