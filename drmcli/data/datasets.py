"""Preference data: own files (Parquet, JSONL, CSV) and the published datasets, all read into `Preferences`.

Own files have columns `prompt, chosen, rejected` and optionally `prompt_id, pair_id, label, weight`; or `prompt,
images, ranking` (1 is best, ties allowed) and optionally `prompt_id, pair_id, weight`. Pictures are paths relative to
the file, or bytes: binary or `{"bytes", "path"}` cells in Parquet, `{"bytes": BASE64}` in JSONL. Lists in CSV cells
are JSON.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from drmcli.data.archives import stays_inside
from drmcli.data.images import BadImage, BytesImage, FileImage, ImageSource, ParquetImage, load_image, parquet_cells
from drmcli.data.parquet import opened
from drmcli.data.preferences import (
    CheckReport,
    Overlap,
    Preferences,
    assemble,
    check,
    mix,
    overlap,
    ranked_pairs,
    text_id,
)
from drmcli.data.published_layouts import DATASETS, Published, read_hpdv2, read_hpdv3, read_imagereward, read_pickapic
from drmcli.data.rows import MAX_BAD, BadRow, LeftOut, Table, sound_prompt
from drmcli.data.text import cut, kind, lines, parse_json, read_text, short, sound
from drmcli.errors import InputError, MissingError

__all__ = [
    "DATASETS", "BadImage", "CheckReport", "ImageSource", "Overlap", "Preferences", "Published", "check", "load_image",
    "mix", "overlap", "read", "read_file", "read_hpdv2", "read_hpdv3", "read_imagereward", "read_pickapic",
]  # fmt: skip

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
RANKING_COLUMNS = ("prompt", "images", "ranking")
OPTIONAL_COLUMNS = ("prompt_id", "pair_id", "label", "weight")
PREFERENCES = "preferences.parquet"
"""The file of a folder that `drm data make` or `drm data label` wrote."""
SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")


def read(
    name: str | Path,
    *,
    data_dir: str | Path | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    max_bad: float = MAX_BAD,
) -> Preferences:
    """A published dataset by its name, from the folder `data_dir`, or an own file by its path.

    Rows that cannot be used are left out up to `max_bad` percent and listed in `bad_rows`. Raises MissingError for a published dataset
    that is not there, InputError for a name that is neither, and for more bad rows.
    """
    if (published := DATASETS.get(str(name))) is not None:
        split = split or published.default_split
        if split not in published.splits:
            raise InputError(f"{name}: has no split {short(split)}", hint=f"use one of {', '.join(published.splits)}")
        if data_dir is None:
            raise MissingError(
                f"{name}: the folder with its {split} split is not given",
                hint=f"get it with `drm data get {name} --split {split}`, or name your copy with --data-dir DIR",
            )
        return published.reader(data_dir, split, name=str(name), max_bad=max_bad)
    if Path(name).suffix.lower() in SUFFIXES or os.path.exists(name):
        return read_file(name, allow_outside=allow_outside, max_bad=max_bad)
    names = ["shapes", *DATASETS]  # shapes is made, not read; but it may be what was meant
    close = difflib.get_close_matches(str(name)[:80], names, 1)
    raise InputError(
        f"{cut(str(name))}: neither a dataset nor a file",
        hint=f"did you mean {close[0]}?" if close else f"use {', '.join(names)}, or a {', '.join(SUFFIXES)} file",
    )


ONE_PAIR = '{"prompt": "an ocean", "chosen": "a.png", "rejected": "b.png"}'
"""A line of an own file."""


def read_file(path: str | Path, *, allow_outside: bool = False, max_bad: float = MAX_BAD) -> Preferences:
    """Read an own Parquet, JSONL or CSV file of pairs or rankings, or the folder of one that `drm data make` wrote.

    Picture paths must stay in the file's folder, links included, unless `allow_outside`; a backslash in them is the separator of
    Windows where no file has it in its name. Pictures themselves are not opened (bytes in Parquet are hashed, to list equal pictures
    once). In a file of pairs, `label` is the probability that `chosen` is better (default 1); below 0.5 the sides are swapped.

    A row that cannot be used is left out, counted and listed in `bad_rows`, up to `max_bad` percent. Raises InputError naming the
    file and the first such row when there are more, and for a file whose form leaves open what is meant.
    """
    path = Path(path)
    name = path.name
    if os.path.isfile(path / PREFERENCES):
        path = path / PREFERENCES
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}",
            hint=f"check the path, or write it: {ONE_PAIR}, a line a pair; or give a folder with {PREFERENCES}",
        )
    reader = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: not a Parquet, JSONL or CSV file by its name", hint=f"name it with {', '.join(SUFFIXES)}"
        )
    sources: dict[str, ImageSource] = {}
    bad = LeftOut(max_bad)
    rows = reader(path, sources, bad)
    total = len(rows) + len(bad.faults)
    if not total:
        raise InputError(f"{path}: has no rows", hint=f"write one row a pair, with columns {', '.join(PAIR_COLUMNS)}")
    bad.settle(total)
    guard = _Guard(path.parent, allow_outside)
    ranking = "ranking" in rows[0][1]
    out: list[dict[str, Any]] = []
    for number, (place, row) in enumerate(rows):
        try:
            out += _comparisons(row, number, f"{path}: {place}", ranking, guard, sources)
        except BadRow as fault:
            bad.add(fault)
    bad.settle(total)
    table = pd.DataFrame(out, columns=["prompt", "prompt_id", "weight", "pair_id", "first", "second", "label"])
    if (twice := table["pair_id"].duplicated()).any():
        raise InputError(
            f"{path}: pair_id {short(table['pair_id'][twice].iloc[0])} is there twice",
            hint="make pair_id unique (a row without one is called by its number, from 0), or leave it out",
        )
    preferences = assemble(name, "all", "strict", sources, table, draw_sides=not ranking, bad_rows=bad.names)
    if not len(preferences):
        raise InputError(f"{path}: has no pair of two different pictures", hint="a ranking needs two pictures or more")
    return preferences


def _comparisons(
    row: dict[str, Any], number: int, place: str, ranking: bool, guard: _Guard, sources: dict[str, ImageSource]
) -> list[dict[str, Any]]:
    """The comparisons of one row, as `assemble` takes them. Raises BadRow."""
    prompt = sound_prompt(row["prompt"], place)
    shared = {
        "prompt": prompt,
        "prompt_id": _id(row.get("prompt_id"), text_id(prompt), f"{place}: prompt_id"),
        "weight": _weight(row, place),
    }
    pair_id = _id(row.get("pair_id"), str(number), f"{place}: pair_id")
    cells = row["images"] if ranking else [row["chosen"], row["rejected"]]
    if not isinstance(cells, list):
        raise BadRow(f"{place}: images is {kind(cells)}, not a list", hint='write images as ["a.png", "b.png"]')
    keys = [_key(cell, place, guard, sources) for cell in cells]
    if not ranking:
        label = _number(row, "label", place, 1.0, 0.0, 1.0)
        return [{**shared, "pair_id": pair_id, "first": keys[0], "second": keys[1], "label": label}]
    ranks = _ranks(row["ranking"], len(keys), place)
    return [
        {**shared, "pair_id": f"{pair_id}:{i}-{j}", "first": keys[i], "second": keys[j], "label": label}
        for i, j, label in zip(*ranked_pairs(ranks), strict=True)
    ]


Rows = list[tuple[str, dict[str, Any]]]
"""(place in the file, row with the known columns)."""
_OBJECT = 'one object a line: {"prompt": ..., "chosen": ..., "rejected": ...}'


def _jsonl(path: Path, sources: dict[str, ImageSource], bad: LeftOut) -> Rows:
    rows: Rows = []
    for number, line in enumerate(lines(read_text(path)), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = parse_json(line, f"{path}: {place}", hint=_OBJECT, unique=True)
            if not isinstance(row, dict):
                raise BadRow(f"{path}: {place} is {kind(row)}, not an object", hint=_OBJECT)
            _columns(path, row, f"{place}: ")
        except InputError as error:
            bad.add(BadRow(error.message, hint=error.hint))
            continue
        if rows and ("ranking" in row) != ("ranking" in rows[0][1]):
            raise InputError(
                f"{path}: {place}: pairs and rankings are mixed", hint="put them in two files and give both"
            )
        for column in ("chosen", "rejected"):
            if column in row:
                row[column] = _json_cell(row[column], sources)
        if isinstance(row.get("images"), list):
            row["images"] = [_json_cell(cell, sources) for cell in row["images"]]
        rows.append((place, row))
    return rows


def _json_cell(cell: Any, sources: dict[str, ImageSource]) -> Any:
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), str):
        return cell.get("path") if isinstance(cell, dict) else cell
    try:
        data = base64.b64decode(cell["bytes"], validate=True)
    except (binascii.Error, ValueError):
        return cell  # refused, as what it is, when its row is read
    key = hashlib.sha256(data).hexdigest()[:32]
    return sources.setdefault(key, BytesImage(key, data))


def _csv(path: Path, sources: dict[str, ImageSource], bad: LeftOut) -> Rows:
    del sources  # a table of text holds no bytes
    table = Table(read_text(path), str(path), (*PAIR_COLUMNS, *RANKING_COLUMNS, *OPTIONAL_COLUMNS))
    if table.columns:
        _columns(path, table.columns)
    rows: Rows = []
    for line, row in table.rows(bad.add):
        filled: dict[str, Any] = {k: v for k, v in row.items() if v != "" or k not in OPTIONAL_COLUMNS}
        try:
            if "ranking" in table.columns:
                for column in ("images", "ranking"):
                    filled[column] = _json_list(row[column], f"{path}: line {line}: {column}")
        except BadRow as fault:
            bad.add(fault)
            continue
        rows.append((f"line {line}", filled))
    return rows


def _json_list(text: str, place: str) -> list[Any]:
    fault = BadRow(f"{place} is not a JSON list: {short(text)}", hint='write "[""a.png"", ""b.png""]" and "[1, 2]"')
    try:
        value = parse_json(text, place, hint=fault.hint)
    except InputError:
        raise fault from None
    if not isinstance(value, list):
        raise fault
    return value


def _parquet(path: Path, sources: dict[str, ImageSource], bad: LeftOut) -> Rows:
    del bad  # a Parquet file is whole or damaged; its cells are looked at later
    try:
        with opened(path) as file:
            schema = file.schema_arrow
            _columns(path, schema.names)
            pictures = ("images",) if "ranking" in schema.names else ("chosen", "rejected")
            plain = [c for c in ("prompt", "ranking", *OPTIONAL_COLUMNS) if c in schema.names]
            rows = file.read(columns=plain).to_pylist()
        for column in pictures:
            for number, (group, row, cell) in enumerate(parquet_cells(path, column)):
                rows[number][column] = (
                    [_parquet_cell(item, (path, column, group, row, i), sources) for i, item in enumerate(cell)]
                    if isinstance(cell, list)
                    else _parquet_cell(cell, (path, column, group, row, None), sources)
                )
    except (pa.ArrowException, OSError, ValueError) as error:  # a ValueError: text that is no UTF-8
        raise InputError(
            f"{path}: not a readable Parquet file ({cut(str(error), 200)})",
            hint="write it again, or use .jsonl or .csv",
        ) from None
    return [(f"row {number}", row) for number, row in enumerate(rows)]


def _parquet_cell(cell: Any, at: tuple[Path, str, int, int, int | None], sources: dict[str, ImageSource]) -> Any:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        key = hashlib.sha256(data).hexdigest()[:32]
        return sources.setdefault(key, ParquetImage(key, *at))
    return cell.get("path") if isinstance(cell, dict) else cell


def _columns(path: Path, found: Iterable[str], place: str = "") -> None:
    """Refuse a row or table without the columns of a pair or a ranking, with both, or with one of them twice."""
    listed = list(found)
    names = set(listed)
    needed = f"{', '.join(PAIR_COLUMNS)}, or {', '.join(RANKING_COLUMNS)}"
    if twice := [name for i, name in enumerate(listed) if name and name in listed[:i]]:
        raise InputError(
            f"{path}: {place}the column {short(twice[0])} is there twice", hint="rename or remove one of them"
        )
    kinds = [columns for columns in (PAIR_COLUMNS, RANKING_COLUMNS) if names.issuperset(columns)]
    if len(kinds) != 1 or names.issuperset({"chosen", "ranking"}):
        fact = "has columns of pairs and of rankings" if kinds else "lacks columns"
        shown = cut(", ".join(map(str, listed[:20])), 200)
        raise InputError(f"{path}: {place}{fact}: found {shown or 'none'}", hint=f"needed: {needed}")


def _key(cell: Any, place: str, guard: _Guard, sources: dict[str, ImageSource]) -> str:
    """The key of a picture; a path becomes a source when it is met first."""
    if isinstance(cell, ImageSource):
        return cell.key
    if not isinstance(cell, str) or not cell.strip():
        raise BadRow(
            f"{place}: a picture is {kind(cell)}, not a path or bytes",
            hint="give a path relative to the file, or the file's bytes",
        )
    if cell not in sources:
        cell = guard.native(cell, place)
    if cell not in sources:
        sources[cell] = FileImage(cell, guard.path(cell, place))
    return cell


class _Guard:
    """Turns listed names into paths that stay in a folder, links included."""

    def __init__(self, folder: Path, allow_outside: bool):
        self._folder = folder
        self._allow = allow_outside
        self._root = os.path.realpath(folder)
        self._parents: dict[Path, bool] = {}

    def native(self, name: str, place: str) -> str:
        """The name with this system's separators: lists made on Windows have backslashes."""
        if "\0" in name:
            raise BadRow(f"{place}: {short(name)} is not a path", hint="give a path relative to the file")
        _text(name, place)
        if "\\" in name and stays_inside(name) and not (self._folder / name).exists():
            return name.replace("\\", "/")
        return name

    def path(self, name: str, place: str) -> Path:
        path = self._folder / name
        if self._allow:
            return path
        if not stays_inside(name) or not self._stays(path):
            raise InputError(
                f"{place}: the path {short(name)} leaves the file's folder",
                hint="move the pictures below it, or pass --allow-outside",
            )
        return path

    def _stays(self, path: Path) -> bool:
        """One resolution a folder, not a picture: a file in it can only leave when it is a link itself."""
        parent = path.parent
        if parent not in self._parents:
            self._parents[parent] = self._inside(parent)
        return self._parents[parent] and (not os.path.islink(path) or self._inside(path))

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._root)


