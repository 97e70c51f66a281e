"""What a person, a script or a pipe sees: tables, JSON or one line on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from drmcli.errors import DrmWarning

if TYPE_CHECKING:  # a tenth of a second, which a help page does without
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_EVERY = 10.0
"""Seconds between progress lines where there is no terminal."""
PIPE_WIDTH = 10_000
"""Columns of a table that nobody's terminal limits."""
LONGEST = 600
"""Characters of a message: what it quotes may be a whole file."""


def stdout() -> Console:
    """Text is printed as it is: what people name (prompts, files, folders) may hold brackets and colons that Rich would read as
    markup. A pipe has no width, so nothing is wrapped there."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(markup=False, emoji=False, highlight=False, width=width)


def stderr() -> Console:
    """As `stdout`, for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Stdout:
    """stdout, whose failures end no command: a reader that went away is no fault, and any other fault is told at the end."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.fault = "is closed" if inner is None else ""
        self.gone = inner is None

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            if not self.gone:
                action()
        except BrokenPipeError:
            self._give_up("")
        except (OSError, ValueError) as error:
            self._give_up(getattr(error, "strerror", None) or str(error))

    def _give_up(self, fault: str) -> None:
        self.gone, self.fault = True, fault
        with contextlib.suppress(
            OSError, ValueError
        ):  # what is left in the buffer must not fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.inner.fileno())

    def write(self, text: str) -> int:
        self._try(lambda: self.inner.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.inner.flush())

    def close(self) -> str:
        """Write what is left; returns what went wrong, or nothing."""
        self.flush()
        return self.fault

    def isatty(self) -> bool:
        return self.inner is not None and self.inner.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Screen:
    """A reporter: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.waiting: TaskID | None = None
        self.starts: dict[str, tuple[float, int]] = {}
        self.said: dict[str, float] = {}

    @cached_property
    def console(self) -> Console:
        """Made when it is needed first: the line that says what happens does not wait for Rich."""
        return stderr()

    def __enter__(self) -> Screen:
        # Until the work is done stdout is stderr: what a library or a scorer of the user's prints must not get into --json.
        self._away = contextlib.redirect_stdout(sys.stderr)
        self._away.__enter__()
        if self.console.is_terminal and not self.quiet:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self.bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[more]}", style="dim", markup=False),
                console=self.console,
            )
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self._busy_no_more()
            self.bars.stop()
        self._away.__exit__(None, None, None)

    def busy(self, text: str) -> None:
        """A line that turns until the first progress is told: imports and loads take seconds."""
        if self.bars:
            self.waiting = self.bars.add_task(text, total=None, more="")

    def _busy_no_more(self) -> None:
        if self.bars and self.waiting is not None:
            self.bars.remove_task(self.waiting)
            self.waiting = None

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        more = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        if self.quiet:
            return
        if self.bars:
            self._busy_no_more()
            if task not in self.tasks:
                self.tasks[task] = self.bars.add_task(task, total=total, more=more)
            self.bars.update(self.tasks[task], completed=done, total=total, more=more)
            return
        now = time.monotonic()
        began, at = self.starts.setdefault(task, (now, done))
        if done < total and now - self.said.get(task, began) < PLAIN_EVERY:
            return
        self.said[task] = now
        left = (now - began) / max(1, done - at) * (total - done)
        eta = f", ETA {left:.0f} s" if done < total and done > at else ""
        print(f"{task}: {done}/{total}{eta}{'  ' + more if more else ''}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        line = f"note: {plain(text, LONGEST)}"
        if self.bars:
            self.console.print(line)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {plain(text, LONGEST)}", style="yellow")


def plain(text: str, limit: int | None = None) -> str:
    """Text on one line, without what steers a terminal: control characters and halves of surrogate pairs are written as escapes.
    Longer than `limit`, it is cut in the middle."""
    text = " ".join(text.split())
    text = "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 100]} ... {text[-90:]}"
    return text


def show_warnings() -> None:
    """From now on, the package's own warnings are lines of stderr like those of a run."""
    others = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DrmWarning):
            Screen().warn(str(message))
        else:
            others(message, category, *where, **more)

    warnings.simplefilter("always", DrmWarning)
    warnings.filterwarnings("ignore", module=r"PIL(\..*)?$")  # of metadata; a damaged picture is an error of ours
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # of merging, which drm does not do
    warnings.showwarning = show


def show_json(summary: dict[str, Any]) -> None:
    print(json.dumps(summary, indent=2, allow_nan=False))


def show_error(message: str, hint: str) -> None:
    """The two lines of every failure."""
    console = stderr()
    console.print("error: ", style="bold red", end="")
    console.print(plain(message, LONGEST))
    console.print("hint: ", style="bold", end="")
    console.print(plain(hint, LONGEST))
