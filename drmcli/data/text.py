"""The one way text comes in: prompts, tables, JSON and YAML, from files, from stdin and from the command line.

Always UTF-8, whatever the locale. A byte order mark is taken off; a line ends at `\\n` or `\\r\\n` and nowhere else, since JSON and
prompts may hold U+2028 or U+0085. What no text can be (UTF-16, NUL bytes, lone surrogates) and what only an attacker or an accident
writes (brackets nested without end, YAML aliases that multiply) is an InputError that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from drmcli.errors import InputError

MAX_DEPTH = 64
"""Lists and mappings within each other; no file that drm reads needs more than six."""
MAX_NODES = 1_000_000
"""Values of a YAML document, each alias counted as what it stands for."""
MAX_SHOWN = 80
"""Characters of a value in a message."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def short(value: Any, limit: int = MAX_SHOWN) -> str:
    """A value as a message shows it: its repr on one line, cut to `limit` characters."""
    try:
        if isinstance(value, (str, bytes)):
            shown = repr(value[: limit + 1])  # a repr of megabytes is never made
        elif isinstance(value, (list, tuple, dict, set)):
            shown = repr(value) if _size(value, 200) < 200 else f"a {type(value).__name__} of {len(value)}"
        else:
            shown = repr(value)
    except (RecursionError, ValueError):  # a ValueError: an integer of more than 4,300 digits
        shown = f"a {type(value).__name__}, too large to show"
    return shown if len(shown) <= limit else shown[: limit - 4] + " ..."


def cut(text: str, limit: int = MAX_SHOWN) -> str:
    """Plain text on one line, cut to `limit` characters."""
    text = " ".join(text.split()) if len(text) < 10 * limit else " ".join(text[: 10 * limit].split()) + " ..."
    return text if len(text) <= limit else text[: limit - 4].rstrip() + " ..."


def filled(words: Iterable[str], pieces: Callable[[str], list[str]], fits: Callable[[str], bool]) -> Iterator[str]:
    """Lines of words, each as full as `fits` allows; the last may be empty. pieces: a word in parts that fit in a line by themselves."""
    line = ""
    for word in words:
        for piece in pieces(word):
            together = f"{line} {piece}" if line else piece
            if line and not fits(together):
                yield line
                line = piece
            else:
                line = together
    yield line


def kind(value: Any) -> str:
    """What a value of a file is, in words."""
    if value is None or (isinstance(value, float) and value != value):
        return "missing"
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    return f"a {type(value).__name__}"


def read_text(path: str | Path, *, name: str | None = None, hint: str = "give a text file") -> str:
    """A file's text. `name` stands for the file in errors, with the flag in front; default the path.

    Raises InputError when it is missing, no file, or not UTF-8 text.
    """
    name = str(path) if name is None else name
    path = os.path.expanduser(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{name}: a folder, not a file", hint=hint)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{name}: cannot be read: no such file", hint=f"check the path; {hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: cannot be read: {cut(reason)}", hint=hint) from None
    return decode(data, name)


