"""Rows of tensors on disk by key: shards of safetensors, each written whole or not at all, and an index of all keys.

A killed run leaves nothing half-done and several processes may write side by side. Rows are read straight from the mapped files. A
million keys are columns, not Python objects: they are found again in a second.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drmcli.data.parquet import read_table
from drmcli.errors import DrmError, InputError, RunError
from drmcli.files import disk_is_full, write_bytes

SHARD_BYTES = 256 * 2**20
"""Bytes of a shard, from which on it is written."""
SHARD_ROWS = 65_536
"""Rows of a shard, from which on it is written however small they are: a shard of bytes alone could be millions of tiny tensors."""
OPEN_SHARDS = 64
"""Mapped shards kept open."""
UNINDEXED = 16
"""Shards whose keys may be read one by one before a new index of all is worth it."""
INDEX = "index.parquet"
KEY = "S32"
"""A key is a SHA-256: 32 bytes."""


def keys_of(digests: Sequence[str]) -> np.ndarray:
    """Hexadecimal digests as an array [n] of keys."""
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=KEY)


def digest_of(keys: np.ndarray, i: int) -> str:
    """The hexadecimal digest of a key. (Reading an element of such an array would lose zeros at its end.)"""
    return keys[i : i + 1].tobytes().hex()


class Store:
    """Rows of tensors by key. Rows may differ in shape, and each may carry a flag (0 to 127)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: dict[str, int] = {}
        """Size of each known shard by name, in the order of their numbers."""
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._sorted: tuple[np.ndarray, ...] | None = None
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._indexed = 0
        self.refresh()

    def __len__(self) -> int:
        return sum(len(keys) for keys, *_ in self._columns)

    def refresh(self) -> None:
        """Take in the shards that have appeared since. A damaged one is removed: its rows are encoded again."""
        listed = {}
        if self.folder.is_dir():
            with os.scandir(self.folder) as entries:
                listed = {e.name: e.stat().st_size for e in entries if e.name.endswith(".safetensors")}
        if not self._shards:
            self._read_index(listed)
        for name in sorted(listed.keys() - self._shards.keys()):
            try:
                with safe_open(self.folder / name, framework="pt") as shard:
                    about = shard.metadata()
                    keys, flags = keys_of([about["keys"]]), np.array(json.loads(about["flags"]), np.int8)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                (self.folder / name).unlink(missing_ok=True)
                continue
            self._take_in(name, listed[name], keys, flags)

    def _take_in(self, name: str, size: int, keys: np.ndarray, flags: np.ndarray) -> None:
        number = len(self._shards)
        self._shards[name] = size
        rows = np.arange(len(keys), dtype=np.int32)
        self._columns.append((keys, np.full(len(keys), number, np.int32), rows, flags))
        self._sorted = None

    def _read_index(self, listed: dict[str, int]) -> None:
        """The index, if there is one, less the shards that are gone or have changed since."""
        try:
            table = read_table(self.folder / INDEX)
            sizes = json.loads(table.schema.metadata[b"shards"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return
        whole = [name for name, size in sizes.items() if listed.get(name) == size]
        number = np.full(len(sizes), -1, np.int32)
        for i, name in enumerate(sizes):
            if name in whole:
                number[i] = whole.index(name) if len(whole) < len(sizes) else i
        shard = number[table.column("shard").to_numpy()]
        kept = shard >= 0
        keys = np.frombuffer(pa.concat_arrays(table.column("key").chunks).buffers()[1] or b"", dtype=KEY)[: len(table)]
        row, flag = table.column("row").to_numpy(), table.column("flag").to_numpy()
        self._shards = {name: sizes[name] for name in whole}
        self._columns = [(keys[kept], shard[kept], row[kept], flag[kept])]
        self._indexed = len(whole)

    def save_index(self) -> None:
        """Write an index of all shards, where there are many that the present one does not hold."""
        if len(self._shards) - self._indexed < UNINDEXED:
            return
        keys, shard, row, flag = (np.concatenate(column) for column in zip(*self._columns))
        table = pa.table(
            {
                "key": pa.Array.from_buffers(pa.binary(32), len(keys), [None, pa.py_buffer(keys.tobytes())]),
                "shard": shard,
                "row": row,
                "flag": flag,
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"shards": json.dumps(self._shards)}), buffer)
        with explained_folder(self.folder):
            write_bytes(self.folder / INDEX, buffer.getvalue())
        self._indexed = len(self._shards)

    def sorted_keys(self) -> np.ndarray:
        """All keys [n] in order. It is not changed by what is added later."""
        return self._in_order()[0]

    def _in_order(self) -> tuple[np.ndarray, ...]:
        if self._sorted is None:
            if not self._columns:
                return np.empty(0, KEY), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int8)
            columns = [np.concatenate(column) for column in zip(*self._columns)]
            order = np.argsort(columns[0], kind="stable")
            self._sorted = tuple(column[order] for column in columns)
        return self._sorted

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard number [n], row in it [n] and flag [n] of each key; shard -1 where a key is not here."""
        known, shard, row, flag = self._in_order()
        if not len(known):
            return np.full(len(keys), -1, np.int32), np.zeros(len(keys), np.int32), np.zeros(len(keys), np.int8)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        here = known[at] == keys
        return np.where(here, shard[at], -1), row[at], flag[at]

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """bool [n]: which of the keys are not here?"""
        return self.locate(keys)[0] < 0

    def add(self, keys: np.ndarray, rows: Sequence[dict[str, Tensor]], flags: Sequence[int] | None = None) -> None:
        """Write rows, each name -> [...], as one shard. The rows are emptied, to save memory."""
        name = f"{uuid.uuid4().hex}.safetensors"
        flags = [0] * len(rows) if flags is None else list(flags)
        tensors, shapes = packed(rows)
        metadata = {"keys": keys.tobytes().hex(), "flags": json.dumps(flags), "shapes": json.dumps(shapes)}
        write_shard(self.folder / name, tensors, metadata)
        size = (self.folder / name).stat().st_size
        self._take_in(name, size, np.array(keys, KEY), np.array(flags, np.int8))

    def read(self, shard: np.ndarray, row: np.ndarray) -> list[dict[str, Tensor]]:
        """Rows at these places (see `locate`), each name -> [...]. Raises RunError when a shard is gone."""
        return [unpacked(self._shard(int(s)), int(r)) for s, r in zip(shard, row)]

    def _shard(self, number: int) -> Any:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            path = self.folder / list(self._shards)[number]
            try:
                handle = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"{self.folder}: a part of the cache is gone or damaged while it is in use ({error})",
                    hint="run the same command again: what is missing is encoded again",
                ) from None
            self._open[number] = handle, json.loads(handle.metadata()["shapes"])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].__exit__(None, None, None)
        return self._open[number]


@contextmanager
def explained_folder(folder: Path) -> Iterator[None]:
    """Turn what writing into the cache can raise into one clear error."""
    try:
        yield
    except (OSError, SafetensorError, DrmError) as error:
        fact = getattr(error, "strerror", None) or " ".join(str(getattr(error, "message", error)).split())
        full = disk_is_full(error) or disk_is_full(error.__cause__)
        hint = "make room, or name" if full else "name"
        kind = RunError if full else InputError
        raise kind(
            f"cache {folder}: cannot be written: {fact}",
            hint=f"{hint} a folder that you may write to with --cache-dir, or do without by --no-cache",
        ) from error


class Writer:
    """Rows that are waiting to be a shard of `SHARD_BYTES`, or of `SHARD_ROWS`. They leave the GPU when they come."""

    def __init__(self, store: Store):
        self.store = store
        self.keys: list[bytes] = []
        self.rows: list[dict[str, Tensor]] = []
        self.flags: list[int] = []
        self.bytes = 0

    def add(self, keys: Sequence[bytes], rows: Sequence[dict[str, Tensor]], flags: Sequence[int] | None = None) -> bool:
        """Rows by key. True when a shard was written: all that was added is on disk."""
        self.keys += keys
        self.rows += [{name: t.detach().cpu().clone() for name, t in row.items()} for row in rows]
        self.flags += [0] * len(rows) if flags is None else list(flags)
        self.bytes += sum(t.nbytes for row in self.rows[-len(rows) :] for t in row.values())
        return self.flush() if self.bytes >= SHARD_BYTES or len(self.rows) >= SHARD_ROWS else False

    def flush(self) -> bool:
        """Write what is waiting."""
        if not self.rows:
            return False
        keys, rows, flags = np.frombuffer(b"".join(self.keys), KEY), self.rows, self.flags
        self.keys, self.rows, self.flags, self.bytes = [], [], [], 0
        self.store.add(keys, rows, flags)
        return True


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A whole file or nothing, without a second copy of it in memory."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explained_folder(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, part, metadata=metadata)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def packed(rows: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, list[list[int]] | None]]:
    """Rows as the tensors of a shard, and the shapes of those that are not all alike.

    Zeros at the end of each line (the last axis) of text embeddings are left out: half of CLIP's lines beside T5's, and all of T5's
    where there is no T5. What is read back is the same, bit for bit.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[list[int]] | None] = {}
    for name in list(rows[0]):
        parts = [row.pop(name) for row in rows]
        shape = [list(part.shape) for part in parts]
        lines = parts[0].ndim == 2 and parts[0].is_floating_point()
        widths = [used(part) if lines else full_width(part) for part in parts]
        if all(s == shape[0] for s in shape) and (not lines or all(bool((w == shape[0][1]).all()) for w in widths)):
            tensors[name], shapes[name] = torch.stack(parts), None
            continue
        kept = []
        for i, width in enumerate(widths):
            kept.append(_kept(parts[i], width))
            parts[i] = parts[i].new_empty(0)
        ends = torch.tensor([[len(values), len(width)] for values, width in zip(kept, widths)]).cumsum(0)
        tensors[f"{name}/values"] = torch.cat(kept)
        tensors[f"{name}/widths"] = torch.cat(widths).to(torch.int32)
        tensors[f"{name}/ends"] = ends
        shapes[name] = shape
    return tensors, shapes


