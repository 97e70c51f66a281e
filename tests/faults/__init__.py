"""Kinds of bad input and faults, a row each: files, command line, exit code, and what is said.

Lists are kept by part in the modules beside this one; `tests/test_faults.py` runs them all, in this process. To add a kind, add a
`fault(...)` to a list, or a list of one's own to `MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("text", "data", "options", "scorers", "results", "places", "weights")


@dataclass
class Fault:
    """One kind."""

    name: str
    command: list[str]
    code: int
    says: str
    """Pattern in stdout or stderr."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    """Makes what cannot be written as text, in the folder where the command runs."""
    never: str = ""
    """Pattern that neither stream may have."""
    env: dict[str, str] = field(default_factory=dict)
    stdin: str | bytes | None = None


def fault(
    name: str, command: str | list[Any], code: int, says: str, files: dict[str, str | bytes] | None = None, **more: Any
) -> Fault:
    """A row. `command`: as in a shell, without `drm`."""
    import shlex

    parts = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
    return Fault(name, parts, code, says, files or {}, **more)


def every() -> list[Fault]:
    """All rows of all lists."""
    from importlib import import_module

    found = [row for module in MODULES for row in import_module(f"faults.{module}").FAULTS]
    names = [row.name for row in found]
    assert len(set(names)) == len(names), "two rows of one name"
    return found
