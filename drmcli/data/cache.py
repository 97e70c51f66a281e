"""Encoded once: VAE latents and the prompts' conditioning on disk, keyed by content, by what the encoders compute, and by resolution.

Several processes encode together, each its share. Where all is there already, no encoder is loaded and no picture is read.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.data.images import ArrayImage, BadImage, ImageSource, ParquetImage, decode, load_image
from drmcli.data.manifest import Manifest, Stamps
from drmcli.data.store import KEY, Store, Writer, digest_of, keys_of
from drmcli.errors import InputError, RunError
from drmcli.files import make_folder, name_place
from drmcli.generator import Generator
from drmcli.run import Reporter

ROUNDS = 3
"""Times that what is missing is looked for before the cache is given up as not shared by all processes."""


def cache_root(configured: str | None) -> Path:
    """The cache folder: as configured, else $DRM_CACHE, else ~/.cache/drmcli. It is not made yet.

    Raises InputError where a file is in the way; what fails below the folder from now on is told with the flag that named it.
    """
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "drmcli")
    named = [("--cache-dir", configured), ("DRM_CACHE", os.environ.get("DRM_CACHE")), ("--cache-dir", usual)]
    flag, name = next((flag, name) for flag, name in named if name)
    try:
        root = Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{flag} {name}: {error}", hint="name a folder for the cache with --cache-dir") from None
    for part in (root, *root.parents):
        if part.is_file():
            raise InputError(f"{flag} {root}: {part} is a file", hint="name a folder for the cache with --cache-dir")
    name_place(root, flag)
    return root


@dataclass(frozen=True)
class Workers:
    """The processes that encode one dataset together, each its share, whoever has written what already."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda items: items
    """The lists of all processes, end to end; each waits for all."""

    def owns(self, name: str) -> bool:
        return zlib.crc32(name.encode()) % self.world == self.rank

    def agree(self, fact: bool) -> bool:
        """Does any process say so? All get the same answer."""
        return any(self.gather([fact]))


ALONE = Workers()


class Encoders(Protocol):
    """What encodes, loaded when it is first needed."""

    def prints(self) -> tuple[str, str]:
        """Short hashes of what the VAE and the text encoders compute, without loading them."""

    def image_size(self) -> int:
        """Side in pixels of the pictures that the model was made for, without loading it."""

    def encoders(self) -> Generator:
        """The VAE and the text encoders."""


class Pictures:
    """Latents of a dataset's pictures, by position."""

    def __init__(self, store: Store, keys: np.ndarray, bad: dict[int, str]):
        self.store, self.keys, self.bad = store, keys, bad
        self.shard, self.row, _ = store.locate(keys)

    def key(self, i: int) -> str | None:
        """Content hash of a picture; None where it is bad."""
        return None if i in self.bad else digest_of(self.keys, i)

    def latents(self, index: Sequence[int]) -> Tensor:
        """Clean latents [len(index), C, H, W], float32."""
        at = np.asarray(index, np.int64)
        rows = self.store.read(self.shard[at], self.row[at])
        try:
            return torch.stack([row["latents"] for row in rows]).float()
        except RuntimeError as error:
            raise RunError(
                f"{self.store.folder}: rows of unlike shapes: {error}", hint="delete that folder; it is rebuilt"
            ) from error


def encode_pictures(
    images: Sequence[ImageSource],
    encoders: Encoders,
    *,
    resolution: int | None,
    root: Path,
    batch_size: int,
    reporter: Reporter,
    workers: Workers = ALONE,
) -> Pictures:
    """Encode what is not in the cache yet. Every process must call it; each takes its share and sees the others' when it returns.

    A picture is looked up by its content; a file that has not changed since (path, size, time) is not even read. Bad pictures are
    listed, not replaced, the same list in every process.
    """
    make_folder(root)
    side = resolution or encoders.image_size()
    store = Store(root / f"images-{encoders.prints()[0]}-{side}")
    manifest, stamps = Manifest(root / "files"), Stamps.of(images)
    keys, bad = manifest.find(stamps), dict[int, str]()
    for _ in range(ROUNDS):
        store.refresh()
        missing = np.flatnonzero((keys == b"") | store.lacks(keys))
        missing = missing[~np.isin(missing, list(bad))]
        if not workers.agree(len(missing) > 0):
            break
        mine = [i for i in missing.tolist() if workers.owns(together(images[i]))]
        share = Share(images, encoders, store, manifest, stamps, side, batch_size, reporter)
        for index, found, faults in workers.gather([share.encode(mine)]):
            keys[index] = found
            bad |= faults
    else:
        raise RunError(
            f"{store.folder}: what another process has encoded does not appear here",
            hint="all processes need one cache folder: name a shared one with --cache-dir",
        )
    if workers.rank == 0:
        store.save_index()
        manifest.join()
    return Pictures(store, keys, bad)