def used(lines: Tensor) -> Tensor:
    """Entries [L] of each line of [L, D] up to its last one that is not 0."""
    last = (lines != 0).to(torch.uint8).flip(1).argmax(1)  # zeros at the end, 0 also for a line of zeros
    return torch.where((lines != 0).any(1), lines.shape[1] - last, torch.zeros_like(last))


def full_width(part: Tensor) -> Tensor:
    """The same for a tensor of which nothing is left out."""
    return torch.full((part.numel() // max(1, part.shape[-1]),), part.shape[-1])


def _kept(part: Tensor, widths: Tensor) -> Tensor:
    lines = part.reshape(-1, part.shape[-1])
    return lines[torch.arange(lines.shape[1]) < widths[:, None]]


def unpacked(shard: Any, row: int) -> dict[str, Tensor]:
    """One row of a shard."""
    handle, shapes = shard
    out = {}
    for name, shape in shapes.items():
        if shape is None:
            out[name] = handle.get_slice(name)[row]
            continue
        ends = handle.get_slice(f"{name}/ends")[max(0, row - 1) : row + 1].tolist()
        (start, line), (stop, stop_line) = ([0, 0], *ends) if row == 0 else ends
        values = handle.get_slice(f"{name}/values")[start:stop]
        widths = handle.get_slice(f"{name}/widths")[line:stop_line]
        full = torch.zeros(len(widths), shape[row][-1], dtype=values.dtype)
        full[torch.arange(full.shape[1]) < widths[:, None]] = values
        out[name] = full.reshape(shape[row])
    return out
