"""Run folders: created, locked, resumed, never half-written. And how a recipe tells what it is doing without printing.

A run is a folder with the resolved config, an environment snapshot, a log, metrics, checkpoints, and at the very end
`summary.json`: while that is missing the run is unfinished, and the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml

from drmcli import config as configs
from drmcli.errors import InputError, Interrupted, RunError

FORGIVEN = {"out", "resume", "overwrite", "cache_dir", "fail_under"}
"""Config keys that may differ when a run goes on."""
PACKAGES = ("drmcli", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub",
            "numpy", "pandas", "pyarrow", "pillow", "xformers")  # fmt: skip


class Reporter(Protocol):
    """What a recipe tells while it works. The command line draws it; the library keeps silent."""

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        """`done` of `total` units of a task; fields are shown beside the bar."""

    def note(self, text: str) -> None:
        """Something good to know."""

    def warn(self, text: str) -> None:
        """Something that may be wrong, with the run going on."""


class Silent:
    """A reporter that drops everything."""

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Run:
    """An open run folder. `resumed` tells whether it held an unfinished run; `finished` holds its summary if it was done."""

    def __init__(self, folder: Path, command: str, run_id: str, *, resumed: bool, reporter: Reporter):
        self.folder = folder
        self.command = command
        self.id = run_id
        self.resumed = resumed
        self.reporter = reporter
        self.started = time.monotonic()
        self.finished: dict[str, Any] | None = None
        self._lock: Any = None

    def path(self, *parts: str) -> Path:
        """A path inside the folder, its parents made."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, text: str) -> None:
        """A line of log.txt with the time."""
        with guarded(self.folder / "log.txt"), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def note(self, text: str) -> None:
        self.log(text)
        self.reporter.note(text)

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}")
        self.reporter.warn(text)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, the mark of a finished run, and return it with the keys that every command gives."""
        summary = {"command": self.command, "run": str(self.folder)} | summary
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        self.log("finished")
        return summary

    def close(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def open_run(command: str, config: Any, reporter: Reporter, *, main: bool = True) -> Iterator[Run]:
    """Create the run folder of a command, or go on with the unfinished one.

    Without `out`, an unfinished run of the same config under runs/ is taken up, else a new folder is made. Raises
    InputError when the folder cannot be written, holds something else, or holds a run of another config.
    With several processes only the main one writes; the others (main=False) just name the folder.
    """
    values = configs.to_dict(config)
    if config.out == "":
        raise InputError("--out: is empty", hint="name a folder, or leave --out away")
    folder = Path(config.out) if config.out else default_folder(command, values, config.resume and not config.overwrite)
    flag = f"--out {folder}"
    if not main:
        follower = Run(folder, command, "", resumed=False, reporter=Silent())
        if not config.overwrite:
            follower.finished = _summary(folder, flag)
        yield follower
        return
    with guarded(folder, flag="--out"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{flag}: a file, not a folder", hint="choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(
            f"{flag}: another process is at work in this folder", hint="wait for it, or choose another --out"
        ) from None
    try:
        run = _enter(folder, command, config, values, reporter, flag)
        run._lock = lock
        yield run
    finally:
        lock.close()


def _enter(folder: Path, command: str, config: Any, values: dict[str, Any], reporter: Reporter, flag: str) -> Run:
    earlier = _earlier(folder)
    strangers = [f.name for f in folder.iterdir() if f.name != ".lock"]
    if strangers and earlier is None:
        raise InputError(
            f"{flag}: holds files that are no run ({strangers[0]}, ...)", hint="choose an empty or new folder"
        )
    if earlier is not None and config.overwrite:
        for name in strangers:
            target = folder / name
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        earlier = None
    if earlier is not None:
        if not config.resume:
            raise InputError(
                f"{flag}: already holds a run", hint="choose another --out, or --overwrite to start again there"
            )
        if earlier.get("command") != command:
            raise InputError(f"{flag}: holds a run of `drm {earlier.get('command')}`", hint="choose another --out")
        changed = [k for k in values if k not in FORGIVEN and earlier.get(k, values[k]) != values[k]]
        if changed:
            k = changed[0]
            raise InputError(
                f"{flag}: holds a run with {k} = {earlier.get(k)!r}, not {values[k]!r}",
                hint="give the same options to go on, choose another --out, or --overwrite to start again there",
            )
        run = Run(folder, command, _env(folder).get("run_id", ""), resumed=True, reporter=reporter)
        run.finished = _summary(folder, flag)
        if run.finished is None:
            run.note(f"going on with the unfinished run in {folder}")
        return run
    run = Run(folder, command, uuid.uuid4().hex[:12], resumed=False, reporter=reporter)
    write_text(folder / "env.json", json.dumps(environment(run.id, values.get("seed")), indent=2) + "\n")
    write_text(folder / "config.yaml", configs.to_yaml(config, command))  # last: its presence makes the folder a run
    run.log(f"drm {command} started, run {run.id}")
    return run


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The config of the run in a folder, None where there is no run."""
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) and "command" in values else None


