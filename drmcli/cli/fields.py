"""The fields of a command's config, read from the text of `drmcli.config`: name, type, bounds, default and the line below each.

The configs themselves are pydantic's, whose import takes longer than a help page may. So that a flag never repeats a field, the
command line is made from what is written there; the values are checked by pydantic when the command runs.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import drmcli

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
LINE = 54
"""Characters that a help page of 100 columns has for an option."""
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


@dataclass(frozen=True)
class ConfigField:
    """One key of a config."""

    name: str
    kind: type
    """int, float, str or bool; of each entry where there are many."""
    many: bool
    choices: tuple[str, ...]
    bounds: str
    default: Any
    """None where there is none to show."""
    about: str

    @property
    def short(self) -> str:
        """What a help page has a line for."""
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}."
        text = self.about.split("; ")[0].rstrip(" .,;:")
        return textwrap.shorten(text, LINE, placeholder=" ...").rstrip(" .") + (" ..." if len(text) > LINE else ".")

    @property
    def long(self) -> str:
        """All of it."""
        choices = f" One of {', '.join(self.choices)}." if self.choices else ""
        bounds = f" {self.bounds[0].upper()}{self.bounds[1:]}." if self.bounds else ""
        default = "" if self.default in (None, "", []) else f" Default: {self.default}."
        return self.about + choices + bounds + default


@cache
def _source() -> tuple[dict[str, ast.ClassDef], dict[str, ast.expr]]:
    """Classes and module-level names of the config package."""
    classes: dict[str, ast.ClassDef] = {}
    names: dict[str, ast.expr] = {}
    for file in sorted((Path(drmcli.__file__).parent / "config").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                names[node.target.id] = node.value
    return classes, names


def singular() -> dict[tuple[str, str], str]:
    """Names of flags that are repeated to fill a list, by command and key."""
    return ast.literal_eval(_source()[1]["SINGULAR"])


@cache
def fields_of(command: str) -> dict[str, ConfigField]:
    """The fields of a command's config, the most special first, then what it shares with others."""
    classes, names = _source()
    commands = names["COMMANDS"]
    assert isinstance(commands, ast.Dict)
    cls = next(v for k, v in zip(commands.keys, commands.values) if isinstance(k, ast.Constant) and k.value == command)
    assert isinstance(cls, ast.Name)
    found: dict[str, ConfigField] = {}
    waiting = [cls.id]
    while waiting:
        node = classes[waiting.pop(0)]
        for item, line in zip(node.body, [*node.body[1:], None]):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id not in found:
                about = line.value.value if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) else ""
                found[item.target.id] = _field(item, " ".join(str(about).split()))
        waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return found


def _field(node: ast.AnnAssign, about: str) -> ConfigField:
    assert isinstance(node.target, ast.Name)
    kind, many, choices, bounds = _type(node.annotation)
    return ConfigField(node.target.id, kind, many, choices, bounds, _default(node.value), about)


def _type(node: ast.expr) -> tuple[type, bool, tuple[str, ...], str]:
    """Type, whether it is a list, choices and bounds of an annotation."""
    if isinstance(node, ast.BinOp):  # X | None
        return _type(node.left if not isinstance(node.left, ast.Constant) else node.right)
    if isinstance(node, ast.Name):
        return (TYPES[node.id], False, (), "") if node.id in TYPES else _type(_source()[1][node.id])
    assert isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Literal":
        return str, False, tuple(ast.literal_eval(x) for x in inner), ""
    kind, many, choices, bounds = _type(inner[0])
    if node.value.id == "Annotated":
        words = [
            BOUNDS[k.arg].format(ast.literal_eval(k.value))
            for call in inner[1:]
            if isinstance(call, ast.Call)
            for k in call.keywords
            if k.arg in BOUNDS
        ]
        return kind, many, choices, ", ".join(words)
    assert node.value.id == "list"
    return kind, True, choices, bounds


def _default(node: ast.expr | None) -> Any:
    """The default as it is written; that of a factory without arguments too."""
    if isinstance(node, ast.Call):
        factory = next((k.value for k in node.keywords if k.arg == "default_factory"), None)
        node = factory.body if isinstance(factory, ast.Lambda) else None
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # computed
        return None
