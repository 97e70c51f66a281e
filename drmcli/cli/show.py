"""`drm show`."""

from __future__ import annotations

import math
from typing import Annotated

from drmcli.cli import options as o


def show(
    run: Annotated[
        str | None,
        o.run_argument("the newest in runs/"),
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Show a finished or running run: its tables, plots and an HTML report.

    [bold]Examples[/]

      drm show

      drm show runs/demo

      drm show runs/demo/train-pretrained --json
    """
    from drmcli.cli import onward, render
    from drmcli.cli.output import show_json, stdout
    from drmcli.errors import InputError
    from drmcli.recipes import show as recipe

    run = run or recipe.newest()
    found = recipe.gather(run)
    report = recipe.write_report(found)
    if as_json:
        tables = {name: len(table) for name, table in found.tables.items()}
        more = {"problems": found.problems} if found.problems else {}
        show_json({"run": run, "report": str(report), "summary": found.summary, "tables": tables} | more)
    elif quiet:
        print(run)
    else:
        following = None
        try:
            if found.summary and found.command in render.SUMMARIES:
                render.SUMMARIES[found.command](found.summary)
            following = onward.after_show(run, found.command, found.config, found.summary)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            fault = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
            found.problems.append(f"RUN {run}: its summary.json {fault}")
        for name, table in found.tables.items():
            columns = [c for c in COLUMNS.get(name, table.columns) if c in table.columns] or list(table.columns)
            made = render.table(f"\n{name}: {len(table)} rows, the last of them", *map(str, columns))
            for _, row in table.tail(5).iterrows():
                made.add_row(*(_cell(row[c]) for c in columns))
            stdout().print(made)
        if not found.finished:
            stdout().print("not finished: run the same command again to go on")
        stdout().print(f"report: {report}")
        if not found.problems:
            onward.say(following)
    if found.problems:
        raise InputError("; ".join(found.problems), hint="the rest is shown; run the command again with --overwrite")


def _cell(value: object) -> str:
    """A value of a table as people read it."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    if type(value).__name__ in ("bool", "bool_"):  # Python's and NumPy's
        return "yes" if value else "no"
    return "-" if value is None else str(value)


COLUMNS = {
    "metrics": ("step", "update", "loss", "accuracy", "reward_mean", "group_std", "kl", "grad_norm", "lr", "seconds"),
    "pairs": ("chosen", "rejected", "sigma", "score_chosen", "score_rejected", "prompt"),
    "scores": ("image", "sigma", "score", "prompt"),
    "images": ("path", "score", "seed", "prompt"),
    "candidates": ("image_id", "step", "sigma", "candidate", "score", "kept"),
    "rollouts": ("update", "step", "sigma", "candidate", "score", "advantage", "kept", "prompt"),
}
"""Columns of a run's tables that say most; a table that is not named shows all."""
