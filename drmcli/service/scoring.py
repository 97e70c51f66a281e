"""What `drm serve` answers: scores of pictures and of noisy latents over HTTP.

POST /score takes pictures (JSON with base64, or multipart) and prompts; POST /score/latents takes noisy latents as safetensors with
their sigmas; GET /health and /metrics say how it is. Every error is JSON `{"error": fact, "hint": what to do}`.

A picture that cannot be used or scored gives null and an entry in `errors`; only a request without any score is an error as a whole.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as load_tensors
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from drmcli import __version__
from drmcli.config.serving import Serve
from drmcli.data.images import BadImage, decode
from drmcli.data.text import sound
from drmcli.errors import DrmError
from drmcli.service.batching import Batcher, Closed, Full
from drmcli.service.metrics import Metrics

Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class PictureRequest(BaseModel):
    """Pictures and prompts to score."""

    model_config = ConfigDict(extra="forbid")
    images: list[str] = Field(min_length=1, description="Picture files (PNG, JPEG, WebP, ...), base64.")
    prompts: list[str] | str = Field(description="A prompt a picture, or one for all.")
    scorers: list[str] | None = Field(None, min_length=1, description="Which of the served scorers; all by default.")
    sigma: Level | None = Field(None, description="Sigma at which a reward model scores them.")
    noise_samples: Annotated[int, Field(ge=1, le=64)] | None = Field(None, description="Noise draws, averaged.")
    seed: Annotated[int, Field(ge=0)] | None = Field(None, description="Seed of the noise.")


class LatentRequest(BaseModel):
    """Noisy latents to score where they are, by the reward model."""

    model_config = ConfigDict(extra="forbid")
    latents: str = Field(description="A safetensors file, base64, with a tensor `latents` [B, C, H, W] or [C, H, W].")
    sigma: Level | list[Level] = Field(description="Their sigma: one, or one each.")
    prompts: list[str] | str = Field(description="A prompt each, or one for all.")


class Failure(BaseModel):
    """One thing that has no score."""

    index: int
    scorer: str
    error: str


class ScoreAnswer(BaseModel):
    """Scores in the order of the request; null where there is none, and why in `errors`."""

    scores: dict[str, list[float | None]]
    errors: list[Failure]


class Refusal(Exception):
    """A request that is answered with an error: status, fact, hint."""

    def __init__(self, status: int, error: str, hint: str, headers: dict[str, str] | None = None):
        super().__init__(error)
        self.status, self.error, self.hint, self.headers = status, error, hint, headers


@dataclass
class Served:
    """One scorer behind the server. At least one of the two functions is there."""

    name: str
    pictures: Callable[[list[Image.Image], list[str], dict[str, Any]], Sequence[float]] | None
    """Pictures, prompts and settings (sigma, noise_samples, seed; none for a scorer without noise) to numbers."""
    latents: Callable[[Tensor, Tensor, list[str]], Sequence[float]] | None = None
    """Latents [B, C, H, W], sigmas [B], prompts to numbers."""
    takes_noise: bool = False
    """Do the settings change what `pictures` gives?"""
    channels: int | None = None
    """C of its latents."""


def score_batch(served: dict[str, Served], key: tuple[str, str, Any], payloads: list[Any]) -> Sequence[float]:
    """One batch of the queue; the key is (kind, scorer, settings or shape)."""
    kind, name, settings = key
    scorer = served[name]
    if kind == "pictures":
        assert scorer.pictures is not None
        return scorer.pictures([p[0] for p in payloads], [p[1] for p in payloads], dict(settings))
    assert scorer.latents is not None
    sigma = torch.tensor([p[1] for p in payloads])
    return scorer.latents(torch.stack([p[0] for p in payloads]), sigma, [p[2] for p in payloads])


class Limited:
    """Refuses bodies above a size, by their header or as they come, and counts answers."""

    def __init__(self, app: ASGIApp, limit: int, count: Callable[[str, int], None]):
        self.app, self.limit, self.count = app, limit, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        got = 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = declared.isdigit() and int(declared) > self.limit

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if too_long or got > self.limit:
                raise HTTPException(413, f"the request is larger than {self.limit} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.count(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self.app(scope, limited, counted)


def make_app(config: Serve, served: list[Served]) -> FastAPI:
    """The application."""
    service = Service(config, served)
    app = FastAPI(
        title="drm serve", version=__version__, lifespan=service.lifespan, docs_url=None, redoc_url=None,
        description="Scores of pictures and of noisy latents. The interface is /openapi.json.",
    )  # fmt: skip
    app.state.metrics = service.metrics
    requests = service.metrics.requests
    app.add_middleware(
        Limited, limit=config.max_body_mib * 2**20, count=lambda path, code: requests.update([(path, code)])
    )
    explain_errors(app)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.metrics_page)
    pictures, latents = body_schema(PictureRequest, "images"), body_schema(LatentRequest, "latents")
    app.post("/score", response_model=ScoreAnswer, openapi_extra=pictures)(service.score)
    app.post("/score/latents", response_model=ScoreAnswer, openapi_extra=latents)(service.score_latents)
    return app


def explain_errors(app: FastAPI) -> None:
    """Every error is a JSON object with `error` and `hint`."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse({"error": error.error, "hint": error.hint}, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        hint = {413: "send fewer or smaller pictures", 404: "POST to /score or /score/latents; see /openapi.json"}
        said = {"error": str(error.detail), "hint": hint.get(error.status_code, "see /openapi.json")}
        return JSONResponse(said, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        said = f"internal: {type(error).__name__}: {error}"
        return JSONResponse({"error": said, "hint": "the server's log has the traceback"}, 500)


class Service:
    """What is served, and how requests are answered."""

    batcher: Batcher
    worker: asyncio.Task[None]
    """Both are made when the loop runs."""

    def __init__(self, config: Serve, served: list[Served]):
        self.config, self.served = config, served
        self.by_name = {s.name: s for s in served}
        self.metrics = Metrics()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The worker lives as long as the application does."""
        self.batcher = Batcher(
            lambda key, payloads: score_batch(self.by_name, key, payloads), max_batch=self.config.max_batch,
            max_wait=self.config.max_wait_ms / 1000, max_queue=self.config.max_queue,
            observe=lambda key, size, seconds: self.metrics.batch(key[1], size, seconds),
        )  # fmt: skip
        self.worker = app.state.worker = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            self.batcher.close()
            await asyncio.wait([self.worker], timeout=5)

    async def health(self) -> JSONResponse:
        """What is served, and whether the worker is alive (else 503)."""
        alive = not self.worker.done()
        said = {
            "status": "ok" if alive else "the worker has ended", "version": __version__, "max_items": self.config.max_items,
            "scorers": [{"name": s.name, "noise": s.takes_noise, "latent_channels": s.channels} for s in self.served],
        }  # fmt: skip
        return JSONResponse(said, 200 if alive else 503)

    async def metrics_page(self) -> PlainTextResponse:
        """Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(waiting=self.batcher.count), media_type="text/plain; version=0.0.4")

    async def answer(
        self, work: Sequence[tuple[str, int, Hashable, Any]], names: list[str], n: int, failed: list[Failure]
    ) -> JSONResponse:
        """Queue what can be scored (scorer, position, key, payload) and put the answers in order."""
        if self.worker.done():
            raise Refusal(503, "the worker has ended", "start the server again")
        try:
            results = await self.batcher.submit([(key, payload) for _, _, key, payload in work])
        except Full as full:
            raise Refusal(
                503, f"the queue is full: {self.batcher.count} of {self.config.max_queue} scores wait", "send it again later",
                {"Retry-After": str(math.ceil(full.retry_after))},
            ) from None  # fmt: skip
        except Closed:
            raise ending() from None
        scores: dict[str, list[float | None]] = {name: [None] * n for name in names}
        for (name, index, _, _), value in zip(work, results):
            if isinstance(value, BaseException):
                failed.append(Failure(index=index, scorer=name, error=explain(value)))
            else:
                scores[name][index] = value
        for failure in failed:
            self.metrics.failed[failure.scorer] += 1
        if len(failed) == n * len(names):
            if any(isinstance(value, Closed) for value in results):
                raise ending()
            bug = any(isinstance(value, BaseException) and not isinstance(value, DrmError) for value in results)
            raise Refusal(500 if bug else 422, failed[0].error, f"nothing of {n} could be scored; this is the first")
        failed.sort(key=lambda f: (f.index, f.scorer))
        return JSONResponse({"scores": scores, "errors": [f.model_dump() for f in failed]})

    async def score(self, request: Request) -> JSONResponse:
        """Score pictures for prompts: JSON, or multipart with files `images` and fields `prompts`, ..."""
        fields, files = await read_fields(request, "images")
        files = fields.pop("images", None) if files is None else files
        asked = validated(PictureRequest, fields | {"images": [""] * len(files) if isinstance(files, list) else files})
        assert isinstance(files, list)
        count(len(files), self.config.max_items, "images")
        prompts = one_each(asked.prompts, len(files))
        names = chosen(asked.scorers, [s.name for s in self.served if s.pictures])
        opened, failed = await run_in_threadpool(open_pictures, files, self.config.max_pixels, names)
        settings = (
            ("sigma", self.config.sigma if asked.sigma is None else asked.sigma),
            ("noise_samples", asked.noise_samples or self.config.noise_samples),
            ("seed", self.config.seed if asked.seed is None else asked.seed),
        )
        keys = {name: ("pictures", name, settings if self.by_name[name].takes_noise else ()) for name in names}
        work = [(name, i, keys[name], (image, prompts[i])) for name in names for i, image in opened.items()]
        return await self.answer(work, names, len(files), failed)

    async def score_latents(self, request: Request) -> JSONResponse:
        """Score noisy latents where they are: JSON, or multipart with a file `latents` and fields `sigma`, `prompts`."""
        able = [s for s in self.served if s.latents]
        if not able:
            raise Refusal(422, "no reward model is served", "start it with `drm serve --reward REF`")
        fields, files = await read_fields(request, "latents")
        if files is not None:
            fields["latents"] = "" if files else None
        asked = validated(LatentRequest, fields)
        data = files[0] if files else unbase64(asked.latents, "latents")
        latents = await run_in_threadpool(read_latents, data, able[0].channels)
        count(len(latents), self.config.max_items, "latents")
        prompts = one_each(asked.prompts, len(latents))
        sigma = asked.sigma if isinstance(asked.sigma, list) else [asked.sigma] * len(latents)
        if len(sigma) != len(latents):
            raise Refusal(422, f"sigma: {len(sigma)} for {len(latents)} latents", "give one, or one each")
        name = able[0].name
        key = ("latents", name, tuple(latents.shape[1:]))
        work = [(name, i, key, (x, sigma[i], prompts[i])) for i, x in enumerate(latents)]
        return await self.answer(work, [name], len(latents), [])


