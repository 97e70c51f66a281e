"""Where a step's prompts come from: embeddings on disk, or the text encoders themselves, asked again for every batch.

On disk each prompt is encoded once; with T5 it takes megabytes, and a million of them a disk that few have. Live, the encoders stay
beside the model. Both answer `prompts(index)`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from drmcli.data.cache import ALONE, ROUNDS, Encoders, Workers, prompt_keys
from drmcli.data.store import Store, Writer
from drmcli.errors import RunError
from drmcli.families.base import Conditioning
from drmcli.files import make_folder
from drmcli.run import Reporter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
SHARE_OF_DISK = 0.25
"""Part of the free disk that `auto` gives the prompts."""
PROBE = 8
"""Prompts that are encoded to see how large they are."""


class PromptSource(Protocol):
    """Conditioning of a dataset's prompts."""

    cut: int
    """Prompts that are longer than the text encoders read, as far as is known."""

    def prompts(self, index: Sequence[int]) -> Conditioning:
        """Conditioning of prompts by position."""


class CachedPrompts:
    """From disk."""

    def __init__(self, store: Store, keys: np.ndarray):
        self.store = store
        self.shard, self.row, flag = store.locate(keys)
        self.cut = int(flag.sum())

    def prompts(self, index: Sequence[int]) -> Conditioning:
        """On the CPU."""
        at = np.asarray(index, np.int64)
        rows = self.store.read(self.shard[at], self.row[at])
        narrow = torch.float8_e4m3fn
        rows = [{k: t.to(torch.bfloat16) if t.dtype == narrow else t for k, t in row.items()} for row in rows]
        try:
            return Conditioning.cat([Conditioning({k: t[None] for k, t in row.items()}) for row in rows])
        except RuntimeError as error:
            raise RunError(
                f"{self.store.folder}: rows of unlike shapes: {error}", hint="delete that folder; it is rebuilt"
            ) from error


class LivePrompts:
    """From the encoders, batch by batch."""

    def __init__(self, texts: Sequence[str], encoders: Encoders, batch_size: int):
        self.texts, self.encoders, self.batch_size = texts, encoders, batch_size
        self.cut = 0

    def prompts(self, index: Sequence[int]) -> Conditioning:
        """On the encoders' device."""
        generator, texts = self.encoders.encoders(), [self.texts[i] for i in index]
        parts = [
            generator.encode_prompts(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)
        ]
        return Conditioning.cat(parts)


def open_prompts(
    texts: Sequence[str],
    encoders: Encoders,
    *,
    where: str,
    dtype: str,
    root: Path,
    batch_size: int,
    reporter: Reporter,
    note: Callable[[str], None],
    workers: Workers = ALONE,
) -> PromptSource:
    """The source of a dataset's prompts; what is not on disk yet is encoded first. Every process must call it.

    where: disk, live, or auto: on disk where a quarter of what is free there holds them. dtype: auto is the encoders' own.
    """
    if where == "live":
        return LivePrompts(texts, encoders, batch_size)
    make_folder(root)
    suffix = "" if dtype == "auto" else f"-{dtype}"
    store = Store(root / f"prompts-{encoders.prints()[1]}{suffix}")
    keys = prompt_keys(texts)
    if where == "auto":
        missing = np.flatnonzero(store.lacks(keys))
        size = _size(texts, missing, encoders, dtype) if workers.rank == 0 else 0
        free = shutil.disk_usage(_existing(root)).free if workers.rank == 0 else 0
        total = workers.gather([(size, free)])[0]
        if where_prompts_go(*total) == "live":
            note(
                f"{len(missing)} prompts would take {total[0] / 1e9:.1f} GB of {total[1] / 1e9:.1f} GB free in {root}: they are"
                " encoded live; --set prompt_cache=disk keeps them all the same"
            )
            return LivePrompts(texts, encoders, batch_size)
    for _ in range(ROUNDS):
        store.refresh()
        missing = np.flatnonzero(store.lacks(keys))
        if not workers.agree(len(missing) > 0):
            break
        first = {keys[i : i + 1].tobytes(): int(i) for i in missing[::-1]}
        mine = [i for i in first.values() if workers.owns(texts[i])]
        _encode(texts, mine[::-1], keys, encoders, store, dtype, batch_size, reporter)
        workers.gather([])  # all have written
    else:
        raise RunError(
            f"{store.folder}: what another process has encoded does not appear here",
            hint="all processes need one cache folder: name a shared one with --cache-dir",
        )
    if workers.rank == 0:
        store.save_index()
    return CachedPrompts(store, keys)


def where_prompts_go(size: int, free: int) -> str:
    """What `auto` means for prompts of so many bytes on a disk with so many free: disk or live."""
    return "live" if size > SHARE_OF_DISK * free else "disk"


def _encode(
    texts: Sequence[str],
    mine: list[int],
    keys: np.ndarray,
    encoders: Encoders,
    store: Store,
    dtype: str,
    batch_size: int,
    reporter: Reporter,
) -> None:
    writer = Writer(store)
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        generator = encoders.encoders()
        rows = rows_of(generator.encode_prompts([texts[i] for i in some]), dtype)
        cut = [int(generator.truncated(texts[i])) for i in some]
        writer.add([keys[i : i + 1].tobytes() for i in some], rows, cut)
        reporter.progress("encode prompts", start + len(some), len(mine))
    writer.flush()


def rows_of(cond: Conditioning, dtype: str) -> list[dict[str, torch.Tensor]]:
    """A row a prompt, each without the positions that nothing reads, in the number format of the cache."""
    if dtype != "auto":
        cond = cond.to(DTYPES[dtype])
    return [{name: t[0] for name, t in cond[i : i + 1].trimmed().tensors.items()} for i in range(len(cond))]


def _size(texts: Sequence[str], missing: np.ndarray, encoders: Encoders, dtype: str) -> int:
    """Bytes that the missing prompts would take, told from the first few."""
    if not len(missing):
        return 0
    from drmcli.data.store import packed

    some = [texts[i] for i in missing[:PROBE]]
    tensors, _ = packed(
        [{k: t.cpu() for k, t in row.items()} for row in rows_of(encoders.encoders().encode_prompts(some), dtype)]
    )
    return sum(t.nbytes for t in tensors.values()) * len(missing) // len(some)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
