"""`drm data`: fetch a published dataset's split, and check any set of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from drmcli.datasets import DATASETS, check, read
from drmcli.errors import InputError, MissingError
from drmcli.generator import explained
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
    """Fetch a split into a folder through the hub's client, which resumes and checks. The manifest is written last.

    Raises InputError for a name or split that is not there, MissingError when the hub has no access or cannot be reached.
    """
    if name not in DATASETS:
        raise InputError(f"NAME {name}: no published dataset", hint=f"use one of {', '.join(DATASETS)}")
    known = DATASETS[name]
    split = split or known.default_split
    if split not in known.splits:
        raise InputError(f"--split {split}: {name} has no such split", hint=f"use one of {', '.join(known.splits)}")
    patterns = [pattern.format(split=split) for pattern in PATTERNS[name]]
    reporter.note(f"{known.hub_id}, {known.licence}: {known.size}")
    page = f"https://huggingface.co/datasets/{known.hub_id}"
    with guarded(folder, flag="--data-dir"), explained(known.hub_id, f"drm data get {name}:", page=page):
        commit = HfApi().dataset_info(known.hub_id).sha
        snapshot_download(
            known.hub_id, repo_type="dataset", revision=commit, local_dir=str(folder), allow_patterns=patterns
        )
    files = {
        str(f.relative_to(folder)): f.stat().st_size
        for pattern in patterns
        for f in sorted(folder.glob(pattern))
        if f.is_file()
    }
    if not files:
        raise MissingError(
            f"drm data get {name}: {known.hub_id} holds no {patterns[0]}",
            hint=f"see {page}: its layout may have changed",
        )
    summary = {
        "dataset": name,
        "split": split,
        "hub_id": known.hub_id,
        "commit": commit,
        "folder": str(folder),
        "files": files,
    }
    write_text(folder / MANIFEST, json.dumps(summary, indent=2) + "\n")
    return summary


def examine(
    path: str, *, data_dir: str | None, split: str | None, allow_outside: bool, reporter: Reporter
) -> dict[str, Any]:
    """Read every picture of a file or dataset once and say what is there and what is wrong."""
    data = read(path, data_dir=data_dir, split=split, allow_outside=allow_outside)
    report = check(data, progress=lambda done, total: reporter.progress("check", done, total))
    return {
        "data": path,
        "ok": report.ok,
        "prompts": report.n_prompts,
        "images": report.n_images,
        "pairs": report.n_pairs,
        "ties": report.n_ties,
        "unreadable images": [f"{key}: {reason}" for key, reason in report.bad],
        "pairs with one of them": report.n_bad_pairs,
        "duplicate images": report.duplicates,
        "prompts without text": report.empty_prompts,
        "repeated prompts": report.repeated_prompts,
        "left out when read": report.dropped,
    }
