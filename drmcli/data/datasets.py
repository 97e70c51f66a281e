"""Preference data: own files (Parquet, JSONL, CSV) and the published datasets, all read into `Preferences`.

Own files have columns `prompt, chosen, rejected` and optionally `prompt_id, pair_id, label, weight`; or `prompt,
images, ranking` (1 is best, ties allowed) and optionally `prompt_id, pair_id, weight`. Pictures are paths relative to
the file, or bytes: binary or `{"bytes", "path"}` cells in Parquet, `{"bytes": BASE64}` in JSONL. Lists in CSV cells
are JSON.
"""

from __future__ import annotations

import base64
import binascii
import csv
import difflib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from drmcli.data.archives import stays_inside
from drmcli.data.images import BadImage, BytesImage, FileImage, ImageSource, ParquetImage, load_image, parquet_cells
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
SUFFIXES = (".parquet", ".jsonl", ".csv")

Cell = str | ImageSource | None
"""A picture as a row names it: a path that is still to be checked, or its source."""


def read(
    name: str | Path, *, data_dir: str | Path | None = None, split: str | None = None, allow_outside: bool = False
) -> Preferences:
    """A published dataset by its name, from the folder `data_dir`, or an own file by its path.

    Raises MissingError for a published dataset that is not there, InputError for a name that is neither.
    """
    if (published := DATASETS.get(str(name))) is not None:
        split = split or published.default_split
        if split not in published.splits:
            raise InputError(f"{name}: has no split {split!r}", hint=f"use one of {', '.join(published.splits)}")
        if data_dir is None:
            raise MissingError(
                f"{name}: the folder with its {split} split is not given",
                hint=f"get it with `drm data get {name} --split {split}`, or name your copy with --data-dir DIR",
            )
        return published.reader(data_dir, split, name=str(name))
    if Path(name).suffix.lower() in SUFFIXES or os.path.exists(name):
        return read_file(name, allow_outside=allow_outside)
    names = ["shapes", *DATASETS]  # shapes is made, not read; but it may be what was meant
    close = difflib.get_close_matches(str(name), names, 1)
    raise InputError(
        f"{name}: neither a dataset nor a file",
        hint=f"did you mean {close[0]}?" if close else f"use {', '.join(names)}, or a {', '.join(SUFFIXES)} file",
    )


def read_file(path: str | Path, *, allow_outside: bool = False) -> Preferences:
    """Read an own Parquet, JSONL or CSV file of pairs or rankings, or the folder of one that `drm data make` wrote.

    Picture paths must stay in the file's folder, links included, unless `allow_outside`. Pictures themselves are not
    opened (bytes in Parquet are hashed, to list equal pictures once). In a file of pairs, `label` is the probability
    that `chosen` is better (default 1); below 0.5 the sides are swapped.

    Raises InputError naming the file and the row; nothing is guessed or skipped but pairs of a picture with itself.
    """
    path = Path(path)
    name = path.name
    if os.path.isfile(path / PREFERENCES):
        path = path / PREFERENCES
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}",
            hint=f"check the path; data is read from one file, or from a folder with {PREFERENCES}",
        )
    reader = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: not a Parquet, JSONL or CSV file by its name", hint=f"name it with {', '.join(SUFFIXES)}"
        )
    sources: dict[str, ImageSource] = {}
    rows, where = reader(path, sources)
    if not rows:
        raise InputError(f"{path}: has no rows", hint=f"write one row a pair, with columns {', '.join(PAIR_COLUMNS)}")
    guard = _Guard(path.parent, allow_outside)
    out: list[dict[str, Any]] = []
    ranking = "ranking" in rows[0]
    for number, row in enumerate(rows):
        place = f"{path}: {where(number)}"
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            raise InputError(f"{place}: prompt is {_kind(prompt)}, not text", hint="give each row its prompt as text")
        if not prompt.strip():
            raise InputError(f"{place}: the prompt is empty", hint="give the prompt, or remove the row")
        shared = {
            "prompt": prompt,
            "prompt_id": _id(row.get("prompt_id"), text_id(prompt)),
            "weight": _number(row, "weight", place, 1.0, 0.0, math.inf),
        }
        pair_id = _id(row.get("pair_id"), str(number))
        cells = row["images"] if ranking else [row["chosen"], row["rejected"]]
        if not isinstance(cells, list):
            raise InputError(
                f"{place}: images is {_kind(cells)}, not a list", hint='write images as ["a.png", "b.png"]'
            )
        keys = [_key(cell, place, guard, sources) for cell in cells]
        if ranking:
            ranks = _ranks(row["ranking"], len(keys), place)
            for i, j, label in zip(*ranked_pairs(ranks), strict=True):
                out.append(
                    {**shared, "pair_id": f"{pair_id}:{i}-{j}", "first": keys[i], "second": keys[j], "label": label}
                )
        else:
            label = _number(row, "label", place, 1.0, 0.0, 1.0)
            out.append({**shared, "pair_id": pair_id, "first": keys[0], "second": keys[1], "label": label})
    table = pd.DataFrame(out, columns=["prompt", "prompt_id", "weight", "pair_id", "first", "second", "label"])
    if (twice := table["pair_id"].duplicated()).any():
        raise InputError(
            f"{path}: pair_id {table['pair_id'][twice].iloc[0]!r} is there twice",
            hint="make pair_id unique, or leave it out",
        )
    preferences = assemble(name, "all", "strict", sources, table, draw_sides=not ranking)
    if not len(preferences):
        raise InputError(f"{path}: has no pair of two different pictures", hint="a ranking needs two pictures or more")
    return preferences


