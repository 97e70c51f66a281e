"""What the parts of a pipeline compute, told from their files, so that nothing need be loaded to compare two pipelines. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from drmcli.config import local_or_hub
from drmcli.hub import explained, is_network, quiet_hub

HEAD = 1 << 20
"""Bytes that are read of the start of a file of weights."""
PIECES, PIECE = 64, 1 << 16
"""Pieces that are read of the rest, evenly spaced, and bytes in each: weights differ everywhere or nowhere."""
VARIANTS = ("*.fp16*", "*.bf16*", "*.fp8*", "*.non_ema*", "*.ema*")
"""Copies of the weights in other number formats, which are not loaded."""
READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Files that decide what a part computes."""


def reach(where: str, revision: str | None) -> Path:
    """A model's index file: of a folder, or fetched from the hub, which says exactly what is wrong when it cannot be had."""
    if Path(where).is_dir():
        return Path(where) / "model_index.json"
    return Path(hf_hub_download(where, "model_index.json", revision=revision))


def files_of(where: str, name: str, revision: str | None) -> list[str]:
    """Names of a part's files: of a folder, of the hub's repository, or of what is cached of it where the hub cannot be reached."""
    home = Path(where)
    if not home.is_dir():
        try:
            listed = HfApi().list_repo_files(where, revision=revision)
            return sorted(file.removeprefix(f"{name}/") for file in listed if Path(file).parent == Path(name))
        except Exception as error:
            if not is_network(error):
                raise
            home = reach(where, revision).parent
    return sorted(file.name for file in (home / name).glob("*"))


def at_hand(where: str, names: Sequence[str], revision: str | None, *, whole: bool = False) -> str:
    """A folder with a pipeline's index and these of its parts: `where` itself, or what is fetched from the hub if it is not there.

    Of a part come the files that decide what it computes, or with `whole` all: of tokenizers and others without weights.
    """
    if Path(where).is_dir():
        return where
    wanted = ["model_index.json"]
    for name in names:
        files = ["*"] if whole else decisive(files_of(where, name, revision))
        wanted += [f"{name}/{file}" for file in files]
    return snapshot_download(where, revision=revision, allow_patterns=wanted)


def decisive(files: Sequence[str]) -> list[str]:
    """Those of a part's files that decide what it computes: without the copies of its weights in other number formats."""
    read = sorted(file for file in files if file.endswith(READ))
    plain = [file for file in read if not any(fnmatch(file, variant) for variant in VARIANTS)]
    # Weights in one format alone, with its name in theirs, are no copies.
    return plain if any(file.endswith(".safetensors") for file in plain) else read


def of_parts(
    ref: str, revision: str | None, names: Sequence[str], *, flag: str = "--generator", bits: str = "none"
) -> dict[str, str]:
    """A short hash by name for each of these parts that a pipeline has. Equal hashes: equal outputs.

    bits: `Kernels.quantize`, in which all but the VAE are kept; what that computes is not what the files alone say.

    A part of a hub's pipeline that is not on this machine is fetched first. Raises MissingError or InputError, naming `flag`.
    """
    where = local_or_hub(ref, flag)
    with explained(ref, flag), quiet_hub():
        index = reach(where, revision)
        listed = json.loads(index.read_text(encoding="utf-8"))
        present = [name for name in names if listed.get(name, [None, None])[0] is not None]
        absent = [name for name in present if not any((index.parent / name).glob("*.json"))]
        if absent and not Path(where).is_dir():
            at_hand(where, absent, revision)
        prints = {name: of_folder(index.parent / name) for name in present}
    return prints if bits == "none" else {n: p if n == "vae" else f"{p}-{bits}" for n, p in prints.items()}


def same_part(one: tuple[str, str | None], other: tuple[str, str | None], name: str) -> bool:
    """Is a part of two pipelines, (folder or hub id, revision) each, the same? Without a download: hub ids are compared by name."""
    if one == other:
        return True
    folders = [Path(local_or_hub(ref, "--generator")) / name for ref, _ in (one, other)]
    return all(f.is_dir() for f in folders) and of_folder(folders[0]) == of_folder(folders[1])


def of_folder(folder: Path) -> str:
    """A short hash of one part's config, vocabulary and weights."""
    digest = hashlib.sha256()
    for file in map(folder.joinpath, decisive([file.name for file in folder.iterdir()])):
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
