"""Which content each file held when it was last seen, so that one that has not changed need not be read again. Without torch.

A row is a file, or a picture inside one, by its path, size and time of change. A million of them are columns of Parquet.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from drmcli.data.images import FileImage, ImageSource, ParquetImage, TarImage, ZipImage
from drmcli.data.parquet import read_table
from drmcli.files import write_bytes

MANY = 16
"""Part files from which on they are joined into one."""
KEY = "S32"


@dataclass
class Stamps:
    """What is known of pictures without reading them, in their order. Pictures in memory, and missing files, have path None."""

    path: pa.Array
    size: np.ndarray
    mtime: np.ndarray
    """Time of change, ns."""

    @classmethod
    def of(cls, images: Sequence[ImageSource]) -> Stamps:
        """One look at each file, none at its content."""
        folders: dict[str, str] = {}
        archives: dict[str, tuple[str, int, int] | None] = {}
        paths: list[str | None] = []
        size, mtime = np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
        for i, image in enumerate(images):
            paths.append(None)
            file, inside = place(image)
            if file is None:
                continue
            if inside is None:
                seen = look(file, folders)
            else:
                if file not in archives:
                    archives[file] = look(file, folders)
                seen = archives[file]
            if seen is not None:
                paths[i] = seen[0] if inside is None else f"{seen[0]}#{inside}"
                size[i], mtime[i] = seen[1:]
        return cls(pa.array(paths, pa.large_string()), size, mtime)

    def known(self) -> np.ndarray:
        """bool [n]: which have a path?"""
        return ~np.asarray(self.path.is_null())


def place(image: ImageSource) -> tuple[str | None, str | None]:
    """The file that a picture is in, and where in it; None, None for one in memory."""
    if isinstance(image, FileImage):
        return str(image.path), None
    if isinstance(image, TarImage):
        return str(image.archive), str(image.offset)
    if isinstance(image, ZipImage):
        return str(image.archive), image.member
    if isinstance(image, ParquetImage):
        return str(image.path), f"{image.column}#{image.group}#{image.row}#{image.item}"
    return None, None


def look(file: str, folders: dict[str, str]) -> tuple[str, int, int] | None:
    """Real path, size and time of change of a file; None where it cannot be had, or is no UTF-8, which no table holds.

    `folders` keeps real paths of folders.
    """
    head, tail = os.path.split(file)
    if head not in folders:
        folders[head] = os.path.realpath(head or ".")
    try:
        found = os.stat(file)
        path = os.path.join(folders[head], tail)
        path.encode()
    except (OSError, ValueError):
        return None
    return path, found.st_size, found.st_mtime_ns


class Manifest:
    """The table on disk: part files that any process may add, joined now and then."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _parts(self) -> list[Path]:
        """Newest first."""
        found = []
        for file in self.folder.glob("*.parquet"):
            try:
                found.append((file.stat().st_mtime_ns, file))
            except OSError:  # joined by another process in this moment
                continue
        return [file for _, file in sorted(found, reverse=True)]

    def _table(self, parts: Sequence[Path]) -> pa.Table | None:
        tables = []
        for file in parts:
            try:
                tables.append(read_table(file, columns=["path", "size", "mtime", "key"]))
            except FileNotFoundError:
                continue
            except (OSError, pa.ArrowException):
                file.unlink(missing_ok=True)
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def find(self, stamps: Stamps) -> np.ndarray:
        """Key [n] of each picture that has not changed since it was last seen; empty for others."""
        keys = np.zeros(len(stamps.size), KEY)
        table = self._table(self._parts())
        if table is None or not len(table):
            return keys
        known, size, mtime = _columns(table)
        at = pc.index_in(stamps.path, value_set=table.column("path").combine_chunks(), skip_nulls=True)
        at = at.fill_null(-1).to_numpy(zero_copy_only=False)
        same = (at >= 0) & (size[at] == stamps.size) & (mtime[at] == stamps.mtime)
        keys[same] = known[at[same]]
        return keys

    def add(self, stamps: Stamps, index: np.ndarray, keys: np.ndarray) -> None:
        """Note the keys of the pictures at these positions, those that have a path."""
        fine = stamps.known()[index]
        index, keys = index[fine], np.ascontiguousarray(keys[fine])
        if not len(index):
            return
        self._write(
            pa.table(
                {
                    "path": stamps.path.take(pa.array(index)),
                    "size": stamps.size[index],
                    "mtime": stamps.mtime[index],
                    "key": pa.Array.from_buffers(pa.binary(32), len(keys), [None, pa.py_buffer(keys.tobytes())]),
                }
            )
        )

    def join(self) -> None:
        """One file of many; of a path that is listed twice the newest row stays."""
        parts = self._parts()
        if len(parts) < MANY:
            return
        table = self._table(parts)
        if table is not None:
            path = table.column("path").combine_chunks()
            first = np.unique(pc.index_in(path, value_set=path).to_numpy(zero_copy_only=False))
            self._write(table.take(pa.array(first)))
        for file in parts:
            file.unlink(missing_ok=True)

    def _write(self, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_bytes(self.folder / f"{uuid.uuid4().hex}.parquet", buffer.getvalue())


def _columns(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    key = table.column("key").combine_chunks()
    raw = np.frombuffer(key.buffers()[1], dtype=KEY)[key.offset : key.offset + len(key)]
    return raw, table.column("size").to_numpy(), table.column("mtime").to_numpy()