Rows = tuple[list[dict[str, Any]], Callable[[int], str]]
"""Rows with the known columns, and how to name the n-th one in an error."""


def _jsonl(path: Path, sources: dict[str, ImageSource]) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is not JSON ({error})", hint='one object a line: {"prompt": ..., "chosen": ...}'
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number} is {_kind(row)}, not an object",
                hint='one object a line: {"prompt": ..., "chosen": ...}',
            )
        _columns(path, row, rows[0] if rows else None, f"line {number}: ")
        for column in ("chosen", "rejected"):
            if column in row:
                row[column] = _json_cell(row[column], sources)
        if isinstance(row.get("images"), list):
            row["images"] = [_json_cell(cell, sources) for cell in row["images"]]
        rows.append(row)
        lines.append(number)
    return rows, lambda n: f"line {lines[n]}"


def _json_cell(cell: Any, sources: dict[str, ImageSource]) -> Any:
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), str):
        return cell.get("path") if isinstance(cell, dict) else cell
    try:
        data = base64.b64decode(cell["bytes"], validate=True)
    except (binascii.Error, ValueError):
        return cell  # refused, as what it is, when its row is read
    key = hashlib.sha256(data).hexdigest()[:32]
    return sources.setdefault(key, BytesImage(key, data))


def _csv(path: Path, sources: dict[str, ImageSource]) -> Rows:
    del sources  # CSV holds no bytes
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        header = reader.fieldnames or []
        if header:
            _columns(path, header, None)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}: line {reader.line_num} has another number of fields than the header",
                    hint='put text with commas in quotes: "a cat, asleep"',
                )
            filled = {column: value for column, value in row.items() if value != "" or column not in OPTIONAL_COLUMNS}
            for column in ("images", "ranking"):
                if column in filled and "ranking" in header:
                    filled[column] = _json_list(filled[column], f"{path}: line {reader.line_num}: {column}")
            rows.append(filled)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(
            f"{path}: not CSV after line {reader.line_num} ({error})",
            hint='put text with commas or quotes in quotes: "a ""big"" cat"',
        ) from None
    return rows, lambda n: f"line {lines[n]}"


def _json_list(text: str, place: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise InputError(
            f"{place} is not a JSON list: {text[:60]!r}", hint='write "[""a.png"", ""b.png""]" and "[1, 2]"'
        )
    return value


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})", hint="save it as UTF-8") from None


def _parquet(path: Path, sources: dict[str, ImageSource]) -> Rows:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _columns(path, schema.names, None)
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
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})",
            hint="write it again, or use .jsonl or .csv",
        ) from None
    return rows, lambda n: f"row {n}"


def _parquet_cell(cell: Any, at: tuple[Path, str, int, int, int | None], sources: dict[str, ImageSource]) -> Any:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        key = hashlib.sha256(data).hexdigest()[:32]
        return sources.setdefault(key, ParquetImage(key, *at))
    return cell.get("path") if isinstance(cell, dict) else cell


def _columns(path: Path, found: Iterable[str], first: dict[str, Any] | None, place: str = "") -> None:
    """Refuse a row or table without the columns of a pair or a ranking, with both, or unlike the first row."""
    names = set(found)
    kinds = [columns for columns in (PAIR_COLUMNS, RANKING_COLUMNS) if names.issuperset(columns)]
    needed = f"{', '.join(PAIR_COLUMNS)}, or {', '.join(RANKING_COLUMNS)}"
    if len(kinds) != 1 or names.issuperset({"chosen", "ranking"}):
        fact = "has columns of pairs and of rankings" if kinds else "lacks columns"
        raise InputError(f"{path}: {place}{fact}: found {', '.join(map(str, found))}", hint=f"needed: {needed}")
    if first is not None and not set(first).issuperset(kinds[0]):
        raise InputError(f"{path}: {place}pairs and rankings are mixed", hint="put them in two files and give both")


def _key(cell: Any, place: str, guard: _Guard, sources: dict[str, ImageSource]) -> str:
    """The key of a picture; a path becomes a source when it is met first."""
    if isinstance(cell, ImageSource):
        return cell.key
    if not isinstance(cell, str) or not cell.strip():
        raise InputError(
            f"{place}: a picture is {_kind(cell)}, not a path or bytes",
            hint="give a path relative to the file, or the file's bytes",
        )
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

    def path(self, name: str, place: str) -> Path:
        if "\0" in name:
            raise InputError(f"{place}: {name!r} is not a path", hint="give a path relative to the file")
        path = self._folder / name
        if self._allow:
            return path
        if not stays_inside(name) or not self._stays(path):
            raise InputError(
                f"{place}: the path {name!r} leaves the file's folder",
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
        raise InputError(f"{place}: {n} images, but {length} ranks", hint="give one rank an image, 1 for the best")
    for rank in value:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
            raise InputError(f"{place}: {rank!r} is not a rank", hint="give one number an image, 1 for the best")
    return [float(rank) for rank in value]


def _number(row: dict[str, Any], column: str, place: str, default: float, low: float, high: float) -> float:
    value = row.get(column)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (low <= number <= high) or math.isinf(number):
        allowed = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise InputError(f"{place}: {column} is {value!r}", hint=f"give a number {allowed}, or leave {column} out")
    return number


def _id(value: Any, default: str) -> str:
    return default if value is None or value == "" else str(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    return f"a {type(value).__name__}"
