"""Tar and zip archives of pictures: read in place or unpacked, no member ever leaving its folder."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, cast

from drmcli.data.images import ImageSource, TarImage, ZipImage
from drmcli.errors import InputError, RunError

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error)


_PLAIN = re.compile(r"[\w][\w /+=@-]*(\.[\w /+=@-]+)*")


def stays_inside(name: str) -> bool:
    """Whether a listed name can only mean something below its folder: not absolute, no drive, no `..`, not empty."""
    if _PLAIN.fullmatch(name):  # nearly all names, a hundred times faster
        return True
    windows = PureWindowsPath(name)
    up = any(part.rstrip() == ".." for part in windows.parts)
    unsafe = "\0" in name or windows.drive or windows.root or up
    return bool(name.strip() and not unsafe and PurePosixPath(name).parts)


class _Complete(tarfile.TarInfo):
    """Tar members, until the end mark. An archive that ends without it was cut; tarfile alone does not mind."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Complete:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")
        return super().frombuf(buf, encoding, errors)


@dataclass(frozen=True)
class Member:
    """A picture inside an archive that can be read in place."""

    archive: Path
    name: str
    offset: int
    """Where its bytes start; -1 in a zip."""
    size: int

    def source(self, key: str) -> ImageSource:
        """The picture under the name `key`."""
        if self.offset < 0:
            return ZipImage(key, self.archive, self.name)
        return TarImage(key, self.archive, self.offset, self.size)


def index(archive: Path) -> list[Member]:
    """Members of an uncompressed tar or a zip, for reading in place. Refuses archives as `unpack` does."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                entries = [entry for entry in packed.infolist() if not entry.is_dir()]
            return [Member(archive, _inside(archive, e.filename), -1, e.file_size) for e in entries]
        with tarfile.open(archive, "r:", tarinfo=_Complete) as tar:
            return [
                Member(archive, _inside(archive, entry.name), entry.offset_data, entry.size)
                for entry in tar
                if _is_file(archive, entry)
            ]
    except _DAMAGE as error:
        raise _damaged(archive, error) from None


def unpack(parts: Sequence[Path], target: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Unpack a tar (compressed or not), given whole or as parts to be joined, or a zip, into the new folder `target`.

    Unpacked beside `target` and renamed last: `target` exists only when complete. Absolute names, `..`, links and
    devices are refused, and then nothing is left behind. `progress` gets (archive bytes read, archive bytes in all).

    Raises InputError for a refused or damaged archive, RunError when the disk does not take it.
    """
    first = parts[0]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            folder = Path(scratch) / "content"
            folder.mkdir()
            if first.suffix == ".zip":
                _unpack_zip(first, folder)
            else:
                with (
                    _Joined(parts, progress) as stream,
                    tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Complete) as tar,
                ):
                    for entry in tar:
                        if _is_file(first, entry):
                            _write(folder / _inside(first, entry.name), cast(BinaryIO, tar.extractfile(entry)))
            os.replace(folder, target)
    except _DAMAGE as error:
        raise _damaged(first, error) from None
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and target.is_dir():
            return target  # another process was faster
        raise RunError(
            f"{first}: cannot be unpacked into {target}: {error.strerror or error}",
            hint="make room or the folder writable, or unpack it yourself and name that folder",
        ) from error
    return target


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        for entry in packed.infolist():
            name = _inside(archive, entry.filename)
            if not entry.is_dir():
                with packed.open(entry) as source:
                    _write(folder / name, cast(BinaryIO, source))


def _write(path: Path, source: BinaryIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _is_file(archive: Path, entry: tarfile.TarInfo) -> bool:
    """True for a file, False for a folder or for a name that is only the root; anything else is refused."""
    if entry.isdir():
        if PurePosixPath(entry.name).parts:
            _inside(archive, entry.name)
        return False
    if not entry.isreg() or entry.issparse():
        raise _refused(archive, entry.name, "is a link, a device or another special file")
    return True


def _inside(archive: Path, name: str) -> str:
    if not stays_inside(name):
        raise _refused(archive, name, "would leave its folder")
    return str(PurePosixPath(name))


def _refused(archive: Path, name: str, why: str) -> InputError:
    return InputError(
        f"{archive}: member {name!r} {why}", hint="do not use this archive; fetch it again from its publisher"
    )


def _damaged(archive: Path, error: BaseException) -> InputError:
    return InputError(
        f"{archive}: not a complete archive ({error})", hint="fetch it again; compare its size with the publisher's"
    )


class _Joined(io.RawIOBase):
    """The parts of a split archive as one stream of bytes."""

    def __init__(self, parts: Sequence[Path], progress: Callable[[int, int], None] | None):
        self._parts = list(parts)
        self._progress = progress
        self._total = sum(part.stat().st_size for part in parts)
        self._done = 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while True:
            if self._file is None:
                if not self._parts:
                    return b""
                self._file = self._parts.pop(0).open("rb")
            data = self._file.read(size)
            if data:
                self._done += len(data)
                if self._progress is not None:
                    self._progress(self._done, self._total)
                return data
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
