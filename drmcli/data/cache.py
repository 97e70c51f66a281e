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
from drmcli.generator import Generator, PromptEmbeds
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
        rows: list[dict[str, Tensor]] = []
        for key in keys:
            name, i = self.rows[key]
            shard = self._shard(name)
            rows.append({tensor: shard.get_slice(tensor)[i] for tensor in list(shard.keys())})
        try:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        except RuntimeError as error:
            raise RunError(
                f"{self.folder}: rows of unlike shapes: {error}", hint="delete that folder; it is rebuilt"
            ) from error

    def _shard(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
        return self._open[name]


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

    def prompts(self, index: Sequence[int]) -> PromptEmbeds:
        """Embeddings of prompts by position."""
        rows = self.prompt_store.get([self.prompt_keys[i] for i in index])
        return PromptEmbeds(rows["prompt_embeds"], rows["pooled_prompt_embeds"])


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
    rank: int = 0,
    world: int = 1,
) -> Encoded:
    """Encode what is not in the cache yet. With several processes each takes its share; call again after a barrier.

    A picture is looked up by its content; a file that has not changed since (path, size, time) is not even read.
    Bad pictures are listed, not replaced.
    """
    generator = load()
    image_print, text_print = fingerprints(generator)
    side = resolution or generator.image_size
    image_store = Store(root / f"images-{image_print}-{side}")
    prompt_store = Store(root / f"prompts-{text_print}")
    stamps = Stamps(root / "stamps")

    prompt_keys = [hashlib.sha256(p.encode()).hexdigest() for p in prompts]
    missing = {k: p for k, p in zip(prompt_keys, prompts) if k not in prompt_store}
    mine = list(missing.items())[rank::world]
    done = 0
    for part in _batched(mine, batch_size, SHARD):
        embeds = [generator.encode_prompts([p for _, p in some]) for some in part]
        tensors = {
            "prompt_embeds": torch.cat([e.prompt_embeds for e in embeds]),
            "pooled_prompt_embeds": torch.cat([e.pooled_prompt_embeds for e in embeds]),
        }
        keys = [k for some in part for k, _ in some]
        prompt_store.add(keys, tensors)
        done += len(keys)
        reporter.progress("encode prompts", done, len(mine))

    bad: list[BadImage] = []
    image_keys: list[str | None] = [None] * len(images)
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 2) + 2)) as pool:
        for i, found in enumerate(pool.map(lambda s: _key(s, stamps), images, chunksize=64)):
            if isinstance(found, BadImage):
                bad.append(found)
            else:
                image_keys[i] = found
        todo = {key: images[i] for i, key in enumerate(image_keys) if key is not None and key not in image_store}
        share = list(todo.items())[rank::world]
        broken: dict[str, BadImage] = {}
        done = 0
        for part in _batched(share, batch_size, SHARD):
            keys, latents = [], []
            loaded = pool.map(lambda item: (item[0], _load(item[1])), [item for some in part for item in some])
            for some in _chunks(loaded, batch_size):
                good = [(k, image) for k, image in some if not isinstance(image, BadImage)]
                broken |= {k: image for k, image in some if isinstance(image, BadImage)}
                if good:
                    keys += [k for k, _ in good]
                    latents.append(
                        generator.encode_images([image for _, image in good], side).to(generator.pipe.vae.dtype)
                    )
                done += len(some)
                reporter.progress("encode images", done, len(share))
            if keys:
                image_store.add(keys, {"latents": torch.cat(latents)})
        for i, key in enumerate(image_keys):
            if key in broken:
                fault = broken[key]  # type: ignore[index]
                bad.append(BadImage(images[i].key, fault.reason))
                image_keys[i] = None
    stamps.save()
    return Encoded(image_store, prompt_store, image_keys, prompt_keys, bad)


class Stamps:
    """Content hashes of files by path, size and time of change, so that an unchanged file need not be read again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, str] = {}
        self.fresh: dict[str, str] = {}
        for file in sorted(folder.glob("*.json")):
            try:
                self.known |= json.loads(file.read_text())
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
