"""`drm data`: fetch a published dataset's split, and check any set of pairs."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from tqdm import tqdm

from drmcli import signals
from drmcli.data.datasets import DATASETS, CheckReport, check, overlap, read
from drmcli.errors import DrmError, InputError, MissingError, RunError
from drmcli.hub import explained, is_network, one_line, quiet_hub
from drmcli.run import Reporter, guarded, write_text

MANIFEST = "drm-manifest.json"
PATTERNS: dict[str, list[str]] = {
    "hpdv2": ["{split}.json", "{split}.tar.gz", "benchmark/*.json"],
    "hpdv3": ["{split}.json", "images.tar.gz.*"],
    "pickapic": ["data/{split}-*.parquet"],
    "pickapic_v2": ["data/{split}-*.parquet"],
    "imagereward": ["{split}.json", "metadata-{split}*.parquet", "images/{split}/*"],
}
"""What a split needs of a dataset's repository."""


def get(name: str, split: str | None, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Fetch a split into a folder through the hub's client, which resumes; check sizes and checksums; write the manifest last.

    Files that the manifest of an earlier call vouches for are not read again. Raises InputError for a name or split that is not there,
    MissingError when the hub has no access or cannot be reached, RunError for a connection that breaks or a file that is damaged.
    """
    if name not in DATASETS:
        raise InputError(f"NAME {name}: no published dataset", hint=f"use one of {', '.join(DATASETS)}")
    known = DATASETS[name]
    split = split or known.default_split
    if split not in known.splits:
        raise InputError(f"--split {split}: {name} has no such split", hint=f"use one of {', '.join(known.splits)}")
    patterns = [pattern.format(split=split) for pattern in PATTERNS[name]]
    page = f"https://huggingface.co/datasets/{known.hub_id}"
    flag = f"drm data get {name}:"
    with guarded(folder, flag="--data-dir"):
        folder.mkdir(parents=True, exist_ok=True)
    with explained(known.hub_id, flag, page=page), quiet_hub():
        info = HfApi().dataset_info(known.hub_id, files_metadata=True)
        wanted = {s.rfilename: s for s in info.siblings or [] if any(fnmatch.fnmatch(s.rfilename, p) for p in patterns)}
        total = sum(s.size or 0 for s in wanted.values())
        reporter.note(f"{known.hub_id}, {known.licence}: {len(wanted)} files, {total / 1e6:,.1f} MB")
        if wanted:
            try:
                snapshot_download(
                    known.hub_id,
                    repo_type="dataset",
                    revision=info.sha,
                    local_dir=str(folder),
                    allow_patterns=patterns,
                    tqdm_class=bytes_to(reporter, total),
                )
            except (DrmError, hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise RunError(
                        f"--data-dir {folder}: {error.strerror}",
                        hint="make room and run the same command again; what was fetched is kept",
                    ) from error
                if not is_network(error):
                    raise
                raise RunError(
                    f"{flag} the connection broke: {one_line(error)}",
                    hint="run the same command again; what was fetched is kept",
                ) from error
    if not wanted:
        raise MissingError(
            f"{flag} {known.hub_id} holds no {patterns[0]}", hint=f"see {page}: its layout may have changed"
        )
    signals.check("what was fetched is kept")  # the hub's client may have swallowed it
    files = verify(folder, wanted, info.sha, flag, reporter)
    summary = {
        "dataset": name,
        "split": split,
        "hub_id": known.hub_id,
        "commit": info.sha,
        "folder": str(folder),
        "files": files,
    }
    write_text(folder / MANIFEST, json.dumps(summary, indent=2) + "\n")
    return summary


def verify(
    folder: Path, wanted: dict[str, Any], commit: str | None, flag: str, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file against what the hub says; a damaged one is removed, so that it is fetched again.

    The hub's client looks at sizes alone. Raises RunError naming the first damaged file.
    """
    earlier = _vouched(folder, commit)
    files: dict[str, dict[str, Any]] = {}
    done, total = 0, sum(s.size or 0 for s in wanted.values())
    for name, sibling in sorted(wanted.items()):
        signals.check("what was fetched is kept")
        path = folder / name
        expected = sibling.lfs.sha256 if sibling.lfs is not None else None
        size = path.stat().st_size if path.is_file() else None
        entry = {"size": size, "sha256": expected}
        if size is not None and earlier.get(name) != entry:
            fault = None
            if sibling.size is not None and size != sibling.size:
                fault = f"has {size} bytes, not {sibling.size}"
            elif expected is not None and _sha256(path) != expected:
                fault = "has another checksum than the hub says"
            if fault:
                for lost in (path, folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"):
                    lost.unlink(missing_ok=True)
                raise RunError(
                    f"{flag} {name} {fault}", hint="it was removed; run the same command again to fetch it anew"
                )
        if size is None:
            raise RunError(f"{flag} {name} was not fetched", hint="run the same command again")
        files[name] = entry
        done += size
        reporter.progress("check", done, total)
    return files


def _vouched(folder: Path, commit: str | None) -> dict[str, Any]:
    """Files of an earlier call's manifest, if it is of the same commit."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found["files"] if isinstance(found, dict) and found.get("commit") == commit else {}


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def bytes_to(reporter: Reporter, total: int) -> type:
    """A progress bar class for the hub's client that passes bytes on to the reporter and draws nothing."""
    lock, seen = threading.Lock(), [0]

    class Bytes(tqdm):  # type: ignore[type-arg]
        # The client fetches in threads and waits for them: an interrupt that it swallowed is seen with the next bytes.
        def __init__(self, *args: Any, **kwargs: Any):
            self._bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._bytes and n:
                with lock:
                    seen[0] = min(total, seen[0] + int(n))
                    reporter.progress("download", seen[0], total)
            signals.check("what was fetched is kept")
            return None

    return Bytes


def examine(
    path: str,
    *,
    data_dir: str | None,
    split: str | None,
    allow_outside: bool,
    reporter: Reporter,
    against: str | None = None,
    against_split: str | None = None,
) -> dict[str, Any]:
    """Read every picture of a file or dataset once and say what is there and what is wrong.

    against: a second set, a split of the same dataset by default; what both hold, by content, is a fault.
    """

    def look(name: str, part: str | None, task: str) -> CheckReport:
        data = read(name, data_dir=data_dir, split=part, allow_outside=allow_outside, max_bad=100)
        return check(data, progress=lambda done, total: reporter.progress(task, done, total))

    report = look(path, split, "check")
    found = {
        "data": path,
        "ok": report.ok,
        "prompts": report.n_prompts,
        "images": report.n_images,
        "pairs": report.n_pairs,
        "ties": report.n_ties,
        "bad rows": report.bad_rows,
        "unreadable images": [f"{key}: {reason}" for key, reason in report.bad],
        "pairs with one of them": report.n_bad_pairs,
        "duplicate images": report.duplicates,
        "prompts without text": report.empty_prompts,
        "repeated prompts": report.repeated_prompts,
        "left out when read": report.dropped,
    }
    if against is not None or against_split is not None:
        shared = overlap(report, look(against or path, against_split, "check against"))
        found |= {
            "ok": report.ok and not shared.images and not shared.prompts,
            "images in both": [f"{a} = {b}" for a, b in shared.images],
            "prompts in both": shared.prompts,
        }
    return found