def decode(data: bytes, name: str) -> str:
    """Bytes as UTF-8 text without its byte order mark. Raises InputError, naming UTF-16 and UTF-32 as such."""
    for mark, encoding in ((b"\xff\xfe\0\0", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if data.startswith(mark):
            raise InputError(f"{name}: {encoding}, not UTF-8 text", hint="save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        guess = "UTF-16" if data[:200].count(b"\0") * 3 > len(data[:200]) else "binary"
        raise InputError(f"{name}: not UTF-8 text but {guess} (a null byte at {at})", hint="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from None


def read_stdin(flag: str) -> str:
    """All of stdin as text. Raises InputError naming `flag` when there is none or it is not UTF-8."""
    try:
        stream = sys.stdin
        data = stream.buffer.read() if hasattr(stream, "buffer") else stream.read()
    except (AttributeError, OSError, ValueError) as error:
        raise InputError(f"{flag}: stdin cannot be read: {cut(str(error))}", hint="pipe lines into it") from None
    return decode(data, f"{flag} (stdin)") if isinstance(data, bytes) else data.removeprefix("\ufeff")


def lines(text: str) -> list[str]:
    """The lines of a text, which end at `\\n` or `\\r\\n` alone."""
    found = text.split("\n")
    return [line[:-1] if line.endswith("\r") else line for line in (found[:-1] if not found[-1] else found)]


def sound(text: str, name: str) -> str:
    """The text itself if it is one. Raises InputError for lone surrogates and null characters, which no file can hold."""
    if "\0" in text:
        raise InputError(f"{name}: holds a null character", hint="take it out")
    if _SURROGATE.search(text):
        shown = cut(text.encode("utf-8", "backslashreplace").decode())
        raise InputError(
            f"{name}: not UTF-8 text: {shown}", hint="use a UTF-8 terminal (PYTHONUTF8=1), or rename the file"
        )
    return text


def is_number(value: Any) -> bool:
    """Is a value of JSON or YAML a number that a finite float holds?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def repaired(text: str) -> str:
    """Text of the command line that a locale without UTF-8 has taken apart, put together again; else the text itself."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def parse_json(text: str, name: str, *, hint: str, unique: bool = False) -> Any:
    """A JSON value. `unique` refuses a key that an object has twice. Raises InputError naming `name`."""
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
        deep = _depth_exceeds(value, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({cut(str(error))})", hint=hint) from None
    if deep:
        raise InputError(f"{name} is not JSON that drm reads: nested too deep", hint=hint)
    return value


def parse_yaml(text: str, name: str, *, hint: str = "write `key: value` lines") -> Any:
    """A YAML value, scalars read as YAML 1.2 does: `010` is ten, `yes` and `1:30` are text, `1e-4` is a number.

    Raises InputError for what is not YAML, has a key twice, is nested too deep, or whose aliases multiply beyond bounds.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _Unbounded as error:
        raise InputError(f"{name}: {error}", hint=hint) from None
    except RecursionError:
        raise InputError(f"{name}: nested too deep", hint=hint) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML's constructors raise all of these for tags whose value does not fit.
        raise InputError(f"{name}: not YAML: {cut(str(error), 200)}", hint=hint) from None


def dump_yaml(value: Any) -> str:
    """YAML that any reader takes for the same value: a text is quoted when YAML 1.1 or 1.2 would read it as something else."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Unbounded(Exception):
    """A document beyond the bounds."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, and with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012, PyYAML's own way: a table a class
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unbounded("nested too deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {})
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
        base = {"0x": 16, "0o": 8}.get(digits[:2].lower(), 10)
        return sign * int(digits if base == 10 else digits[2:], base)

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which knows the scalars of YAML 1.1, with those of 1.2 besides."""

    yaml_implicit_resolvers = {key: list(pairs) for key, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


for _key, _pairs in _Loader.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_key, []).extend(_pairs)


def _expanded(node: Any, known: dict[int, int]) -> int:
    """Values below a node, aliases counted as often as they stand there. Raises _Unbounded for too many, and for a loop."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # what it keeps while it is looked at: met again, it holds itself
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for key in names if names.count(key) > 1] if len(names) < 1000 else []:
                raise _Unbounded(f"the key {short(twice[0])} is there twice")
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    if known[id(node)] > MAX_NODES:
        raise _Unbounded("aliases that multiply, or hold themselves: too large")
    return known[id(node)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {short(next(key for key in names if names.count(key) > 1))} is there twice")
    return made


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(limit):
        if not level:
            return False
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, (list, dict))
        ]
    return bool(level)


def _size(value: Any, limit: int) -> int:
    """Values within a value, counted to `limit` at most: of aliases that multiply, each is counted as often as it is met."""
    stack, count = [value], 0
    while stack and count < limit:
        one = stack.pop()
        count += 1
        if isinstance(one, dict):
            stack += list(one.values())[:limit]
        elif isinstance(one, (list, tuple)):
            stack += list(one)[:limit]
        elif isinstance(one, str) and len(one) > 10_000:
            return limit
    return count
