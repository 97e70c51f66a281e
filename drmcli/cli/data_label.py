"""`drm data label`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from drmcli.cli import options as o


def label(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of `drm data make --label people`.")],
    port: Annotated[int | None, typer.Option(metavar="N", help="Port; 0 takes a free one (default: 8765).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1, this machine).")] = None,
    active: Annotated[
        str | None,
        typer.Option(metavar="SCORER", help="Ask first where this scorer is least sure."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Pairs to ask of each labeller (default: all).")
    ] = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attention: Annotated[str | None, typer.Option(metavar="NAME", help="Attention kernels of --active.")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="Compile the blocks of --active with torch.compile.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="8 bits for the weights of --active: none, int8 or fp8.")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Let people vote in the browser: left, right, tie, skip, undo, by keyboard. Every vote is on disk before the next pair shows.

    The folder is then a dataset: `drm train-reward --data DIR`. Several people may vote, each under a name; Ctrl-C ends it.

    [bold]Examples[/]

      drm data make prompts.txt --label people --out mine && drm data label mine

      drm data label mine --active runs/reward/reward --limit 300
    """
    from drmcli import config as configs
    from drmcli.cli import onward
    from drmcli.cli.output import Screen, show_json, stdout
    from drmcli.files import read_object
    from drmcli.recipes import data_label as recipe

    options = {"folder": folder, "port": port, "host": host, "active": active, "limit": limit, "seed": seed}
    options |= {"device": device, "dtype": dtype, "attention": attention, "compile": compile_, "quantize": quantize}
    resolved = configs.resolve("data-label", flags=options)
    result = sys.stdout  # while the screen is open, stdout is stderr
    with Screen(quiet=quiet or as_json) as screen:

        def said(url: str) -> None:
            print(url if quiet or as_json else f"vote at {url}  (Ctrl-C ends it)", file=result, flush=True)

        summary = recipe.run(resolved, screen, said)
    if as_json:
        show_json(summary)
    elif quiet:
        print(summary["run"])
    else:
        agreed = "" if summary["agreement"] is None else f", labellers agree on {summary['agreement']:.0f} %"
        stdout().print(f"{summary['n_pairs']} pairs{agreed}: {summary['data']}")
        onward.say(
            onward.after("data-label", summary, read_object(Path(folder) / "config.yaml", f"DIR {folder}") or {})
        )
