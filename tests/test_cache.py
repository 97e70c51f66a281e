"""The cache: everything is encoded once, and nothing half-written is ever read."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_pairs
from PIL import Image

from drmcli.data import cache, sources, store
from drmcli.data.batches import Encoded
from drmcli.data.datasets import read_file
from drmcli.data.images import BytesImage, FileImage
from drmcli.data.manifest import Manifest, Stamps
from drmcli.data.sources import open_prompts
from drmcli.errors import DrmError, InputError, RunError
from drmcli.generator import Generator
from drmcli.run import Silent


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> Generator:
    return Generator.load(str(generator_folder), components=("text", "vae"), max_sequence_length=1)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Counting:
    """A generator that counts what it encodes."""

    def __init__(self, generator: Generator, monkeypatch: pytest.MonkeyPatch):
        self.images = self.prompts = 0
        encode_images, encode_prompts = generator.encode_images, generator.encode_prompts

        def images(some, *args):
            self.images += len(some)
            return encode_images(some, *args)

        def prompts(some):
            self.prompts += len(some)
            return encode_prompts(some)

        monkeypatch.setattr(generator, "encode_images", images)
        monkeypatch.setattr(generator, "encode_prompts", prompts)


@dataclass
class Ready:
    """Encoders that are loaded already; `asked` tells how often they were needed."""

    generator: Generator
    asked: int = 0

    def prints(self) -> tuple[str, str]:
        return self.generator.fingerprint(("vae",)), self.generator.fingerprint(("text",))

    def image_size(self) -> int:
        return self.generator.image_size

    def encoders(self) -> Generator:
        self.asked += 1
        return self.generator


@dataclass
class Cached(Encoded):
    """What was encoded, and what the encoders had to do."""

    images: list
    asked: int

    @property
    def bad(self) -> list[str]:
        return [self.images[i].key for i in sorted(self.pictures.bad)]

    @property
    def image_keys(self) -> list[str | None]:
        return [self.pictures.key(i) for i in range(len(self.images))]


def encode(
    generator: Generator,
    images,
    prompts,
    root: Path,
    resolution: int | None = None,
    workers: cache.Workers = cache.ALONE,
    where: str = "disk",
    dtype: str = "auto",
    note=lambda text: None,
) -> Cached:
    ready = Ready(generator)
    common = {"root": root, "batch_size": 5, "reporter": Silent(), "workers": workers}
    source = open_prompts(prompts, ready, where=where, dtype=dtype, note=note, **common)
    pictures = cache.encode_pictures(images, ready, resolution=resolution, **common)
    return Cached(pictures, source, list(images), ready.asked)


def test_everything_is_encoded_once(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_file(write_pairs(tmp_path / "data", 6))
    count = Counting(generator, monkeypatch)
    first = encode(generator, [*data.images, data.images[0]], [*data.prompts, data.prompts[0]], tmp_path / "cache")
    assert (count.images, count.prompts) == (12, 6)
    again = encode(generator, data.images, data.prompts, tmp_path / "cache")
    assert (count.images, count.prompts) == (12, 6)
    assert torch.equal(first.latents([3, 0]), again.latents([3, 0]))
    assert torch.equal(first.prompts([1]).prompt_embeds, again.prompts([1]).prompt_embeds)


def test_cached_is_what_the_encoder_gives(generator: Generator, tmp_path: Path) -> None:
    from drmcli.data.images import load_image

    data = read_file(write_pairs(tmp_path / "data", 3))
    encoded = encode(generator, data.images, data.prompts, tmp_path / "cache")
    pictures = [load_image(i) for i in data.images]
    torch.testing.assert_close(encoded.latents(range(6)), generator.encode_images(pictures), atol=1e-5, rtol=1e-5)
    embeds = generator.encode_prompts(data.prompts)
    torch.testing.assert_close(encoded.prompts(range(3)).prompt_embeds, embeds.prompt_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        encoded.prompts(range(3)).pooled_prompt_embeds, embeds.pooled_prompt_embeds, atol=1e-5, rtol=1e-5
    )


def test_an_unchanged_file_is_not_read_again(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pairs(tmp_path / "data", 2)
    encode(generator, read_file(file).images, [], tmp_path / "cache")
    reads = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self.name) or original(self))
    encode(generator, read_file(file).images, [], tmp_path / "cache")
    assert [name for name in reads if name.endswith(".png")] == []


def test_a_changed_file_is_encoded_again(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pairs(tmp_path / "data", 2)
    before = encode(generator, read_file(file).images, [], tmp_path / "cache").latents([0])
    (file.parent / "0-a.png").write_bytes((file.parent / "1-a.png").read_bytes())
    count = Counting(generator, monkeypatch)
    after = encode(generator, read_file(file).images, [], tmp_path / "cache")
    assert count.images == 0, "its new content is known already, as 1-a.png"
    assert not torch.equal(before, after.latents([0]))


def test_resolutions_are_kept_apart(generator: Generator, tmp_path: Path) -> None:
    data = read_file(write_pairs(tmp_path / "data", 1))
    assert encode(generator, data.images, [], tmp_path / "cache").latents([0]).shape == (1, 4, 16, 16)
    assert encode(generator, data.images, [], tmp_path / "cache", 16).latents([0]).shape == (1, 4, 8, 8)


def test_killed_half_way_leaves_nothing_half(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 5 * 4 * 16 * 16 * 4)
    data = read_file(write_pairs(tmp_path / "data", 6))
    original, calls = store.write_shard, []

    def dies(path: Path, *content) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            encode(generator, data.images, [], tmp_path / "cache")
    count = Counting(generator, monkeypatch)
    encoded = encode(generator, data.images, [], tmp_path / "cache")
    assert count.images == 7, "five of twelve were kept"
    assert encoded.latents(range(12)).shape == (12, 4, 16, 16)


def test_a_damaged_shard_is_made_again(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_file(write_pairs(tmp_path / "data", 2))
    whole = encode(generator, data.images, [], tmp_path / "cache").latents(range(4))
    shard = next((tmp_path / "cache").glob("images-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    count = Counting(generator, monkeypatch)
    assert torch.equal(encode(generator, data.images, [], tmp_path / "cache").latents(range(4)), whole)
    assert count.images == 4


def test_bad_images_are_listed_not_replaced(generator: Generator, tmp_path: Path) -> None:
    data = read_file(write_pairs(tmp_path / "data", 2))
    images = [*data.images, BytesImage("broken.png", b"nonsense")]
    encoded = encode(generator, images, [], tmp_path / "cache")
    assert encoded.bad == ["broken.png"]
    assert encoded.image_keys[4] is None
    assert None not in encoded.image_keys[:4]


def test_fingerprints_tell_models_apart(generator: Generator, generator_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(generator_folder, tmp_path / "copy"))
    same = Generator.load(str(copy), components=("text", "vae"), max_sequence_length=1)
    assert same.fingerprint(("vae",)) == generator.fingerprint(("vae",))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).add_(0.1)
    save_file(tensors, weights)
    other = Generator.load(str(copy), components=("text", "vae"), max_sequence_length=1)
    assert other.fingerprint(("vae",)) != generator.fingerprint(("vae",))
    assert other.fingerprint(("text",)) == generator.fingerprint(("text",))


def test_processes_share_what_is_missing_whoever_came_first(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes side by side: each row is encoded once, none is missing, and both know the bad pictures."""
    monkeypatch.setattr(store, "SHARD_BYTES", 5 * 4 * 16 * 16 * 4)
    data = read_file(write_pairs(tmp_path / "data", 8))
    images = [*data.images, *(BytesImage(f"broken-{i}.png", b"nonsense %d" % i) for i in range(4))]
    meeting = threading.Barrier(2)
    generators = [
        Generator.load(str(generator_folder), components=("text", "vae"), max_sequence_length=1) for _ in "ab"
    ]
    brought: dict[int, list] = {}
    original, seen = store.Store.add, []

    def add(self: store.Store, keys, rows, flags=None) -> None:
        original(self, keys, rows, flags)
        seen.extend(store.digest_of(keys, i) for i in range(len(keys)))

    monkeypatch.setattr(store.Store, "add", add)

    def process(rank: int) -> Cached:
        def gather(items: list) -> list:
            brought[rank] = items
            meeting.wait(60)
            both = [*brought[0], *brought[1]]
            meeting.wait(60)
            return both

        workers = cache.Workers(rank, 2, gather)
        return encode(generators[rank], images, data.prompts, tmp_path / "cache", workers=workers)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert sorted(seen) == sorted({*map(sha, data.prompts), *(k for k in first.image_keys if k)}), (
        "each is encoded once"
    )
    for encoded in (first, second):
        assert encoded.latents(range(16)).shape == (16, 4, 16, 16)
        assert len(encoded.prompts(range(8))) == 8
        assert encoded.bad == [f"broken-{i}.png" for i in range(4)]
        assert encoded.image_keys[16:] == [None] * 4


