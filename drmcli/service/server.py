"""A socket, an application, and an end that answers what is in flight: what the commands that speak HTTP share. No models here."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from drmcli.errors import InputError, MissingError


def need(command: str, *modules: str) -> None:
    """Raises MissingError unless the packages of the extra `serve` are there."""
    for name in modules:
        if find_spec(name) is None:
            raise MissingError(f"{command}: the package {name} is missing", hint="pip install 'drmcli[serve]'")


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
