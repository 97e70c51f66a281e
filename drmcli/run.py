"""Run folders: created, locked, resumed, never half-written. And how a recipe tells what it is doing without printing.

A run is a folder with the resolved config, an environment snapshot, a log, metrics, checkpoints, and at the very end
`summary.json`: while that is missing the run is unfinished, and the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from drmcli import config as configs
from drmcli.errors import InputError, MissingError
from drmcli.files import (
    atomic_folder,
    damage,
    damaged,
    guarded,
    home,
    read_object,
    seal,
    still_there,
    write_bytes,
    write_text,
)
from drmcli.signals import Interruptions

__all__ = [
    "SILENT", "Interruptions", "Reporter", "Run", "Silent", "atomic_folder", "checkpoint_folder", "default_folder", "environment",
    "guarded", "latest_checkpoint", "open_run", "retire_checkpoints", "seal", "seed_of", "write_bytes", "write_text",
]  # fmt: skip

FORGIVEN = {"out", "resume", "overwrite", "cache_dir", "no_cache", "fail_under", "timing"}
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


SILENT = Silent()


class Run:
    """An open run folder. `resumed` tells whether it held an unfinished run; `finished` holds its summary if it was done."""

    def __init__(
        self, folder: Path, command: str, run_id: str, *, resumed: bool, reporter: Reporter, main: bool = True
    ):
        self.folder = folder
        self.command = command
        self.id = run_id
        self.resumed = resumed
        self.reporter = reporter
        self.main = main
        """Is this the process that writes? The others of a run only name its folder."""
        self.started = time.monotonic()
        self.finished: dict[str, Any] | None = None

    def path(self, *parts: str) -> Path:
        """A path inside the folder, its parents made."""
        path = self.folder.joinpath(*parts)
        still_there(path)
        with guarded(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, text: str) -> None:
        """A line of log.txt with the time, by the main process."""
        if not self.main:
            return
        still_there(self.folder / "log.txt")
        with guarded(self.folder / "log.txt"), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def note(self, text: str) -> None:
        self.log(text)
        self.reporter.note(text)

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}")
        self.reporter.warn(text)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, the mark of a finished run, and return it with the keys that every command gives.

        What does not exist, such as the interval of a single pair, is null and not NaN, which JSON has not.
        """
        summary = _known({"command": self.command, "run": str(self.folder)} | summary)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        self.log("finished")
        return summary