# --- reading a request ----------------------------------------------------------------------------------------------------


async def read_fields(request: Request, files: str) -> tuple[dict[str, Any], list[Any] | None]:
    """The fields of a body, and the bytes of the files of this name where it is multipart. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the body is not JSON: {error}", "see /openapi.json") from None
        if not isinstance(fields, dict):
            raise Refusal(422, "the body is not a JSON object", "see /openapi.json")
        return fields, None
    if kind == "multipart/form-data":
        async with request.form(max_files=1000, max_fields=1000) as form:
            return await form_fields(form, files)
    raise Refusal(415, f"content type {kind or 'missing'!r}", "send application/json or multipart/form-data")


async def form_fields(form: FormData, files: str) -> tuple[dict[str, Any], list[bytes]]:
    """A multipart form as JSON's fields, and the bytes of its files. Raises Refusal for files under other names."""
    uploads: list[bytes] = []
    out: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        sent = [value for value in values if isinstance(value, UploadFile)]
        if name == files:
            if len(sent) < len(values):
                raise Refusal(422, f"{name}: not sent as a file", f"send {name} with a file name")
            uploads += [await value.read() for value in sent]
        elif sent:
            raise Refusal(422, f"{name}: a file under an unknown name", f"send files as {files}")
        else:
            out[name] = values if len(values) > 1 or name == "scorers" else values[0]
    return out, uploads


