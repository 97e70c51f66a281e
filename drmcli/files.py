"""Files that a run writes whole or not at all, and reads back only when they are whole.

A file is written under a temporary name, flushed and renamed; a folder of files (a checkpoint) is renamed when it is complete, and
holds a manifest with the size and SHA-256 of each file, so that damage is found when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drmcli.errors import DrmError, InputError, RunError

MANIFEST = "manifest.json"
ROOM = "make room (or choose another place) and run the same command again; what was finished is kept"
_homes: dict[Path, tuple[int, int]] = {}
"""Run folders that are open, by device and inode: what is written there must not make a deleted one anew."""
_named: dict[Path, str] = {}
"""Places that a flag or a variable has named, with it: what fails there or below, outside of open runs, is told with it."""


def disk_is_full(error: BaseException | None) -> bool:
    """Is this, or what it came from, a full disk? Libraries in Rust and C++ say so in their text alone."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = str(error)
        if full or any(mark in text for mark in ("No space left on device", "os error 28", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def guarded(path: Path, *, flag: str | None = None) -> Iterator[None]:
    """Turn a failed write into one clear error: a full disk is a RunError, a forbidden place an InputError.

    flag: what named the path, and from now on names what fails below it.
    """
    if flag:
        name_place(path, flag)
    else:
        path, flag = _named_above(path)
    where = f"{flag} {path}" if flag else str(path)
    another = f"choose another {flag or '--out'}"
    try:
        yield
    except DrmError:
        raise
    except PermissionError:
        raise InputError(
            f"{where}: no permission to write there",
            hint=f"choose a folder that you may write to with {flag or '--out'}",
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{where}: a part of this path is a file", hint=another) from None
    except IsADirectoryError:
        raise InputError(f"{where}: a folder of this name is in the way", hint=another) from None
    except Exception as error:
        if disk_is_full(error):
            raise RunError(f"{where}: cannot write: No space left on device", hint=ROOM) from error
        if not isinstance(error, OSError):
            raise
        if flag and error.errno != errno.EIO:
            raise InputError(f"{where}: cannot be written: {error.strerror}", hint=another) from None
        if isinstance(error, FileNotFoundError) and not _homes.keys().isdisjoint(_with_parents(path)):
            raise RunError(
                f"{where}: the folder is gone: something deleted it while the run was at work",
                hint="run the same command again",
            ) from error
        raise RunError(
            f"{where}: cannot write: {error.strerror or error}",
            hint=f"look at the folder, or {another}; what was finished is kept",
        ) from error


def name_place(path: Path, flag: str) -> None:
    """From now on, what fails at this place or below it is told with the flag or the variable that named it."""
    _named[path.absolute()] = flag


def _named_above(path: Path) -> tuple[Path, str | None]:
    """The place that holds the path, and what named it; the path itself, None where nothing did, or in an open run."""
    for folder in _with_parents(path):
        if folder in _homes:
            break
        if folder in _named:
            return folder, _named[folder]
    return path, None


def _with_parents(path: Path) -> list[Path]:
    place = path.absolute()
    return [place, *place.parents]


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there. Raises InputError where that cannot be."""
    with guarded(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def home(folder: Path) -> Iterator[None]:
    """While this lasts, the folder is a run's: a write into it fails when it has been deleted."""
    place = folder.absolute()
    stat = place.stat()
    _homes[place] = (stat.st_dev, stat.st_ino)
    try:
        yield
    finally:
        _homes.pop(place, None)


def still_there(path: Path) -> None:
    """Raises RunError when the run folder that holds the path was deleted, or replaced by another."""
    for folder in path.absolute().parents:
        if folder in _homes:
            try:
                stat = folder.stat()
                same = (stat.st_dev, stat.st_ino) == _homes[folder]
            except OSError:
                same = False
            if not same:
                raise RunError(
                    f"--out {folder}: was deleted while the run was at work", hint="run the same command again"
                )


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary name beside it, flushed, then renamed."""
    still_there(path)
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all. Yields the temporary one to fill; an older one is replaced."""
    still_there(path)
    part = path.with_name(f".{path.name}.part")
    with guarded(path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files, the last thing before it is complete."""
    files = {
        str(f.relative_to(folder).as_posix()): {"bytes": f.stat().st_size, "sha256": _digest(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, by its manifest: the first file and the fact. None when all is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if _digest(file) != entry["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def read_object(path: Path, name: str) -> dict[str, Any] | None:
    """A JSON or YAML file (by its ending) that a run wrote and that holds keys; None where there is none.

    Raises InputError that names the run and the file when it is damaged.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:  # YAML that was cut is YAML too; what drm writes ends with a newline
            values = yaml.load(text, Loader=_no_aliases()) if text.endswith("\n") else None
    except FileNotFoundError:
        return None
    except (ValueError, yaml.YAMLError, RecursionError, OSError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise damaged(path, name)
    return values


def begun_runs() -> list[Path]:
    """The run folders in runs/, the one that was begun last first."""
    found = [(file.stat().st_mtime, file.parent) for file in Path("runs").glob("*/config.yaml")]
    return [folder for _, folder in sorted(found, reverse=True)]


def damaged(path: Path, name: str, fact: str = "") -> InputError:
    """The error of a run's own file that does not hold what was written. name: of the run; fact: what is wrong with the file."""
    writes = name.startswith("--out")  # else the run is only read
    return InputError(
        f"{name}: its {path.name} is damaged" + (f" ({fact})" if fact else ""),
        hint="--overwrite starts again there, or choose another --out"
        if writes
        else "run the command that made it again, with --overwrite",
    )


def _no_aliases() -> type:
    """A loader of YAML without aliases: a run's own YAML repeats nothing, and a few lines of them can stand for more than any memory."""
    import yaml  # here and not above: this module is imported before every help page

    class NoAliases(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    return NoAliases


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