def _ranks(value: Any, n: int, place: str) -> list[float]:
    if not isinstance(value, list) or len(value) != n:
        length = len(value) if isinstance(value, list) else "no"
        raise BadRow(f"{place}: {n} images, but {length} ranks", hint="give one rank an image, 1 for the best")
    ranks = [
        _float(rank) if isinstance(rank, (int, float)) and not isinstance(rank, bool) else math.nan for rank in value
    ]
    for rank, given in zip(ranks, value):
        if not math.isfinite(rank):
            raise BadRow(f"{place}: {short(given)} is not a rank", hint="give one number an image, 1 for the best")
    return ranks


def _float(value: Any) -> float:
    """A number, not a number where it is none or too large for one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number(row: dict[str, Any], column: str, place: str, default: float, low: float, high: float) -> float:
    value = row.get(column)
    if value is None:
        return default
    number = _float(value)
    if not (low <= number <= high) or math.isinf(number):
        allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise BadRow(f"{place}: {column} is {short(value)}", hint=f"give a number {allowed}, or leave {column} out")
    return number


def _weight(row: dict[str, Any], place: str) -> float:
    """0, or a weight that float32 can hold and sum."""
    weight = _number(row, "weight", place, 1.0, 0.0, 1e30)
    if 0 < weight < 1e-30:
        raise BadRow(f"{place}: weight is {weight:g}", hint="give 0, or a number from 1e-30 to 1e+30")
    return weight


def _id(value: Any, default: str, place: str) -> str:
    if value is None or value == "" or value != value:
        return default
    if isinstance(value, (list, dict)):
        raise BadRow(f"{place} is {kind(value)}", hint="give text or a number, or leave it out")
    return _text(str(value), place)


def _text(value: str, place: str) -> str:
    try:
        return sound(value, place)
    except InputError as error:
        raise BadRow(error.message, hint=error.hint) from None
