"""`drm show`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Show a finished or running run: its tables, plots and an HTML report.

    [bold]Examples[/]

      drm show runs/demo

      drm show runs/demo/train-pretrained --json
    """
    from drmcli.cli import render
    from drmcli.cli.output import show_json, stdout
    from drmcli.recipes import show as recipe

    found = recipe.gather(run)
    report = recipe.write_report(found)
    if as_json:
        tables = {name: len(table) for name, table in found["tables"].items()}
        show_json({"run": run, "report": str(report), "summary": found["summary"], "tables": tables})
        return
    if quiet:
        print(run)
        return
    command = found["config"]["command"]
    if found["summary"] and command in render.SUMMARIES:
        render.SUMMARIES[command](found["summary"])
    for name, table in found["tables"].items():
        made = render.table(f"\n{name}: {len(table)} rows, the last of them", *map(str, table.columns))
        for _, row in table.tail(5).iterrows():
            made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
        stdout().print(made)
    if not found["summary"]:
        stdout().print("not finished: run the same command again to go on")
    stdout().print(f"report: {report}")