def validated(kind: type[Any], fields: dict[str, Any]) -> Any:
    """The request as its model. Raises Refusal naming the first wrong field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part)
        message = first["msg"][0].lower() + first["msg"][1:]
        raise Refusal(422, f"{where}: {message}", f"known are {', '.join(kind.model_fields)}") from None


def count(n: int, limit: int, what: str) -> None:
    if n > limit:
        raise Refusal(413, f"{what}: {n} in one request, the limit is {limit}", "send them in several requests")


def one_each(prompts: list[str] | str, n: int) -> list[str]:
    """A prompt for each of n. Raises Refusal for another number and for empty ones."""
    found = [prompts] * n if isinstance(prompts, str) else prompts
    if len(found) != n:
        raise Refusal(422, f"prompts: {len(found)} for {n}", "give one prompt, or one each in the same order")
    if any(not prompt.strip() for prompt in found):
        raise Refusal(422, "prompts: a prompt is empty", "say what the picture should show")
    try:
        return [sound(prompt, "prompts") for prompt in found]
    except DrmError as error:
        raise Refusal(422, error.message, error.hint) from None


def chosen(asked: list[str] | None, there: list[str]) -> list[str]:
    """The scorers that a request names, all by default. Raises Refusal for one that is not served."""
    for name in asked or []:
        if name not in there:
            raise Refusal(422, f"scorers: {name!r} is not served", f"served are {', '.join(there)}")
    return list(dict.fromkeys(asked or there))


def open_pictures(files: list[Any], max_pixels: int, names: list[str]) -> tuple[dict[int, Image.Image], list[Failure]]:
    """The pictures that can be opened, by position, and why the others cannot (for each scorer that was asked)."""
    opened: dict[int, Image.Image] = {}
    failed: list[Failure] = []
    for index, file in enumerate(files):
        try:
            data = file if isinstance(file, bytes) else unbase64(file, f"images.{index}")
            opened[index] = decode(data, f"images.{index}", max_pixels=max_pixels)
        except (BadImage, Refusal) as error:
            failed += [Failure(index=index, scorer=name, error=str(error)) for name in names]
    return opened, failed


def unbase64(text: Any, where: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, f"{where}: not base64", "encode the file's bytes as base64 text") from None


def read_latents(data: bytes, channels: int | None) -> Tensor:
    """Latents [B, C, H, W], float32. Raises Refusal for anything else."""
    hint = "send a safetensors file with one tensor `latents` [B, C, H, W]"
    try:
        tensors = load_tensors(data)
    except Exception as error:  # the library raises its own error and several of Python's on damaged bytes
        raise Refusal(422, f"latents: not a safetensors file: {error}", hint) from None
    if set(tensors) != {"latents"}:
        raise Refusal(422, f"latents: the file holds {', '.join(sorted(tensors)) or 'nothing'}", hint)
    if tensors["latents"].is_complex():
        raise Refusal(422, "latents: complex numbers", "send real ones")
    x = tensors["latents"].float()
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or not x.numel():
        raise Refusal(422, f"latents: of shape {list(x.shape)}", hint)
    if channels is not None and x.shape[1] != channels:
        raise Refusal(422, f"latents: {x.shape[1]} channels, the reward model takes {channels}", hint)
    if not bool(torch.isfinite(x).all()):
        raise Refusal(422, "latents: not finite", "look at what made them")
    return x


# --- answering ------------------------------------------------------------------------------------------------------------


def ending() -> Refusal:
    return Refusal(503, "the server is ending", "send it again to the next one", {"Retry-After": "5"})


def explain(error: BaseException) -> str:
    """Why there is no score, in one line."""
    if isinstance(error, Closed):
        return "the server is ending"
    return error.message if isinstance(error, DrmError) else f"internal: {type(error).__name__}: {error}"


def body_schema(kind: type[BaseModel], files: str) -> dict[str, Any]:
    """The request body for OpenAPI: JSON, or multipart with files in place of base64."""
    plain = kind.model_json_schema()
    form = json.loads(json.dumps(plain))
    binary = {"type": "string", "format": "binary"}
    form["properties"][files] = {"type": "array", "items": binary} if files == "images" else binary
    content = {"application/json": {"schema": plain}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
