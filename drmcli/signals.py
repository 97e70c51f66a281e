"""Ctrl-C and SIGTERM at any moment of a process: remembered, so that no library that swallows the interrupt swallows the request.

Imports nothing of weight: it is at work before the libraries that take seconds to import are.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from drmcli.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)
AGAIN = "run the same command again to go on"
_watching = False
_came = False


def _handle(number: int, frame: Any) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


def watch() -> dict[int, Any]:
    """From now on a signal is remembered, and raises KeyboardInterrupt. Returns the handlers that were there."""
    global _came, _watching
    _came, _watching = False, True
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's own handling stays
        for number in STOPPING:
            before[number] = signal.signal(number, _handle)
    return before


def ignore() -> None:
    """From now on signals change nothing."""
    with contextlib.suppress(ValueError):
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """`watch` for the time of one command."""
    global _came, _watching
    before = watch()
    try:
        yield
    finally:
        _came = _watching = False
        for number, handler in before.items():
            signal.signal(number, handler)


def came() -> bool:
    """Has a signal asked for a stop?"""
    return _came


def check(done: str = "") -> None:
    """Between two pieces of work: raises Interrupted when a signal came, also one whose KeyboardInterrupt a library swallowed."""
    if _came:
        raise Interrupted(f"interrupted{': ' if done else ''}{done}", hint=AGAIN)


class Interruptions:
    """Ctrl-C and SIGTERM asked for a stop: the loop looks at `asked` when a step is done. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        self.asked = self.asked or _came
        for number in STOPPING:
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's own handling stays
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        global _came
        _came = _watching
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def stop(self, done: str) -> Interrupted:
        """The error to raise once everything is saved."""
        return Interrupted(f"interrupted: {done}", hint=AGAIN)
