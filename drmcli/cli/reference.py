"""The command reference, made from the command line itself: `python -m drmcli.cli.reference > examples/guides/commands.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer.main

from drmcli.cli.app import make_app
from drmcli.config import COMMANDS

HEAD = """# Commands

Every option of every command; where a help page leaves some out, `drm COMMAND --help-all` shows them. A value is taken from the first
that has it: flag, `--set`, `--config`, `--preset`, default. Where no preset is named `tiny` is taken, which sets some keys to other values
than the defaults below: `drm config show tiny`. Every command has `--json` (one JSON object on stdout) and `--help`; those that make a run
have `--quiet` (the run folder's path alone) and `--debug` (tracebacks) too.

`drm --install-completion` teaches the shell (bash, zsh, fish, PowerShell) to complete commands, options and values: presets, modes,
datasets, scorers, and the runs and models under `runs/`.

This page is made by `python -m drmcli.cli.reference`.
"""
EVERYWHERE = {"--json", "--quiet", "--debug", "--help", "--help-all"}


def page() -> str:
    """The whole page as Markdown."""
    root = typer.main.get_command(make_app({*COMMANDS, "data"}, everything=True))
    return HEAD + "".join(_section(name, command) for name, command in _commands(root, "drm"))


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(name: str, command: Any) -> str:
    about = (command.help or "").split("[bold]Example")[0].strip()
    rows = [row for param in command.params if (row := _row(param))]
    table = "| option | |\n|---|---|\n" + "".join(rows) if rows else ""
    return f"\n## {name}\n\n{about}\n\n{table}"


def _row(param: Any) -> str | None:
    names = [*param.opts, *param.secondary_opts]
    if set(names) & EVERYWHERE:
        return None
    shown = param.metavar or param.name.upper() if param.param_type_name == "argument" else ", ".join(names)
    if param.param_type_name == "option" and param.metavar:
        shown += f" {param.metavar}"
    text = " ".join((getattr(param, "help", None) or "").split())
    cells = (cell.replace("|", r"\|") for cell in (f"`{shown}`", text))
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
