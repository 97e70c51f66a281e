"""`drm doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def doctor(
    device: o.Device = None,
    preset: o.Preset = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table to paste into a bug report.")] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show versions, devices, memory and access, and try a forward pass. Exits with 1 when something fails.

    [bold]Examples[/]

      drm doctor

      drm doctor --preset sd35-medium

      drm doctor --markdown
    """
    from drmcli.cli import onward
    from drmcli.cli.output import plain, show_json, stdout
    from drmcli.cli.render import table
    from drmcli.recipes import doctor as recipe

    found = recipe.examine(device=device or "auto", preset=preset or "tiny")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    if as_json:
        show_json(found)
    elif markdown:
        print("| | what | found | to do |\n|---|---|---|---|")
        for check in found["checks"]:
            cells = (check["state"], check["what"], check["found"], check["remedy"])
            print("| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |")
        print(f"\n{versions}")
    else:
        made = table("drm doctor", "", "what", "found", "to do")
        for check in found["checks"]:
            style = {"OK": "", "WARN": "yellow", "FAIL": "red"}[check["state"]]
            made.add_row(check["state"], check["what"], check["found"], check["remedy"], style=style)
        stdout().print(made)
        stdout().print(versions)
        if found["ok"]:
            onward.say(onward.after_doctor(preset or "tiny"))
    if not found["ok"]:
        raise typer.Exit(1)
