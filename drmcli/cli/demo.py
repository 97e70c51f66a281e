"""`drm demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def demo(
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Run folder (default: runs/demo).", rich_help_panel=o.RUN)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each reward model.")] = None,
    updates: Annotated[int | None, typer.Option(help="Updates of the alignment.")] = None,
    seed: o.Seed = None,
    device: o.Device = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The whole story on the embedded world, in minutes, with a report at the end.

    [bold]Examples[/]

      drm demo

      drm demo --out runs/look --steps 100
    """
    o.execute("demo", locals())
