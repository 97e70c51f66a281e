"""What the parts of a pipeline compute, told from their files, so that nothing need be loaded to compare two pipelines. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from drmcli.config import local_or_hub
from drmcli.hub import explained, quiet_hub

HEAD = 1 << 20
"""Bytes that are read of the start of a file of weights."""
PIECES, PIECE = 64, 1 << 16
"""Pieces that are read of the rest, evenly spaced, and bytes in each: weights differ everywhere or nowhere."""
VARIANTS = ("*.fp16*", "*.bf16*", "*.fp8*", "*.non_ema*", "*.ema*")
"""Copies of the weights in other number formats, which are not loaded."""
READ = (".json", ".txt", ".model", ".safetensors")
"""Files that decide what a part computes."""


def reach(where: str, revision: str | None) -> Path:
    """A model's index file: of a folder, or fetched from the hub, which says exactly what is wrong when it cannot be had."""
    if Path(where).is_dir():
        return Path(where) / "model_index.json"
    return Path(hf_hub_download(where, "model_index.json", revision=revision))


def of_parts(ref: str, revision: str | None, names: Sequence[str], *, flag: str = "--generator") -> dict[str, str]:
    """A short hash by name for each of these parts that a pipeline has. Equal hashes: equal outputs.

    A part of a hub's pipeline that is not on this machine is fetched first. Raises MissingError or InputError, naming `flag`.
    """
    where = local_or_hub(ref, flag)
    with explained(ref, flag), quiet_hub():
        index = reach(where, revision)
        listed = json.loads(index.read_text(encoding="utf-8"))
        present = [name for name in names if listed.get(name, [None, None])[0] is not None]
        absent = [name for name in present if not any((index.parent / name).glob("*.json"))]
        if absent and not Path(where).is_dir():
            wanted = [f"{name}/*{suffix}" for name in absent for suffix in READ]
            snapshot_download(where, revision=revision, allow_patterns=wanted, ignore_patterns=list(VARIANTS))
        return {name: of_folder(index.parent / name) for name in present}


def of_folder(folder: Path) -> str:
    """A short hash of one part's config, vocabulary and weights."""
    files = sorted(file for file in folder.iterdir() if file.suffix in READ)
    plain = [file for file in files if not any(file.match(variant) for variant in VARIANTS)]
    if not any(file.suffix == ".safetensors" for file in plain):  # weights in one format alone, with its name in theirs
        plain = files
    digest = hashlib.sha256()
    for file in plain:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        digest.update(_sampled(file))
    return digest.hexdigest()[:16]


def _sampled(file: Path) -> bytes:
    """Hash of a file, or of its start and of pieces all over it where it is large."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= HEAD + PIECES * PIECE:
            return hashlib.sha256(handle.read()).digest()
        digest = hashlib.sha256(handle.read(HEAD))
        for i in range(PIECES):
            handle.seek(HEAD + (size - HEAD - PIECE) * i // (PIECES - 1))
            digest.update(handle.read(PIECE))
    return digest.digest()
