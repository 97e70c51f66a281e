"""Help pages, drawn from the commands themselves. Typer's own take twice the time: they import Rich's Markdown to print plain text."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection
from typing import Any

WIDEST = 100
"""Columns of a page at most."""
LEFT = 34
"""Columns of the options' names at most; what is longer has a line of its own."""
HELP = ("-h", "--help")


def asked(root: Any, argv: Collection[str]) -> str | None:
    """The page that a command line asks for: by --help, or by giving nothing to a command that needs something."""
    if any(name.startswith("_DRM") and name.endswith("_COMPLETE") for name in os.environ):
        return None
    command, path, wanted, more = root, "drm", False, 0
    for word in argv:
        if word == "--":
            break
        if word in HELP:
            wanted = True
        elif hasattr(command, "commands") and word in command.commands:
            command, path, more = command.commands[word], f"{path} {word}", 0
        elif hasattr(command, "commands") and not word.startswith("-"):
            return None  # no such command, which Typer tells
        else:
            more += 1
    if not wanted and (more or not command.no_args_is_help):
        return None
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return page(command, path, max(20, width), bold=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def page(command: Any, path: str, width: int, *, bold: bool = False) -> str:
    """Usage, what it does, examples, and the options by panel; of a group its commands."""
    group = hasattr(command, "commands")
    params = [p for p in command.params if not p.hidden]
    arguments = [p for p in params if p.param_type_name == "argument"]
    usage = [path, "[OPTIONS]", *map(_usage, arguments), *(["COMMAND ..."] if group else [])]
    head = textwrap.wrap(f"Usage: {' '.join(usage)}", width, subsequent_indent="  ", break_long_words=False)
    lines = [*head, "", *_about(command.help or "", width)]
    panels: dict[str, list[tuple[str, str]]] = {}
    for name, inner in command.commands.items() if group else ():
        about = " ".join(inspect.cleandoc(inner.help or "").split("\n\n")[0].split())
        panels.setdefault(inner.rich_help_panel or "Commands", []).append(
            (name, re.split("[;:.] ", about)[0].rstrip(".") + ".")
        )
    for p in arguments:
        panels.setdefault("Arguments", []).append((p.metavar or p.name.upper(), p.help or ""))
    for p in params:
        if p.param_type_name == "option":
            names = ", ".join(sorted(p.opts, key=lambda name: name.count("-"), reverse=True) + p.secondary_opts)
            kind = "" if p.is_flag else f" {p.metavar or 'TEXT'}"
            panels.setdefault(p.rich_help_panel or "Options", []).append((names + kind, p.help or ""))
    last = next((title for title in reversed(panels) if title != "Arguments" and not group), "Options")
    panels.setdefault(last, []).append(("--help, -h", "Show this page."))
    left = min(LEFT, max(len(name) for rows in panels.values() for name, _ in rows)) + 2
    for title, rows in panels.items():
        lines += ["", _bold(title, bold)]
        for name, about in rows:
            lines += _row(name, about, left, width)
    return "\n".join(lines)


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _row(name: str, about: str, left: int, width: int) -> list[str]:
    """A name and, beside or below it, what it is."""
    room = width - left - 2
    below = len(name) + 2 > left or room < 24
    indent = 6 if room < 24 else left + 2
    text = textwrap.wrap(" ".join(about.split()), width - indent, break_on_hyphens=False) or [""]
    rest = [" " * indent + line for line in text]
    if not below:
        rest[0] = f"  {name:<{left}}{text[0]}"
    return [line.rstrip() for line in ([f"  {name}", *rest] if below else rest)]


def _about(text: str, width: int) -> list[str]:
    """Paragraphs, filled; examples a line each, going on in the next one as the shell has it."""
    lines: list[str] = []
    examples = False
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        words = " ".join(re.sub(r"\[/?[a-z]*\]", "", paragraph).split())
        if examples:
            lines += _example(words, width)
        else:
            lines += ([""] if lines else []) + textwrap.wrap(words, width, break_on_hyphens=False)
        examples = examples or paragraph.startswith("[bold]Example")
    return lines


def _example(words: str, width: int) -> list[str]:
    """A command line; where it is broken, neither a quoted text nor an option and its value are torn apart."""
    kept = re.sub('"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), words)
    kept = re.sub(r"(--[a-z-]+) (?!-)", "\\1\0", kept)
    whole = textwrap.wrap(kept, width - 4, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return ["  " + line.replace("\0", " ") + (" \\" if i < len(whole) - 1 else "") for i, line in enumerate(whole)]


def _bold(text: str, on: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if on else text
