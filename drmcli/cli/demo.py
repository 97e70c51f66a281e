"""`drm demo`."""

from __future__ import annotations

from typing import Any

from drmcli.cli import options as o


@o.command("demo", "out steps updates seed device")
def demo(**options: Any) -> None:
    """The whole story on the embedded world, in minutes, with a report at the end.

    [bold]Examples[/]

      drm demo

      drm demo --out runs/look --steps 100
    """
    o.execute("demo", options)