def _known(value: Any) -> Any:
    """The value with None in place of numbers that are none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items()}
    return [_known(part) for part in value] if isinstance(value, (list, tuple)) else value


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
    folder = planned_folder(command, config)
    _planned.clear()
    flag = f"--out {folder}"
    if not main:
        follower = Run(folder, command, "", resumed=False, reporter=Silent(), main=False)
        if not config.overwrite:
            follower.finished = _summary(folder, flag)
        yield follower
        return
    with guarded(folder, flag="--out"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{flag}: a file, not a folder", hint="choose another --out")
        made = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{flag}: another process is at work in this folder", hint="wait for it, or choose another --out"
            ) from None
    try:
        with home(folder):
            yield _enter(folder, command, config, values, reporter, flag)
    except (InputError, MissingError):
        lock.release()
        _withdraw(folder, made)
        raise
    finally:
        lock.release()


STARTERS = {".lock", "config.yaml", "env.json", "log.txt"}
"""What a run holds before it has done anything."""


def has_results(folder: Path) -> bool:
    """Does the folder hold more than what a run starts with?"""
    return any(f.name not in STARTERS for f in folder.iterdir())


def _withdraw(folder: Path, made: list[Path]) -> None:
    """Take back a run that came to nothing because of what it was given: a typo leaves no dead folder.

    `made` are the folders that this call has made, the innermost first. One that was there before is left with its run, if it held one:
    a run without results takes other options.
    """
    with contextlib.suppress(OSError):
        if folder in made and not has_results(folder):
            shutil.rmtree(folder)
            for parent in made[1:]:
                parent.rmdir()


def _enter(folder: Path, command: str, config: Any, values: dict[str, Any], reporter: Reporter, flag: str) -> Run:
    """The run of a locked folder: begun, begun anew, or gone on with."""
    strangers = [f.name for f in folder.iterdir() if f.name != ".lock"]
    try:
        earlier = read_object(folder / "config.yaml", flag)
        if earlier and "command" not in earlier and "run_id" in _env(folder):
            raise damaged(folder / "config.yaml", flag)
    except InputError:
        if not (config.overwrite and "run_id" in _env(folder)):
            raise
        earlier = {}
    if strangers and (earlier is None or (earlier and "command" not in earlier)):
        raise InputError(
            f"{flag}: holds files that are no run ({strangers[0]}, ...)", hint="choose an empty or new folder"
        )
    if earlier is not None and config.overwrite:
        for name in strangers:
            target = folder / name
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        earlier = None
    if earlier is None:
        return _begin(folder, command, config, values, reporter)
    if not config.resume:
        raise InputError(
            f"{flag}: already holds a run", hint="choose another --out, or --overwrite to start again there"
        )
    changed = [k for k in values if k not in FORGIVEN and earlier.get(k, values[k]) != values[k]]
    if (changed or earlier.get("command") != command) and not has_results(folder):
        return _begin(folder, command, config, values, reporter)
    if earlier.get("command") != command:
        raise InputError(f"{flag}: holds a run of `drm {earlier.get('command')}`", hint="choose another --out")
    if changed:
        k = changed[0]
        raise InputError(
            f"{flag}: holds a run with {k} = {earlier.get(k)!r}, not {values[k]!r}",
            hint="give the same options to go on, choose another --out, or --overwrite to start again there",
        )
    run = Run(folder, command, str(_env(folder).get("run_id", "")), resumed=True, reporter=reporter)
    run.finished = _summary(folder, flag)
    if not run.id:
        run.id = uuid.uuid4().hex[:12]
        run.warn(f"{folder}: its env.json is damaged or missing, and was written anew")
        write_text(folder / "env.json", json.dumps(environment(run.id, values.get("seed")), indent=2) + "\n")
    if run.finished is None:
        run.note(f"going on with the unfinished run in {folder}")
    return run


def _begin(folder: Path, command: str, config: Any, values: dict[str, Any], reporter: Reporter) -> Run:
    """A new run, in a folder that holds no results."""
    run = Run(folder, command, uuid.uuid4().hex[:12], resumed=False, reporter=reporter)
    write_text(folder / "env.json", json.dumps(environment(run.id, values.get("seed")), indent=2) + "\n")
    write_text(folder / "config.yaml", configs.to_yaml(config, command))  # last: its presence makes the folder a run
    run.log(f"drm {command} started, run {run.id}")
    return run


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The config of the run in a folder, None where there is none that can be read."""
    try:
        values = read_object(folder / "config.yaml", str(folder))
    except InputError:
        return None
    return values if values and "command" in values else None


def _summary(folder: Path, flag: str) -> dict[str, Any] | None:
    """The summary of a finished run, None while it is not finished. Raises InputError for one that is damaged."""
    found = read_object(folder / "summary.json", flag)
    if found is not None and {"command", "run", "seconds"} - set(found):
        raise damaged(folder / "summary.json", flag)
    return found


def _env(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "env.json", str(folder)) or {}
    except InputError:
        return {}


_planned: dict[str, Path] = {}
"""The folder that was named to the user before the run is opened there: its name holds the time."""


def planned_folder(command: str, config: Any) -> Path:
    """Where a run goes: --out, or what `default_folder` gave when it was first asked in this process."""
    values = configs.to_dict(config)
    if config.out or command == "demo":
        return Path(config.out or "runs/demo")
    key = f"{command} {values}"
    if key not in _planned:
        _planned[key] = default_folder(command, values, config.resume and not config.overwrite)
    return _planned[key]


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


def checkpoint_folder(run: Run, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return run.folder / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Run) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint, oldest first, whole or not; other names in that folder are no business of drm's."""
    folder = run.folder / "checkpoints"
    found = [f for f in folder.glob("step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)]
    return sorted((int(f.name.removeprefix("step-")), f) for f in found)


def latest_checkpoint(run: Run) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint; None where there is none at all.

    A damaged one is told and passed over for an older one. Raises InputError when every one is damaged.
    """
    found = checkpoints(run)
    for step, folder in reversed(found):
        why = damage(folder)
        if why is None:
            return step, folder
        if step == found[0][0]:
            raise InputError(
                f"--out {run.folder}: {folder.name} is damaged ({why}), and there is no older checkpoint",
                hint="--overwrite starts again there, or choose another --out",
            )
        run.warn(f"{folder} is damaged ({why}): going on from an older checkpoint")
        aside = folder.with_name(f".{folder.name}.damaged")  # the newest ones are kept, and this one is none of them
        with contextlib.suppress(OSError):  # another process of this run was quicker
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    return None


def retire_checkpoints(run: Run, keep: int, also: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `also`."""
    for step, folder in checkpoints(run)[:-keep]:
        if step not in also:
            gone = folder.with_name(f".{folder.name}.old")
            folder.rename(gone)
            shutil.rmtree(gone)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values: the same values give the same seed on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