def together(image: ImageSource) -> str:
    """Pictures of one name are one process's: those of a row group of Parquet, which is read as a whole."""
    return f"{image.path}:{image.group}" if isinstance(image, ParquetImage) else image.key


@dataclass
class Share:
    """One process's work on missing pictures."""

    images: Sequence[ImageSource]
    encoders: Encoders
    store: Store
    manifest: Manifest
    stamps: Stamps
    side: int
    batch_size: int
    reporter: Reporter

    def encode(self, mine: list[int]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Hash pictures and encode those whose content is new. Returns their positions, keys, and the bad ones with the reason."""
        index: list[int] = []
        keys: list[bytes] = []
        bad: dict[int, str] = {}
        noted = 0
        known = self.store.sorted_keys()
        writer, taken = Writer(self.store), set[bytes]()
        waiting: list[tuple[bytes, Image.Image]] = []

        def note() -> None:
            nonlocal noted
            fresh = np.frombuffer(b"".join(keys[noted:]), KEY)
            self.manifest.add(self.stamps, np.array(index[noted:], np.int64), fresh)
            noted = len(keys)

        def encode() -> None:
            generator = self.encoders.encoders()
            latents = generator.encode_images([image for _, image in waiting], self.side)
            rows = [{"latents": row} for row in latents.to(generator.pipe.vae.dtype)]
            if writer.add([key for key, _ in waiting], rows):
                note()
            waiting.clear()

        for done, (i, found) in enumerate(in_order(lambda i: prepare(self.images[i], self.side, known), mine), 1):
            if isinstance(found, BadImage):
                bad[i] = found.reason
            else:
                key, image = found
                index.append(i)
                keys.append(key)
                if image is not None and key not in taken:
                    taken.add(key)
                    waiting.append((key, image))
            if len(waiting) == self.batch_size:
                encode()
            if done % self.batch_size == 0 or done == len(mine):
                self.reporter.progress("encode images", done, len(mine))
        if waiting:
            encode()
        writer.flush()
        note()
        return np.array(index, np.int64), np.frombuffer(b"".join(keys), KEY), bad


def prepare(source: ImageSource, side: int, known: np.ndarray) -> tuple[bytes, Image.Image | None] | BadImage:
    """A picture's key, and the picture, cut and resized, unless its key is among the `known` (sorted). It is read once."""
    try:
        data = None if isinstance(source, ArrayImage) else source.read()
        key = bytes.fromhex(source.digest()) if data is None else hashlib.sha256(data).digest()
        at = int(np.searchsorted(known, np.bytes_(key)))
        if at < len(known) and known[at : at + 1].tobytes() == key:
            return key, None
        return key, square(load_image(source) if data is None else decode(data, source.key), side)
    except BadImage as error:
        return error


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture as a square of `side` pixels, as diffusers' image processor crops and resizes (Lanczos)."""
    width = side if image.width <= image.height else image.width * side // image.height
    height = side if image.width >= image.height else image.height * side // image.width
    resized = image.resize((width, height), resample=Image.Resampling.LANCZOS)
    out = Image.new("RGB", (side, side))
    out.paste(resized, box=(side // 2 - width // 2, side // 2 - height // 2))
    return out


def in_order(work: Callable[[int], Any], items: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(item, work of it) in order, computed by threads a little ahead: Pillow and the hash leave Python's lock while they work."""
    threads = min(16, (os.cpu_count() or 2) + 2)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[int, Future[Any]]] = deque()
        try:
            for item in items:
                ahead.append((item, pool.submit(work, item)))
                if len(ahead) > 4 * threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def prompt_keys(prompts: Sequence[str]) -> np.ndarray:
    """Keys [n] of prompts."""
    return keys_of([hashlib.sha256(p.encode()).hexdigest() for p in prompts])