def test_a_share_does_not_depend_on_what_is_written_already() -> None:
    """Cutting what is missing by rank loses rows when another process has written in the meantime."""
    keys = [sha(str(i)) for i in range(64)]
    shares = [{k for k in keys if cache.Workers(rank, 2).owns(k)} for rank in range(2)]
    assert shares[0] | shares[1] == set(keys) and not shares[0] & shares[1]
    assert 16 < len(shares[0]) < 48


def test_a_cache_that_is_not_shared_is_said(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="another process"):
        encode(generator, [], ["a", "b"], tmp_path, workers=cache.Workers(0, 2, lambda items: [*items, True]))


def test_a_full_cache_needs_no_encoder_and_reads_no_picture(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_file(write_pairs(tmp_path / "data", 4))
    first = encode(generator, data.images, data.prompts, tmp_path / "cache")
    monkeypatch.setattr(FileImage, "read", lambda self: pytest.fail("read again"))
    again = encode(generator, data.images, data.prompts, tmp_path / "cache")
    assert (first.asked > 0, again.asked) == (True, 0)
    assert torch.equal(first.latents(range(8)), again.latents(range(8)))


def test_prompts_that_are_cut_are_known_without_the_tokenizer(generator: Generator, tmp_path: Path) -> None:
    texts = ["short", "a very long prompt " * 60]
    assert encode(generator, [], texts, tmp_path).source.cut == 1
    again = encode(generator, [], texts, tmp_path)
    assert (again.source.cut, again.asked) == (1, 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_embeddings_may_be_kept_in_fewer_bits(generator: Generator, tmp_path: Path, dtype: str) -> None:
    full, narrow = (encode(generator, [], ["a circle", "a square"], tmp_path, dtype=d) for d in ("auto", dtype))
    a, b = full.prompts([0, 1]).prompt_embeds, narrow.prompts([0, 1]).prompt_embeds
    assert b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b.float(), rtol={"bf16": 0.01, "fp8": 0.1}[dtype], atol=0.02)
    assert not torch.equal(a, b.float())


def test_zeros_are_not_stored(generator: Generator, tmp_path: Path) -> None:
    """Half of each line of CLIP, and all of T5's where there is no T5, are zeros."""
    encoded = encode(generator, [], ["a circle"], tmp_path)
    cond = encoded.prompts([0])
    dense = sum(t.nbytes for t in cond.tensors.values())
    assert (cond.prompt_embeds == 0).float().mean() > 0.01, "nothing to leave out: this test needs another generator"
    shard = next(tmp_path.glob("prompts-*/*.safetensors"))
    zeros = int((cond.prompt_embeds == 0).sum()) * 4
    lines = cond.prompt_embeds.shape[1]
    assert shard.stat().st_size < dense - zeros + 4 * lines + 1000


def test_prompts_live_are_those_on_disk(generator: Generator, tmp_path: Path) -> None:
    texts = ["a circle", "a square", "a star"]
    disk, live = (encode(generator, [], texts, tmp_path, where=where) for where in ("disk", "live"))
    torch.testing.assert_close(disk.prompts([2, 0]).prompt_embeds, live.prompts([2, 0]).prompt_embeds)


def test_prompts_that_would_fill_the_disk_are_encoded_live(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    small = SimpleNamespace(free=50_000)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: small)
    encoded = encode(generator, [], ["a circle", "a square"], tmp_path, where="auto", note=said.append)
    assert isinstance(encoded.source, sources.LivePrompts)
    assert "2 prompts would take" in said[0] and "live" in said[0]
    small.free = 10**9
    assert isinstance(
        encode(generator, [], ["a circle", "a square"], tmp_path, where="auto").source, sources.CachedPrompts
    )


@pytest.mark.parametrize(("limit", "value"), [("SHARD_BYTES", 10 * 4 * 16 * 16 * 4), ("SHARD_ROWS", 10)])
def test_shards_are_cut_by_bytes_and_rows(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(store, limit, value)
    data = read_file(write_pairs(tmp_path / "data", 12))
    encode(generator, data.images, [], tmp_path / "cache")
    assert len(list(tmp_path.glob("cache/images-*/*.safetensors"))) == 3  # batches of 5: 10, 10 and 4


def test_the_index_spares_the_shards(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index no shard is opened to learn its keys; shards that came or went since are seen."""
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    monkeypatch.setattr(store, "UNINDEXED", 2)
    data = read_file(write_pairs(tmp_path / "data", 9))
    encode(generator, data.images, [], tmp_path / "cache")
    folder = next((tmp_path / "cache").glob("images-*"))
    assert (folder / store.INDEX).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(store, "safe_open", lambda *a, **k: pytest.fail("opened"))
        assert len(store.Store(folder)) == 18
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    left = store.Store(folder)
    assert len(left) in (13, 15)
    count = Counting(generator, monkeypatch)
    encoded = encode(generator, data.images, [], tmp_path / "cache")
    assert count.images == 18 - len(left)
    assert encoded.latents(range(18)).shape == (18, 4, 16, 16)


def test_a_cache_deleted_while_it_is_in_use_is_one_line(generator: Generator, tmp_path: Path) -> None:
    data = read_file(write_pairs(tmp_path / "data", 2))
    encoded = encode(generator, data.images, [], tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RunError, match="gone or damaged while it is in use"):
        encoded.latents([0])


def test_pictures_are_cut_as_diffusers_cuts_them(generator: Generator) -> None:
    rng = np.random.default_rng(0)
    for size in ((32, 32), (50, 31), (31, 50), (200, 64), (17, 90)):
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        ours = generator.preprocess([cache.square(image, 32)], 32)
        assert torch.equal(ours, generator.preprocess([image], 32)), size


def test_a_manifest_of_many_parts_is_joined(tmp_path: Path) -> None:
    """Of a path that was seen twice the newest row counts."""
    file = tmp_path / "x.png"
    book = Manifest(tmp_path / "files")
    for i in range(20):
        file.write_bytes(b"x" * (i + 1))
        stamps = Stamps.of([FileImage("x", str(file))])
        book.add(stamps, np.array([0]), store.keys_of([sha(str(i))]))
    assert store.digest_of(book.find(stamps), 0) == sha("19")
    book.join()
    assert len(list((tmp_path / "files").iterdir())) == 1
    assert store.digest_of(book.find(stamps), 0) == sha("19")
    file.write_bytes(b"other")
    assert book.find(Stamps.of([FileImage("x", str(file))]))[0] == b""


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, InputError), (errno.ENOSPC, RunError)])
def test_a_cache_that_cannot_be_written_names_the_option(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[DrmError]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "save_file", refused)
    with pytest.raises(kind, match=f"cache {tmp_path}.*: cannot be written") as told:
        encode(generator, [], ["a circle"], tmp_path)
    assert "--cache-dir" in told.value.hint and "--no-cache" in told.value.hint
