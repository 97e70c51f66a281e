"""The cache: everything is encoded once, and nothing half-written is ever read."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_pairs

from drmcli.data import cache
from drmcli.data.datasets import read_file
from drmcli.data.images import BytesImage
from drmcli.errors import RunError
from drmcli.generator import Generator
from drmcli.run import Silent


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> Generator:
    return Generator.load(str(generator_folder), components=("text", "vae"), max_sequence_length=1)


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


def encode(
    generator: Generator,
    images,
    prompts,
    root: Path,
    resolution: int | None = None,
    workers: cache.Workers = cache.ALONE,
) -> cache.Encoded:
    return cache.encode(
        images,
        prompts,
        lambda: generator,
        lambda g: (g.fingerprint(("vae",)), g.fingerprint(("text",))),
        resolution=resolution,
        root=root,
        batch_size=5,
        reporter=Silent(),
        workers=workers,
    )


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
    monkeypatch.setattr(cache, "SHARD", 5)
    data = read_file(write_pairs(tmp_path / "data", 6))
    original, calls = cache.write_bytes, []

    def dies(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_bytes", dies)
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
    assert [fault.key for fault in encoded.bad] == ["broken.png"]
    assert encoded.image_keys[4] is None
    assert None not in encoded.image_keys[:4]


def test_fingerprints_tell_models_apart(generator: Generator, generator_folder: Path, tmp_path: Path) -> None:
    import shutil

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
    monkeypatch.setattr(cache, "SHARD", 5)
    data = read_file(write_pairs(tmp_path / "data", 8))
    images = [*data.images, *(BytesImage(f"broken-{i}.png", b"nonsense %d" % i) for i in range(4))]
    meeting = threading.Barrier(2)
    generators = [
        Generator.load(str(generator_folder), components=("text", "vae"), max_sequence_length=1) for _ in "ab"
    ]
    brought: dict[int, list] = {}
    original, seen = cache.Store.add, []

    def add(self: cache.Store, keys: list[str], tensors: dict[str, torch.Tensor]) -> None:
        original(self, keys, tensors)
        seen.extend(keys)

    monkeypatch.setattr(cache.Store, "add", add)

    def process(rank: int) -> cache.Encoded:
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
    assert sorted(seen) == sorted({*first.prompt_keys, *(k for k in first.image_keys if k)}), "each is encoded once"
    for encoded in (first, second):
        assert encoded.latents(range(16)).shape == (16, 4, 16, 16)
        assert len(encoded.prompts(range(8))) == 8
        assert [fault.key for fault in encoded.bad] == [f"broken-{i}.png" for i in range(4)]
        assert encoded.image_keys[16:] == [None] * 4


def test_a_share_does_not_depend_on_what_is_written_already() -> None:
    """Cutting what is missing by rank loses rows when another process has written in the meantime."""
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(64)]
    shares = [{k for k in keys if cache.Workers(rank, 2).owns(k)} for rank in range(2)]
    assert shares[0] | shares[1] == set(keys) and not shares[0] & shares[1]
    assert 16 < len(shares[0]) < 48


def test_a_cache_that_is_not_shared_is_said(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="another process"):
        encode(generator, [], ["a", "b"], tmp_path, workers=cache.Workers(0, 2, lambda items: [*items, True]))
