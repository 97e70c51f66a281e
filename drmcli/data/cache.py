"""Encoded once: VAE latents and prompt embeddings on disk, keyed by content, model and resolution.

A store is a folder of safetensors shards, each written whole or not at all, so a killed run leaves nothing half-done and
several processes may write side by side. Rows are read straight from the mapped files; the encoders need not stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from drmcli.data.images import BadImage, FileImage, ImageSource, load_image
from drmcli.errors import InputError, RunError
from drmcli.families.base import Conditioning
from drmcli.generator import Generator
from drmcli.run import Reporter, write_bytes

SHARD = 1024
"""Rows a shard at most."""
OPEN_SHARDS = 64
"""Mapped shards kept open."""


def cache_root(configured: str | None) -> Path:
    """The cache folder: as configured, else $DRM_CACHE, else ~/.cache/drmcli. Raises InputError where a file is in the way."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "drmcli"
    root = Path(configured or os.environ.get("DRM_CACHE") or home)
    for part in (root, *root.parents):
        if part.is_file():
            flag = "--cache-dir" if configured else "DRM_CACHE" if os.environ.get("DRM_CACHE") else "cache"
            raise InputError(f"{flag} {root}: {part} is a file", hint="name a folder for the cache with --cache-dir")
    return root


class Store:
    """Rows of tensors by key. All rows of a store have the same tensors; shapes may differ between shards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, tuple[str, int]] = {}
        self._seen: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that have appeared since. A damaged one is removed: its rows are encoded again."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._seen:
                continue
            try:
                with safe_open(file, framework="pt") as shard:
                    keys = json.loads(shard.metadata()["keys"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                file.unlink(missing_ok=True)
                continue
            self._seen.add(file.name)
            self.rows.update({key: (file.name, i) for i, key in enumerate(keys)})

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, keys: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Write rows as one shard. tensors: name -> [len(keys), ...]."""
        name = f"{uuid.uuid4().hex}.safetensors"
        data = save(
            {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()},
            metadata={"keys": json.dumps(list(keys))},
        )
        write_bytes(self.folder / name, data)
        self._seen.add(name)
        self.rows.update({key: (name, i) for i, key in enumerate(keys)})

    def get(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Rows by key, stacked: name -> [len(keys), ...]. Rows of unlike shapes cannot be stacked and raise RunError."""
        rows = self.rows_of(keys)
        with explained_shapes(self.folder):
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rows_of(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """Rows by key, each name -> [...]."""
        rows: list[dict[str, Tensor]] = []
        for key in keys:
            name, i = self.rows[key]
            shard = self._shard(name)
            rows.append({tensor: shard.get_slice(tensor)[i] for tensor in list(shard.keys())})
        return rows

    def _shard(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
        return self._open[name]


@dataclass(frozen=True)
class Workers:
    """The processes that encode one dataset together, each its share of the keys, whoever has written what already."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda items: items
    """The lists of all processes, end to end; each waits for all."""

    def owns(self, key: str) -> bool:
        return int(key[:8], 16) % self.world == self.rank

    def agree(self, fact: bool) -> bool:
        """Does any process say so? All get the same answer."""
        return any(self.gather([fact]))


ALONE = Workers()
ROUNDS = 3
"""Times that what is missing is looked for before the cache is given up as not shared by all processes."""


@contextmanager
def explained_shapes(folder: Path) -> Iterator[None]:
    """Rows that cannot be stacked, as one clear error."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"{folder}: rows of unlike shapes: {error}", hint="delete that folder; it is rebuilt") from error


@dataclass
class Encoded:
    """Encoded pictures and prompts of one dataset, read by position in its lists."""

    image_store: Store
    prompt_store: Store
    image_keys: list[str | None]
    """A key a picture; None where the picture is bad."""
    prompt_keys: list[str]
    bad: list[BadImage]

    def latents(self, index: Sequence[int]) -> Tensor:
        """Clean latents [len(index), C, H, W] of pictures by position."""
        return self.image_store.get([self.image_keys[i] or "" for i in index])["latents"].float()

    def prompts(self, index: Sequence[int]) -> Conditioning:
        """Conditioning of prompts by position."""
        rows = self.prompt_store.rows_of([self.prompt_keys[i] for i in index])
        with explained_shapes(self.prompt_store.folder):
            return Conditioning.cat([Conditioning({k: t[None] for k, t in row.items()}) for row in rows])


def encode(
    images: Sequence[ImageSource],
    prompts: Sequence[str],
    load: Callable[[], Generator],
    fingerprints: Callable[[Generator], tuple[str, str]],
    *,
    resolution: int | None,
    root: Path,
    batch_size: int,
    reporter: Reporter,
    workers: Workers = ALONE,
) -> Encoded:
    """Encode what is not in the cache yet. Every process must call it; each takes its share and sees the others' when it returns.

    A picture is looked up by its content; a file that has not changed since (path, size, time) is not even read.
    Bad pictures are listed, not replaced, the same list in every process.
    """
    generator = load()
    image_print, text_print = fingerprints(generator)
    side = resolution or generator.image_size
    image_store = Store(root / f"images-{image_print}-{side}")
    prompt_store = Store(root / f"prompts-{text_print}")
    stamps = Stamps(root / "stamps")

    prompt_keys = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
    for share in _rounds(prompt_store, workers, lambda: dict(zip(prompt_keys, prompts))):
        _encode_prompts(share, generator, prompt_store, batch_size, reporter)

    with ThreadPoolExecutor(min(8, (os.cpu_count() or 2) + 2)) as pool:
        found = list(pool.map(lambda s: _key(s, stamps), images, chunksize=64))
        keys = [None if isinstance(key, BadImage) else key for key in found]
        faults = {i: key.reason for i, key in enumerate(found) if isinstance(key, BadImage)}
        broken: dict[str, str] = {}

        def wanted() -> dict[str, ImageSource]:
            return {key: images[i] for i, key in enumerate(keys) if key and key not in broken}

        for missing in _rounds(image_store, workers, wanted):
            mine = _encode_images(missing, generator, image_store, side, batch_size, reporter, pool)
            broken.update(workers.gather(list(mine.items())))
    stamps.save()
    faults = dict(workers.gather([*faults.items(), *((i, broken[k]) for i, k in enumerate(keys) if k and k in broken)]))
    bad = [BadImage(images[i].key, faults[i]) for i in sorted(faults)]
    return Encoded(
        image_store, prompt_store, [None if i in faults else k for i, k in enumerate(keys)], prompt_keys, bad
    )


def _rounds(store: Store, workers: Workers, wanted: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """This process's share of what a store lacks, again until it lacks nothing in any process."""
    for _ in range(ROUNDS):
        store.refresh()
        missing = {key: item for key, item in wanted().items() if key not in store}
        if not workers.agree(bool(missing)):
            return
        yield {key: item for key, item in missing.items() if workers.owns(key)}
        workers.gather([])  # all have written
    raise RunError(
        f"{store.folder}: rows that another process has encoded do not appear here",
        hint="all processes need one cache folder: name a shared one with --cache-dir",
    )


def _encode_prompts(
    missing: dict[str, str], generator: Generator, store: Store, batch_size: int, reporter: Reporter
) -> None:
    done = 0
    for part in _batched(list(missing.items()), batch_size, SHARD):
        embeds = Conditioning.cat([generator.encode_prompts([p for _, p in some]) for some in part])
        keys = [k for some in part for k, _ in some]
        store.add(keys, embeds.tensors)
        done += len(keys)
        reporter.progress("encode prompts", done, len(missing))


def _encode_images(
    missing: dict[str, ImageSource],
    generator: Generator,
    store: Store,
    side: int,
    batch_size: int,
    reporter: Reporter,
    pool: ThreadPoolExecutor,
) -> dict[str, str]:
    """Encode pictures by key. Returns those that cannot be decoded, with the reason."""
    broken: dict[str, str] = {}
    done = 0
    for part in _batched(list(missing.items()), batch_size, SHARD):
        keys, latents = [], []
        loaded = pool.map(lambda item: (item[0], _load(item[1])), [item for some in part for item in some])
        for some in _chunks(loaded, batch_size):
            good = [(k, image) for k, image in some if not isinstance(image, BadImage)]
            broken |= {k: image.reason for k, image in some if isinstance(image, BadImage)}
            if good:
                keys += [k for k, _ in good]
                latents.append(generator.encode_images([image for _, image in good], side).to(generator.pipe.vae.dtype))
            done += len(some)
            reporter.progress("encode images", done, len(missing))
        if keys:
            store.add(keys, {"latents": torch.cat(latents)})
    return broken


class Stamps:
    """Content hashes of files by path, size and time of change, so that an unchanged file need not be read again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, str] = {}
        self.fresh: dict[str, str] = {}
        for file in sorted(folder.glob("*.json")):
            try:
                self.known |= json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                file.unlink(missing_ok=True)

    def digest(self, source: ImageSource) -> str:
        if not isinstance(source, FileImage):
            return source.digest()
        try:
            stat = Path(source.path).stat()
        except OSError:
            return source.digest()  # says what is wrong
        stamp = f"{Path(source.path).resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if stamp not in self.known:
            self.known[stamp] = self.fresh[stamp] = source.digest()
        return self.known[stamp]

    def save(self) -> None:
        if self.fresh:
            write_bytes(self.folder / f"{uuid.uuid4().hex}.json", json.dumps(self.fresh).encode())
            self.fresh = {}


def _key(source: ImageSource, stamps: Stamps) -> str | BadImage:
    try:
        return stamps.digest(source)
    except BadImage as error:
        return error


def _load(source: ImageSource) -> Image.Image | BadImage:
    try:
        return load_image(source)
    except BadImage as error:
        return error


def _chunks(items: Any, size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _batched(items: list[Any], batch: int, shard: int) -> Iterator[list[list[Any]]]:
    """Shards of batches."""
    yield from _chunks(_chunks(items, batch), max(1, shard // batch))
