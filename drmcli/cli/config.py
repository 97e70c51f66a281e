"""`drm config list|show`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Presets and config keys.")


@app.command("list")
def list_presets(as_json: o.Json = False) -> None:
    """Name the presets with what they are for.

    [bold]Example[/]

      drm config list
    """
    from drmcli.cli import onward
    from drmcli.cli.output import show_json, stdout
    from drmcli.cli.render import table
    from drmcli.config import preset_names, preset_text

    about = {name: preset_text(name).splitlines()[0].lstrip("# ") for name in preset_names()}
    if as_json:
        show_json(about)
        return
    made = table("presets", "name", "about")
    for name, text in about.items():
        made.add_row(name, text)
    stdout().print(made)
    onward.say(["drm", "config", "show", "tiny"])


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A preset.", autocompletion=o.offering(o.presets))],
    command: Annotated[
        str | None, typer.Option(help="Show every key of one command, resolved, with what it means.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Print a preset, or the whole config that it gives a command.

    [bold]Examples[/]

      drm config show tiny > my.yaml

      drm config show sd35-medium --command train-reward
    """
    from drmcli import config as configs
    from drmcli.cli.output import show_json, stdout
    from drmcli.errors import InputError

    if command is None:
        text = configs.preset_text(name)
        if as_json:
            import yaml

            show_json(yaml.safe_load(text))
        else:
            stdout().print(f"preset: {name}\n{text}", end="")
        return
    if command not in configs.COMMANDS:
        raise InputError(
            f"--command: there is no command {command!r}", hint=f"use one of {', '.join(configs.COMMANDS)}"
        )
    resolved = configs.to_dict(configs.resolve(command, preset=name))
    if as_json:
        show_json(resolved)
        return
    import yaml

    about = configs.describe(configs.COMMANDS[command])
    console = stdout()
    console.print(f"command: {command}")
    for key, value in resolved.items():
        console.print(f"# {about[key]}", style="dim")
        console.print(yaml.safe_dump({key: value}, allow_unicode=True, width=1000).rstrip())
