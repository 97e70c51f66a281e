"""One picture, wherever it is stored: a file, an archive member, a cell of a Parquet file, bytes or an array."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, features

from drmcli.data.parquet import opened
from drmcli.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # an older Pillow does not know the name
    FORMATS = ("AVIF",) * bool(features.check("avif")) + ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64 * 2**20
"""Largest picture that is decoded, in pixels (8192 x 8192): 192 MiB of RGB."""
MAX_BYTES = 2**30
"""Largest file of a picture that is read."""
MAX_ASPECT = 200
"""Longer side by shorter; beyond, resizing the shorter side to what a model sees makes a picture of any size."""

# What Pillow's decoders raise on damaged bytes.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)
_OPENING = threading.Lock()


class BadImage(InputError):
    """A picture that cannot be used. Callers that read many count it by `key` and `reason` and go on."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}", hint="replace the picture, or leave it out")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.key, self.reason)


@dataclass(frozen=True)
class ImageSource:
    """One picture. Small and picklable: worker processes read it for themselves."""

    key: str
    """Stable name, unique within its dataset: a relative path, the publisher's id, or a hash of the bytes."""

    def read(self) -> bytes:
        """The raw file bytes. Raises BadImage when they are missing or empty."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of the content: equal pictures have equal digests, whatever their keys."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class FileImage(ImageSource):
    """A file on disk."""

    path: str | Path
    """A string where there may be a million of them."""

    def read(self) -> bytes:
        try:
            found = os.stat(self.path)
            if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
                raise BadImage(self.key, "not a file")
            if found.st_size > MAX_BYTES:
                raise BadImage(self.key, f"{found.st_size} bytes, too large for a picture")
            data = Path(self.path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BadImage(self.key, "missing") from None
        except (OSError, ValueError) as error:
            raise BadImage(self.key, getattr(error, "strerror", None) or str(error)) from None
        return _not_empty(self.key, data)


@dataclass(frozen=True)
class TarImage(ImageSource):
    """A member of an uncompressed tar archive, read in place."""

    archive: Path
    offset: int
    """Where the member's bytes start in the archive."""
    size: int

    def read(self) -> bytes:
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise BadImage(self.key, f"{self.archive.name}: {error.strerror}") from None
        return _not_empty(self.key, data)


@dataclass(frozen=True)
class ZipImage(ImageSource):
    """A member of a zip archive, read in place."""

    archive: Path
    member: str

    def read(self) -> bytes:
        try:
            with zipfile.ZipFile(self.archive) as file:
                if (size := file.getinfo(self.member).file_size) > MAX_BYTES:
                    raise BadImage(self.key, f"{size} bytes, too large for a picture")
                data = file.read(self.member)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise BadImage(self.key, f"{self.archive.name}: {error}") from None
        return _not_empty(self.key, data)


@dataclass(frozen=True)
class BytesImage(ImageSource):
    """File bytes held in memory."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return _not_empty(self.key, self.data)


@dataclass(frozen=True)
class ParquetImage(ImageSource):
    """A cell of a Parquet file: bytes, or a struct with a field `bytes`; with `item`, one element of a list of them."""

    path: Path
    column: str
    group: int
    """Row group."""
    row: int
    """Row within the row group."""
    item: int | None = None

    def read(self) -> bytes:
        try:
            stamp = os.stat(self.path)
            cell = _column(self.path, self.column, self.group, (stamp.st_ino, stamp.st_mtime_ns, stamp.st_size))[
                self.row
            ].as_py()
        except (OSError, pa.ArrowException, IndexError) as error:
            raise BadImage(self.key, f"{self.path.name}: {error}") from None
        if self.item is not None:
            cell = cell[self.item]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is not None and not isinstance(data, bytes):
            raise BadImage(self.key, f"{self.path.name}: a {type(data).__name__} in place of the picture's bytes")
        return _not_empty(self.key, data or b"")


# Two columns, one row group: pairs are read side by side, in the order of the file. `stamp`: a path may come to mean another file.
@lru_cache(maxsize=2)
def _column(path: Path, column: str, group: int, stamp: tuple[int, ...]) -> pa.ChunkedArray:
    with opened(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


@dataclass(frozen=True, eq=False)
class ArrayImage(ImageSource):
    """Pixels in memory."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""

    def read(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def digest(self) -> str:
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


def _not_empty(key: str, data: bytes) -> bytes:
    if not data:
        raise BadImage(key, "empty, 0 bytes")
    return data


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """Read and fully decode a picture to RGB; of several frames the first.

    Alpha and colour profiles are dropped; of 16 bits a channel the upper 8 are kept. EXIF rotation is ignored, as by the scorers and
    benchmarks of the field, which open pictures with Pillow and do not transpose them; with `upright` it is applied, as viewers do.

    Raises BadImage when it is missing, empty, truncated, damaged, no picture, of 32 bits a channel, extremely narrow, or
    has more than `max_pixels` pixels by its header (checked before anything is decoded).
    """
    if isinstance(source, ArrayImage):
        return Image.fromarray(source.pixels).convert("RGB")
    return decode(source.read(), source.key, max_pixels=max_pixels, upright=upright)


def decode(data: bytes, key: str, *, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image.Image:
    """Decode file bytes as `load_image` does. `key` names the picture in errors."""
    try:
        # Pillow warns of large pictures on opening; the check below decides instead. Warning filters are global: lock.
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(_without_text(data)), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImage(key, f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadImage(key, f"more than {max_pixels} pixels, a decompression bomb") from None
    except _DAMAGE as error:
        raise BadImage(key, f"damaged: {_first_line(error)}") from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(key, f"{width} x {height} is more than {max_pixels} pixels, a decompression bomb")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(key, f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")
        try:
            image.load()
            # By way of RGBA where a palette is partly transparent: the same colours, and Pillow has nothing to warn of.
            palette = image.mode == "P" and "transparency" in image.info
            wide = image.mode.startswith(("I", "F"))
            pixels = (eight_bits(image, key) if wide else image.convert("RGBA") if palette else image).convert("RGB")
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            raise BadImage(key, f"truncated or damaged: {_first_line(error)}") from None
        return pixels if not upright else _turned(pixels, _orientation(image))


def eight_bits(image: Image.Image, key: str) -> Image.Image:
    """The upper 8 bits of 16-bit grey, which Pillow itself keeps of 16-bit colour. Raises BadImage for other wide pixels: of integers of
    32 bits and of floats nobody says what is white."""
    wide = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )  # as older versions of Pillow say it
    if not wide:
        raise BadImage(key, f"pixels of more than 16 bits (mode {image.mode})")
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes a picture upright, by its EXIF orientation."""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF data are damaged, as viewers take it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _turned(pixels: Image.Image, orientation: int) -> Image.Image:
    return pixels.transpose(_TURNS[orientation]) if orientation in _TURNS else pixels


def _without_text(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, other files as they are.

    Drawing tools put whole workflows there; Pillow refuses a picture with more than 1 MiB of it, and what is not unpacked is no bomb.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, at, start = [], 8, 0
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") and end <= len(data):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def parquet_cells(path: Path, column: str) -> Iterator[tuple[int, int, Any]]:
    """Every cell of a column as (row group, row within it, value), one row group in memory at a time."""
    with opened(path) as file:
        for group in range(file.num_row_groups):
            cells = file.read_row_group(group, columns=[column]).column(0)
            for row, cell in enumerate(cells):
                yield group, row, cell.as_py()