def _summary(folder: Path, flag: str) -> dict[str, Any] | None:
    """The summary of a finished run, None while it is not finished."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except OSError:
        return None
    except ValueError:
        raise InputError(f"{flag}: its summary.json is damaged", hint="--overwrite starts again there") from None


def _env(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "env.json").read_text())
    except (OSError, ValueError):
        return {}


def default_folder(command: str, values: dict[str, Any], resume: bool) -> Path:
    """Where a run goes without --out: an unfinished one of the same config under runs/, else a new folder."""
    runs = Path("runs")
    candidates = sorted(runs.glob(f"{command}-*"), reverse=True) if resume else []
    for folder in candidates:
        earlier = _earlier(folder)
        unfinished = earlier is not None and not (folder / "summary.json").exists()
        if unfinished and earlier and all(earlier.get(k) == v for k, v in values.items() if k not in FORGIVEN):
            return folder
    stem = runs / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for i in range(1000) if not (p := stem.with_name(stem.name + (f"-{i}" if i else ""))).exists())


def environment(run_id: str, seed: Any) -> dict[str, Any]:
    """Versions, machine, commit and command line: what a later reader needs to repeat a run."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        commit = answer.stdout.strip() or None
    return {
        "run_id": run_id,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git_commit": commit,
        "versions": versions,
    }


@contextlib.contextmanager
def guarded(path: Path, *, flag: str | None = None) -> Iterator[None]:
    """Turn a failed write into one clear error: a full disk is a RunError, a forbidden place an InputError."""
    where = f"{flag} {path}" if flag else str(path)
    try:
        yield
    except PermissionError:
        raise InputError(
            f"{where}: no permission to write there", hint="choose a folder that you may write to with --out"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{where}: a part of this path is a file", hint="choose another --out") from None
    except OSError as error:
        if flag and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise InputError(f"{where}: cannot be written: {error.strerror}", hint="choose another --out") from None
        hint = "make room (or choose another --out) and run the same command again; what was finished is kept"
        raise RunError(f"{where}: cannot write: {error.strerror or error}", hint=hint) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary name beside it, flushed, then renamed."""
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


def checkpoint_folder(run: Run, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run.folder / "checkpoints" / f"step-{step:06d}"


def latest_checkpoint(run: Run) -> tuple[int, Path] | None:
    """Step and folder of the newest complete checkpoint."""
    found = sorted((run.folder / "checkpoints").glob("step-[0-9]*"))
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None


def retire_checkpoints(run: Run, keep: int, also: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `also`."""
    found = sorted((run.folder / "checkpoints").glob("step-[0-9]*"))
    for folder in found[:-keep]:
        if int(folder.name.removeprefix("step-")) not in also:
            gone = folder.with_name(f".{folder.name}.old")
            folder.rename(gone)
            shutil.rmtree(gone)


class Interruptions:
    """Ctrl-C and SIGTERM asked for a stop: the loop looks at `asked` when a step is done. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's own handling stays
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def stop(self, done: str) -> Interrupted:
        """The error to raise once everything is saved."""
        return Interrupted(f"interrupted: {done}", hint="run the same command again to go on")


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values: the same values give the same seed on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
