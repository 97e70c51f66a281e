"""The page where people vote, and what it asks: `drm data label`. One process, one folder, a token in the address."""

from __future__ import annotations

import json
import secrets
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from drmcli.data.ballot import Ballot
from drmcli.errors import DrmError

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LONGEST = 64 * 1024
"""Largest request, bytes."""


def make_app(ballot: Ballot, token: str) -> Starlette:
    """The application. Every path needs the token; pictures are asked for by number, never by path."""
    page = (resources.files("drmcli.service") / "label.html").read_text(encoding="utf-8")

    def refused(request: Request) -> bool:
        return not secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode())

    def guard(handler: Any) -> Any:
        async def checked(request: Request) -> Response:
            if refused(request):
                return PlainTextResponse("the address lacks its token: open the link that drm data label printed", 403)
            try:
                return await handler(request)
            except DrmError as error:
                return JSONResponse({"error": error.message}, 422)

        return checked

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    async def state(request: Request) -> Response:
        name = labeller(request.query_params.get("labeller"))
        return JSONResponse(ballot.state(name)) if name else JSONResponse({"error": "labeller: no name"}, 422)

    async def picture(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(ballot.pictures):
            return PlainTextResponse("there is no such picture", 404)
        return FileResponse(ballot.folder / ballot.pictures[number], headers={"Cache-Control": "private, max-age=3600"})

    async def vote(request: Request) -> Response:
        body = await read(request)
        name = labeller(body.get("labeller"))
        if not name:
            return JSONResponse({"error": "labeller: no name"}, 422)
        if body.get("choice") == "undo":
            ballot.undo(name)
        elif isinstance(body.get("pair"), int):
            ballot.vote(name, body["pair"], str(body.get("choice")))
        else:
            return JSONResponse({"error": "pair: no number"}, 422)
        return JSONResponse(ballot.state(name))  # only now: the vote is on the disk

    return Starlette(
        routes=[
            Route("/", guard(index)),
            Route("/state", guard(state)),
            Route("/picture/{number:int}", guard(picture)),
            Route("/vote", guard(vote), methods=["POST"]),
        ]
    )


def labeller(name: Any) -> str:
    """A labeller's name in one line, "" where there is none."""
    return " ".join(name.split())[:60] if isinstance(name, str) else ""


async def read(request: Request) -> dict[str, Any]:
    """A small JSON object; {} for anything else."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > LONGEST:
            return {}
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
