"""Own files, the published layouts, pictures and archives: what is read, and what is refused with which words."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drmcli.data import archives, datasets, published_layouts
from drmcli.data.datasets import BadImage, Preferences, check, load_image, mix, overlap, read, read_file
from drmcli.data.images import ArrayImage, BytesImage, FileImage, ImageSource
from drmcli.errors import InputError, MissingError, RunError

REAL = Path(__file__).parents[2] / "shared" / "data"
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"


def png(shade: int = 0, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(shade))


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(**more: object) -> dict[str, object]:
    return {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png", **more}


def shown(preferences: Preferences) -> list[tuple[str, str, str, float]]:
    """(pair_id, key of chosen, key of rejected, label) of every pair."""
    keys = [image.key for image in preferences.images]
    return [(row.pair_id, keys[row.chosen], keys[row.rejected], row.label) for row in preferences.pairs.itertuples()]


# --- own files ------------------------------------------------------------------------------------------------------


def test_jsonl_pairs_with_all_columns(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "in/c.png")
    path = jsonl(
        tmp_path,
        pair(pair_id="x", prompt_id="cat", weight=2),
        "",
        pair(chosen="b.png", rejected="in/c.png", label=0.25, prompt_id="cat"),
        pair(chosen="a.png", rejected="in/c.png", label=0.5, prompt="a dog"),
    )
    data = read_file(path)
    assert shown(data) == [
        ("x", "a.png", "b.png", 1.0),
        ("1", "in/c.png", "b.png", 0.75),  # 0.25 for b means 0.75 for c
        ("2", "a.png", "in/c.png", 0.5),
    ]
    assert [image.key for image in data.images] == ["a.png", "b.png", "in/c.png"]  # each once
    assert data.prompts == ["a cat", "a dog"] and data.prompt_ids[0] == "cat"
    assert data.pairs["prompt"].tolist() == [0, 0, 1]
    assert data.pairs["weight"].tolist() == [2.0, 1.0, 1.0]
    assert data.is_tie.tolist() == [False, False, True]
    assert data.protocol == "strict" and data.name == "pairs.jsonl"
    assert load_image(data.images[2]).getpixel((0, 0)) == (2, 0, 7)


def test_ranking_becomes_pairs_with_ties_and_gaps(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "p", "images": ["a", "b", "c", "d"], "ranking": [2, 5, 2, 3], "weight": 3})
    data = read_file(path)
    assert shown(data) == [
        ("0:0-1", "a", "b", 1.0),
        ("0:0-2", "a", "c", 0.5),
        ("0:0-3", "a", "d", 1.0),
        ("0:1-2", "c", "b", 1.0),
        ("0:1-3", "d", "b", 1.0),
        ("0:2-3", "c", "d", 1.0),
    ]
    # The order of the list: in pairs 1-2 and 1-3 the worse picture b is listed first.
    assert data.pairs["chosen_first"].tolist() == [True, True, True, False, False, True]
    assert data.pairs["weight"].unique().tolist() == [3.0]


def test_csv_pairs_and_rankings(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_bytes(
        'prompt,chosen,rejected,label\r\n"a, ""big""\ncat\u2028",a,b,\r\nx,a,c,0.5\r\n'.encode("utf-8-sig")
    )
    data = read_file(pairs)
    assert data.prompts == ['a, "big"\ncat\u2028', "x"]
    assert data.pairs["label"].tolist() == [1.0, 0.5]
    ranking = tmp_path / "ranking.CSV"
    ranking.write_text('prompt,images,ranking\np,"[""a"", ""b"", ""c""]","[1, 2, 2]"\n')
    assert [row[1:] for row in shown(read_file(ranking))] == [("a", "b", 1.0), ("a", "c", 1.0), ("b", "c", 0.5)]


@pytest.mark.parametrize("form", ["binary", "large", "struct", "path"])
def test_parquet_pairs_as_bytes_structs_and_paths(tmp_path: Path, form: str) -> None:
    write(tmp_path, "0.png", "1.png", "2.png")
    cells = {
        "binary": lambda i: png(i),
        "large": lambda i: png(i),
        "struct": lambda i: {"bytes": png(i), "path": "same.png"},
        "path": lambda i: f"{i}.png",
    }[form]
    kind = {"binary": pa.binary(), "large": pa.large_binary(), "path": pa.string()}.get(form)
    table = {"prompt": ["p", "p", "q"]}
    for column, numbers in {"chosen": [0, 1, 2], "rejected": [1, 2, 0]}.items():
        table[column] = pa.array([cells(i) for i in numbers], kind)  # type: ignore[assignment]
    pq.write_table(pa.table(table), tmp_path / "p.parquet", row_group_size=2)
    data = read_file(tmp_path / "p.parquet")
    assert len(data.images) == 3 and len(data) == 3
    shades = [load_image(image).getpixel((0, 0))[0] for image in data.images]  # type: ignore[index]
    assert [(shades[r.chosen], shades[r.rejected]) for r in data.pairs.itertuples()] == [(0, 1), (1, 2), (2, 0)]
    copies = pickle.loads(pickle.dumps(data.images))  # as a data loader's workers get them
    assert [copy.read() for copy in copies] == [image.read() for image in data.images]


def test_parquet_ranking_with_lists_of_bytes(tmp_path: Path) -> None:
    rows = {"prompt": ["p"], "images": [[png(5), png(6), png(5)]], "ranking": [[3, 1, 3]]}
    pq.write_table(pa.table(rows), tmp_path / "r.parquet")
    data = read_file(tmp_path / "r.parquet")
    assert len(data.images) == 2  # the third is the first
    assert data.dropped == {"same picture on both sides": 1}
    assert [load_image(data.images[i]).getpixel((0, 0)) for i in data.pairs["chosen"]] == [(6, 0, 7)] * 2


def test_jsonl_with_base64(tmp_path: Path) -> None:
    row = pair(chosen={"bytes": base64.b64encode(png(3)).decode()}, rejected={"path": "b.png"})
    data = read_file(jsonl(tmp_path, row))
    assert load_image(data.images[0]).getpixel((0, 0)) == (3, 0, 7)
    assert data.images[1] == FileImage("b.png", tmp_path / "b.png")


def test_sides_of_pair_files_are_drawn_not_all_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[pair(chosen=f"{i}.png") for i in range(200)])
    first = read_file(path).pairs["chosen_first"]
    assert 70 < first.sum() < 130  # 100 expected, standard deviation 7
    assert first.equals(read_file(path).pairs["chosen_first"])


@pytest.mark.skipif(not (REAL / "ocean_1.webp").is_file(), reason="the real pictures are not here")
def test_real_ranking_of_four_gives_six_pairs(tmp_path: Path) -> None:
    names = [f"ocean_{i}.webp" for i in (3, 1, 4, 2)]
    row = {"prompt": OCEAN, "images": [str(REAL / name) for name in names], "ranking": [3, 1, 4, 2]}
    path = jsonl(tmp_path, row)
    with pytest.raises(InputError, match="leaves the file's folder"):
        read_file(path)
    data = read_file(path, allow_outside=True)
    assert len(data) == 6 and len(data.images) == 4 and not data.is_tie.any()
    assert all(chosen < rejected for _, chosen, rejected, _ in shown(data))  # ocean_1 is best, ocean_4 is worst
    report = check(data)
    assert report.ok and report.duplicates == []
    assert all(min(load_image(image).size) >= 256 for image in data.images)


BAD_ROWS: dict[str, tuple[object, str]] = {
    "prompt not text": (pair(prompt=3), "line 1: prompt is a int, not text"),
    "prompt missing": (pair(prompt=None), "line 1: prompt is missing"),
    "prompt empty": (pair(prompt="  "), "line 1: the prompt is empty"),
    "label above 1": (pair(label=1.5), "line 1: label is 1.5"),
    "label NaN": ('{"prompt": "p", "chosen": "a", "rejected": "b", "label": NaN}', "line 1: label is nan"),
    "label text": (pair(label="yes"), "line 1: label is 'yes'"),
    "weight negative": (pair(weight=-1), "line 1: weight is -1"),
    "weight infinite": ('{"prompt": "p", "chosen": "a", "rejected": "b", "weight": Infinity}', "weight is inf"),
    "picture null": (pair(chosen=None), "line 1: a picture is missing"),
    "picture number": (pair(chosen=7), "line 1: a picture is a int"),
    "picture bad base64": (pair(chosen={"bytes": "%%"}), "line 1: a picture is a dict"),
    "up": (pair(chosen="../a.png"), r"line 1: the path '../a.png' leaves the file's folder"),
    "up inside": (pair(chosen="x/../../a.png"), "leaves the file's folder"),
    "absolute": (pair(chosen="/etc/passwd"), "leaves the file's folder"),
    "windows": (pair(chosen="..\\a.png"), "leaves the file's folder"),
    "drive": (pair(chosen="C:\\a.png"), "leaves the file's folder"),
    "null byte": (pair(chosen="a\0b"), "is not a path"),
    "columns": ({"prompt": "p", "image": "a"}, "line 1: lacks columns: found prompt, image"),
    "both": (pair(images=["a"], ranking=[1]), "columns of pairs and of rankings"),
    "not JSON": ('{"prompt": ', "line 1 is not JSON"),
    "not an object": ("[1]", "line 1 is a list, not an object"),
    "deep": ("[" * 100_000, "line 1 is not JSON"),
    "short ranking": ({"prompt": "p", "images": ["a", "b"], "ranking": [1]}, "2 images, but 1 ranks"),
    "no ranking": ({"prompt": "p", "images": ["a", "b"], "ranking": None}, "2 images, but no ranks"),
    "rank text": ({"prompt": "p", "images": ["a", "b"], "ranking": [1, "2"]}, "'2' is not a rank"),
    "rank NaN": ('{"prompt": "p", "images": ["a", "b"], "ranking": [1, NaN]}', "nan is not a rank"),
    "images text": ({"prompt": "p", "images": "a", "ranking": [1]}, "images is text, not a list"),
    "one picture": ({"prompt": "p", "images": ["a"], "ranking": [1]}, "has no pair of two different pictures"),
    "same twice": (pair(rejected="a.png"), "has no pair of two different pictures"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    row, message = BAD_ROWS[name]
    path = jsonl(tmp_path, row)
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert caught.value.message.startswith(str(path)) and caught.value.hint and caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_later_rows_are_named_by_their_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: label is 2"):
        read_file(jsonl(tmp_path, pair(), "", pair(label=2)))
    with pytest.raises(InputError, match="line 2: pairs and rankings are mixed"):
        read_file(jsonl(tmp_path, pair(), {"prompt": "p", "images": ["a", "b"], "ranking": [1, 2]}))
    with pytest.raises(InputError, match="pair_id 'x' is there twice"):
        read_file(jsonl(tmp_path, pair(pair_id="x"), pair(pair_id="x")))
    with pytest.raises(InputError, match="prompt_id '1' has more than one prompt"):
        read_file(jsonl(tmp_path, pair(prompt_id=1), pair(prompt_id=1, prompt="a dog")))


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("x.jsonl", None, "no such file"),
    "kind": ("x.txt", b"prompt", "not a Parquet, JSONL or CSV file"),
    "pickle": ("x.pkl", pickle.dumps({"prompt": "p"}), "not a Parquet, JSONL or CSV file"),
    "empty jsonl": ("x.jsonl", b"\n\n", "has no rows"),
    "empty csv": ("x.csv", b"", "has no rows"),
    "header only": ("x.csv", b"prompt,chosen,rejected\n", "has no rows"),
    "latin-1": ("x.csv", "prompt,chosen,rejected\ncaf\xe9,a,b\n".encode("latin-1"), "not UTF-8 text"),
    "utf-16": ("x.jsonl", json.dumps(pair()).encode("utf-16"), "not UTF-8 text"),
    "csv columns": ("x.csv", b"prompt,a,b\np,1,2\n", "lacks columns: found prompt, a, b"),
    "csv fields": ("x.csv", b"prompt,chosen,rejected\na cat, asleep,a,b\n", "line 2 has another number of fields"),
    "csv short": ("x.csv", b"prompt,chosen,rejected\na cat,a\n", "line 2 has another number of fields"),
    "csv quote": ("x.csv", b'prompt,chosen,rejected\n"a cat"x,a,b\n', "not CSV after line 1"),
    "csv list": ("x.csv", b"prompt,images,ranking\np,a b,1 2\n", "line 2: images is not a JSON list: 'a b'"),
    "not parquet": ("x.parquet", b"PAR1 but no more", "not a readable Parquet file"),
    "empty parquet": ("x.parquet", b"", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_file(path)
    assert caught.value.message.startswith(str(path)) and caught.value.hint
    assert "\n" not in caught.value.message


def test_bad_parquet_tables(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    good = {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}
    pq.write_table(pa.table({**good, "prompt": [3]}), path)
    with pytest.raises(InputError, match="row 0: prompt is a int"):
        read_file(path)
    pq.write_table(pa.table({"prompt": ["p"], "url": ["a"]}), path)
    with pytest.raises(InputError, match="lacks columns: found prompt, url"):
        read_file(path)
    pq.write_table(pa.table({**good, "chosen": pa.array([None], pa.string())}), path)
    with pytest.raises(InputError, match="row 0: a picture is missing"):
        read_file(path)
    pq.write_table(pa.table(good).slice(0, 0), path)
    with pytest.raises(InputError, match="has no rows"):
        read_file(path)
    pq.write_table(pa.table(good), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_file(path)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "secret/a.png", "data/real/a.png")
    data = tmp_path / "data"
    os.symlink(tmp_path / "secret", data / "folder")
    os.symlink(tmp_path / "secret" / "a.png", data / "file.png")
    os.symlink(data / "real", data / "inner")
    os.symlink(data / "real" / "a.png", data / "inner.png")
    for name in ("folder/a.png", "file.png"):
        path = jsonl(data, pair(chosen=name))
        with pytest.raises(InputError, match="leaves the file's folder"):
            read_file(path)
        assert load_image(read_file(path, allow_outside=True).images[0]).size == (8, 8)
    for name in ("inner/a.png", "inner.png"):
        assert load_image(read_file(jsonl(data, pair(chosen=name))).images[0]).size == (8, 8)


# --- pictures -------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims width x height, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def noisy(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty, 0 bytes"),
    "text": (b"not found", "not a picture"),
    "html": (b"<html>404</html>", "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # would start a program
    "truncated png": (noisy("PNG")[:2000], "truncated or damaged"),
    "truncated jpeg": (noisy("JPEG")[:900], "truncated or damaged"),
    "truncated webp": (noisy("WEBP")[:900], "damaged|not a picture"),
    "damaged png": (noisy("PNG")[:60] + b"\0" * 400 + noisy("PNG")[460:], "truncated or damaged"),
    "bomb": (bomb(20_000, 20_000), "decompression bomb"),
    "small bomb": (bomb(10_000, 9_000), "10000 x 9000 is more than"),
    "signature": (noisy("PNG")[:8], "damaged|not a picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_named(tmp_path: Path, name: str) -> None:
    content, reason = BAD_PICTURES[name]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for source in (FileImage("x.png", path), BytesImage("x.png", content)):
        with warnings.catch_warnings(), pytest.raises(BadImage, match=reason) as caught:
            warnings.simplefilter("error")
            load_image(source)
        assert caught.value.key == "x.png" and caught.value.message.startswith("x.png: ")
        assert caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_missing_pictures_folders_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"none.png": "missing", "": "not a file", "pipe": "not a file"}.items():
        with pytest.raises(BadImage, match=reason):
            load_image(FileImage("k", tmp_path / name))
    with pytest.raises(BadImage, match="too long"):
        load_image(FileImage("k", tmp_path / ("x" * 300)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    """Grey 0, 40,000 and 65,535 of 65,535 are 0, 156 (40,000 // 256) and 255, as Pillow has them in a 16-bit colour PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 40_000, 65_535]], dtype=np.uint16)).save(buffer, kind)
    assert np.asarray(load_image(BytesImage("16 bit", buffer.getvalue()))).tolist() == [[[0] * 3, [156] * 3, [255] * 3]]
    line = b"\0" + b"".join(np.uint16(v).byteswap().tobytes() * 3 for v in (0, 40_000, 65_535))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(line)), (b"IEND", b"")]
    colour = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert np.asarray(load_image(BytesImage("colour", colour))).tolist() == [[[0] * 3, [156] * 3, [255] * 3]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wider_pixels_are_refused(dtype: type) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, dtype=dtype)).save(buffer, "TIFF")
    with pytest.raises(BadImage, match="more than 16 bits"):
        load_image(BytesImage("32 bit", buffer.getvalue()))


def test_good_pictures_become_rgb() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        assert load_image(BytesImage(kind, noisy(kind))).mode == "RGB"
    for mode in ("L", "LA", "P", "1", "RGBA", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (5, 4)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        image = load_image(BytesImage(mode, buffer.getvalue()))
        assert image.mode == "RGB" and image.size == (5, 4)
    assert load_image(BytesImage("limit", png(size=(8, 8))), max_pixels=64).size == (8, 8)
    with pytest.raises(BadImage, match="8 x 8 is more than 63 pixels"):
        load_image(BytesImage("limit", png(size=(8, 8))), max_pixels=63)


def test_array_pictures(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    source = ArrayImage("a", pixels)
    assert np.array_equal(np.asarray(load_image(source)), pixels)
    assert np.array_equal(np.asarray(load_image(BytesImage("b", source.read()))), pixels)
    assert (
        source.digest() == ArrayImage("c", pixels.copy()).digest() != ArrayImage("a", pixels.reshape(9, 6, 3)).digest()
    )


def test_bad_image_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a", "missing")))
    assert (error.key, error.reason, error.message) == ("a", "missing", "a: missing")


# --- preferences ----------------------------------------------------------------------------------------------------


def made(name: str, n: int, prompts: int = 2, protocol: str = "strict") -> Preferences:
    """n pairs of 2 n different pictures over some prompts."""
    sources: dict[str, ImageSource] = {f"{i}": BytesImage(f"{i}", png(i)) for i in range(2 * n)}
    rows = [
        {"prompt": f"prompt {i % prompts}", "prompt_id": f"p{i % prompts}", "pair_id": f"{i}", "label": 1.0}
        | {"first": f"{2 * i}", "second": f"{2 * i + 1}"}
        for i in range(n)
    ]
    return datasets.assemble(name, "train", protocol, sources, pd.DataFrame(rows))


def test_subset_reindexes() -> None:
    data = made("d", 6, prompts=3)
    part = data.subset([4, 1])
    assert shown(part) == [("4", "8", "9", 1.0), ("1", "2", "3", 1.0)]
    assert len(part.images) == 4 and [part.prompts[i] for i in part.pairs["prompt"]] == ["prompt 1", "prompt 1"]
    assert shown(data.subset(np.array([False, True] * 3))) == [row for row in shown(data) if int(row[0]) % 2]
    assert len(data.subset([])) == 0 and len(data) == 6
    left = data.without_images({"0", "1", "7"})
    assert [row[0] for row in shown(left)] == ["1", "2", "4", "5"] and left.dropped == {"unreadable picture": 2}


def test_split_by_prompt_keeps_texts_apart_and_stays() -> None:
    data = made("d", 40, prompts=20)
    rest, held = data.split_by_prompt(0.25, seed=3)
    assert len(set(held.prompts)) == 5 and not set(rest.prompts) & set(held.prompts)
    assert len(rest) + len(held) == 40
    assert shown(data.split_by_prompt(0.25, seed=3)[1]) == shown(held)
    assert set(data.split_by_prompt(0.25, seed=4)[1].prompts) != set(held.prompts)
    with pytest.raises(InputError, match="one prompt cannot be split"):
        made("d", 4, prompts=1).split_by_prompt(0.5, seed=0)


def test_mix_by_ratio() -> None:
    a, b = made("a", 30, protocol="hpdv2"), made("b", 10)
    both = mix([a, b])
    assert len(both) == 40 and both.pairs["dataset"].value_counts().to_dict() == {"a": 30, "b": 10}
    assert both.pairs["pair_id"].is_unique and len({image.key for image in both.images}) == 80
    assert both.protocol == "strict" and both.name == "a+b" and both.split == "train"
    for pair_id, chosen, rejected, _ in shown(both):
        name, number = pair_id.split("/")
        assert (chosen, rejected) == (f"{name}/{2 * int(number)}", f"{name}/{2 * int(number) + 1}")
    even = mix([a, b], [1, 1])
    assert even.pairs["dataset"].value_counts().to_dict() == {"a": 10, "b": 10}
    assert shown(even) == shown(mix([a, b], [1, 1])) != shown(mix([a, b], [1, 1], seed=1))
    long = mix([a, b], [1, 3], total=40)  # 10 of a, and all of b three times over
    assert long.pairs["dataset"].value_counts().to_dict() == {"b": 30, "a": 10}
    assert long.pairs["pair_id"].is_unique and "b/0#3" in set(long.pairs["pair_id"])
    assert len({image.key for image in long.images if image.key.startswith("b/")}) == 20
    same = mix([b, b])
    assert set(same.pairs["dataset"]) == {"1-b", "2-b"} and len(same) == 20
    for ratios in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(InputError, match="do not fit 2 datasets"):
            mix([a, b], ratios)
    with pytest.raises(InputError, match="no pairs to mix"):
        mix([a, b.subset([])])
    with pytest.raises(InputError, match="no dataset"):
        mix([])


def test_check_reads_each_picture_once_and_finds_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "text.png").write_text("hello")
    rows = [
        pair(),
        pair(chosen="copy.png", label=0.5),
        pair(chosen="c.png", rejected="text.png", prompt="x"),
        pair(chosen="none.png", rejected="c.png"),
    ]
    seen: list[tuple[int, int]] = []
    data = read_file(jsonl(tmp_path, *rows))
    report = check(data, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert (report.n_images, report.n_prompts, report.n_pairs, report.n_ties) == (6, 2, 4, 1)
    assert dict(report.bad).keys() == {"text.png", "none.png"} and dict(report.bad)["none.png"] == "missing"
    assert report.n_bad_pairs == 2 and not report.ok
    assert report.duplicates == [["a.png", "copy.png"]]
    other = check(read_file(jsonl(tmp_path, pair(chosen="c.png", rejected="b.png", prompt="x"))))
    assert other.ok
    shared = overlap(report, other)
    assert shared.images == [("c.png", "c.png"), ("b.png", "b.png")] and shared.prompts == ["x"]


# --- archives -------------------------------------------------------------------------------------------------------


def tar_bytes(mode: str = "w", *members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *[(n, True) for n in ("a.png", "a/b c/d-1_2.tar.png", "./a", "a//b", ".hidden", "a..b", "caf\xe9", ". ./a")],
        *[(n, False) for n in ("..", "a/..", "a/../b", "../a", "a/.. ", "/a", "//a", "C:a", "\\a", "a\\..\\b")],
        *[(n, False) for n in ("", " ", ".", "a\0")],
    ],
)
def test_names_that_stay_inside(name: str, inside: bool) -> None:
    assert archives.stays_inside(name) is inside


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


EVIL: dict[str, tuple[str, bytes] | tarfile.TarInfo] = {
    "up": ("../evil.png", b"x"),
    "up inside": ("a/../../evil.png", b"x"),
    "absolute": ("/nonexistent/evil.png", b"x"),
    "windows": ("..\\evil.png", b"x"),
    "symlink": special("link", tarfile.SYMTYPE, "/etc"),
    "hard link": special("link", tarfile.LNKTYPE, "good.png"),
    "device": special("dev", tarfile.CHRTYPE),
    "pipe": special("pipe", tarfile.FIFOTYPE),
    "folder up": special("../evil", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_archives_are_refused_whole(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for file, mode in {"x.tar": "w", "x.tar.gz": "w:gz"}.items():
        path = inner / file
        path.write_bytes(tar_bytes(mode, ("good.png", png()), EVIL[name]))
        with pytest.raises(InputError, match="member .* (would leave its folder|is a link, a device)") as caught:
            archives.unpack([path], inner / "out")
        assert caught.value.message.startswith(str(path))
        if file == "x.tar":
            with pytest.raises(InputError, match="member"):
                archives.index(path)
        assert os.listdir(inner) == [file] and os.listdir(tmp_path) == ["inner"]  # nothing is left behind
        path.unlink()


def test_evil_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("../evil.png", b"x")
    for action in (lambda: archives.index(path), lambda: archives.unpack([path], tmp_path / "out")):
        with pytest.raises(InputError, match="would leave its folder"):
            action()
    assert os.listdir(tmp_path) == ["x.zip"]


def test_unpack_whole_parts_and_damaged(tmp_path: Path) -> None:
    content = [(f"./images/{i}.png", noisy("PNG")) for i in range(5)]
    packed = tar_bytes("w:gz", special("./", tarfile.DIRTYPE), special("./images", tarfile.DIRTYPE), *content)
    parts = []
    for i, start in enumerate(range(0, len(packed), 3_000)):
        parts.append(tmp_path / f"x.tar.gz.{i:02d}")
        parts[-1].write_bytes(packed[start : start + 3_000])
    assert len(parts) > 3
    seen: list[tuple[int, int]] = []
    out = archives.unpack(parts, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert sorted(os.listdir(out / "images")) == [f"{i}.png" for i in range(5)]
    assert (out / "images" / "4.png").read_bytes() == noisy("PNG")
    assert seen[-1] == (len(packed), len(packed)) and seen == sorted(seen)
    for damaged in (parts[:-1], parts[1:]):
        with pytest.raises(InputError, match="not a complete archive"):
            archives.unpack(damaged, tmp_path / "bad")
    plain = tmp_path / "plain.tar"
    for cut in range(0, len(tar := tar_bytes("w", *content[:2])) - 2 * tarfile.BLOCKSIZE, 509):
        if any(tar[cut:]) or cut < 2 * tarfile.BLOCKSIZE:  # before the end mark
            plain.write_bytes(tar[:cut])
            for action in (lambda: archives.index(plain), lambda: archives.unpack([plain], tmp_path / "bad")):
                with pytest.raises(InputError, match="not a complete archive"):
                    action()
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as packed_zip:
        packed_zip.writestr("d/a.png", png(4))
    assert (archives.unpack([tmp_path / "z.zip"], tmp_path / "zip") / "d" / "a.png").read_bytes() == png(4)
    (tmp_path / "bad.zip").write_bytes((tmp_path / "z.zip").read_bytes()[:40])
    with pytest.raises(InputError, match="not a complete archive"):
        archives.index(tmp_path / "bad.zip")
    assert not (tmp_path / "bad").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_unpack_into_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes("w", ("a.png", png())))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be unpacked"):
        archives.unpack([path], tmp_path / "file" / "out")


def test_members_are_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes("w", ("d/a.png", png(1)), ("b.png", png(2))))
    members = {member.name: member for member in archives.index(path)}
    assert {name: member.source(name).read() for name, member in members.items()} == {
        "d/a.png": png(1),
        "b.png": png(2),
    }
    source = members["b.png"].source("b")
    path.unlink()
    with pytest.raises(BadImage, match="x.tar"):
        source.read()


# --- published layouts ----------------------------------------------------------------------------------------------


def dump(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def hpdv2(folder: Path) -> list[str]:
    """Two prompts x 3 pictures. Returns the listed names."""
    entries = [
        {
            "prompt": "a city", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 1, 1],
            "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "u"}, {"rank": [3, 1, 2], "user_hash": "v"}],
        },
        {"prompt": "a girl", "image_path": ["3.jpg", "4.jpg", "5.jpg"], "rank": [1, 2, 3], "raw_annotations": []},
    ]  # fmt: skip
    dump(folder / "test.json", entries)
    dump(folder / "benchmark" / "anime.json", ["a girl", "other"])
    return [f"{i}.jpg" for i in range(6)]


def pack(folder: Path, names: list[str], how: str) -> None:
    content = [(name, png(i)) for i, name in enumerate(names)]
    if how == "unpacked":
        write(folder / "test", *names)
    elif how == "beside":
        write(folder, *names)
    elif how == "tar":
        (folder / "test.tar").write_bytes(tar_bytes("w", *[(f"test/{name}", data) for name, data in content]))
    elif how == "tar.gz":
        (folder / "test.tar.gz").write_bytes(tar_bytes("w:gz", *[(f"test/{name}", data) for name, data in content]))
    else:
        with zipfile.ZipFile(folder / "test.zip", "w") as packed:
            for name, data in content:
                packed.writestr(name, data)


@pytest.mark.parametrize("how", ["unpacked", "beside", "tar", "tar.gz", "zip"])
def test_hpdv2_test(tmp_path: Path, how: str) -> None:
    names = hpdv2(tmp_path)
    pack(tmp_path, names, how)
    data = read("hpdv2", data_dir=tmp_path)
    assert data.protocol == "hpdv2" and data.split == "test" and data.prompts == ["a city", "a girl"]
    assert [row[1:] for row in shown(data)] == [
        ("1.jpg", "0.jpg", 1.0), ("2.jpg", "0.jpg", 1.0), ("1.jpg", "2.jpg", 0.5),
        ("3.jpg", "4.jpg", 1.0), ("3.jpg", "5.jpg", 1.0), ("4.jpg", "5.jpg", 1.0),
    ]  # fmt: skip
    assert data.pairs["chosen_first"].tolist() == [False, False, True, True, True, True]
    # On (1, 0) both annotators prefer 1. On (2, 0) u puts 2 third and 0 second, v puts 2 before 0. On (1, 2) both 1.
    assert data.pairs["agreement"].tolist()[:3] == [1.0, 0.5, 1.0] and data.pairs["agreement"][3:].isna().all()
    assert data.pairs["category"].tolist()[3:] == ["anime"] * 3 and data.pairs["category"][:3].isna().all()
    assert [load_image(image).getpixel((0, 0))[0] for image in data.images] == [  # type: ignore[index]
        int(image.key[0]) for image in data.images
    ]
    again = read("hpdv2", data_dir=tmp_path)  # reads what the first unpacked
    assert [image.read() for image in again.images] == [image.read() for image in data.images]


def test_hpdv2_train(tmp_path: Path) -> None:
    entries = [
        {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "p", "file_path": ["c.jpg", "b.jpg"], "human_preference": [1, 0]},
        {"prompt": "q", "file_path": ["a.jpg", "b.jpg", "c.jpg"], "human_preference": [0, 0, 1]},
    ]
    dump(tmp_path / "train.json", entries)
    write(tmp_path / "train", "a.jpg", "b.jpg", "c.jpg")
    data = datasets.read_hpdv2(tmp_path, "train")
    assert [row[1:3] for row in shown(data)] == [
        ("b.jpg", "a.jpg"), ("c.jpg", "b.jpg"), ("c.jpg", "a.jpg"), ("c.jpg", "b.jpg"),
    ]  # fmt: skip
    assert data.dropped == {"order not known": 1} and len(data.images) == 3 and check(data).ok


def test_splits_with_pictures_of_the_same_names(tmp_path: Path) -> None:
    names = hpdv2(tmp_path)
    pack(tmp_path, names, "tar.gz")
    dump(tmp_path / "train.json", [{"prompt": "p", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]}])
    (tmp_path / "train.tar.gz").write_bytes(tar_bytes("w:gz", ("train/0.jpg", png(90)), ("train/1.jpg", png(91))))
    for _ in range(2):
        test, train = (read("hpdv2", data_dir=tmp_path, split=split) for split in ("test", "train"))
        assert [image.read() for image in train.images] == [png(90), png(91)]
        assert {image.key: image.read() for image in test.images}["1.jpg"] == png(1)


def hpdv3(folder: Path, split: str, n: int = 60) -> None:
    entries = [
        {
            "prompt": f"p{i // 2}", "path1": f"images/{i}.png", "path2": f"images/{i + 1}.png", "model1": "flux",
            "model2": "sd15", "source": "users", "confidence": 0.99 if i % 3 else 0.6, "choice_dist": [3, 9],
        }
        for i in range(n)
    ]  # fmt: skip
    del entries[1]["confidence"]
    dump(folder / f"{split}.json", entries)


def test_hpdv3_sides_are_shuffled_and_confidence_filters(tmp_path: Path) -> None:
    hpdv3(tmp_path, "test")
    hpdv3(tmp_path, "train")
    write(tmp_path / "images", *[f"{i}.png" for i in range(61)])
    data = read("hpdv3", data_dir=tmp_path)
    assert len(data) == 60 and data.protocol == "strict" and len(data.images) == 61 and len(data.prompts) == 30
    assert shown(data)[7][1:3] == ("images/7.png", "images/8.png")  # path1 is preferred
    assert 15 < data.pairs["chosen_first"].sum() < 45
    assert set(data.pairs["source_chosen"]) == {"flux"} and set(data.pairs["source_rejected"]) == {"sd15"}
    assert data.pairs["agreement"].unique().tolist() == [0.75] and set(data.pairs["source"]) == {"users"}
    train = read("hpdv3", data_dir=tmp_path, split="train")
    assert len(train) == 40 and train.dropped == {"confidence below 0.95": 20}  # the one without is kept
    assert len(datasets.read_hpdv3(tmp_path, "train", min_confidence=0.5)) == 60
    with pytest.raises(InputError, match="no pair is left"):
        only = json.loads((tmp_path / "train.json").read_text())
        dump(tmp_path / "train.json", [entry for entry in only if entry.get("confidence") == 0.6])
        datasets.read_hpdv3(tmp_path, "train")


def test_hpdv3_archive_in_parts(tmp_path: Path) -> None:
    hpdv3(tmp_path, "test", 4)
    packed = tar_bytes("w:gz", *[(f"images/{i}.png", png(i)) for i in range(5)])
    half = len(packed) // 2
    (tmp_path / "images.tar.gz.00").write_bytes(packed[:half])
    (tmp_path / "images.tar.gz.01").write_bytes(packed[half:])
    data = read("hpdv3", data_dir=tmp_path)
    assert check(data).ok and [image.read() for image in data.images] == [png(i) for i in range(5)]


def imagereward(folder: Path) -> list[str]:
    names = [f"part-1/images/{i}.webp" for i in range(8)]
    entries = [
        {"id": "1-0", "prompt": "a", "generations": names[:4], "ranking": [1, 2, 5, 3]},  # a gap at 4
        {
            "id": "1-1",
            "prompt": "a",
            "generations": names[4:],
            "ranking": [2, 3, 4, 2],
        },  # best is 2, tied with the last
    ]
    dump(folder / "data" / "test.json", entries)
    return names


def test_imagereward_list_with_gaps_and_ties(tmp_path: Path) -> None:
    names = imagereward(tmp_path)
    write(tmp_path / "data" / "test_images", *names)
    data = read("imagereward", data_dir=tmp_path)
    assert data.prompts == ["a", "a"] and data.prompt_ids == ["1-0", "1-1"]  # two lists, though one text
    assert len(data) == 12 and data.is_tie.sum() == 1 and data.protocol == "strict"
    tie = data.pairs[data.is_tie].iloc[0]
    assert {data.images[tie.chosen].key, data.images[tie.rejected].key} == {names[4], names[7]}
    assert check(data).ok


def test_imagereward_metadata_with_zips(tmp_path: Path) -> None:
    paths = [f"images/test/test_{1 + i // 2}/{i}.webp" for i in range(4)]
    metadata = {
        "image_path": paths, "prompt_id": ["1-0", "1-0", "2-0", "2-0"], "prompt": ["a", "a", "b", "b"],
        "classification": ["People", "People", "Food", "Food"], "rank": [2, 1, 3, 3], "overall_rating": [1, 2, 3, 4],
    }  # fmt: skip
    pq.write_table(pa.table(metadata), tmp_path / "metadata-test.parquet")
    for number in (1, 2):
        path = tmp_path / "images" / "test" / f"test_{number}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as packed:
            for i in (2 * number - 2, 2 * number - 1):
                packed.writestr(f"{i}.webp", png(i))
    data = read("imagereward", data_dir=tmp_path)
    assert [row[1:] for row in shown(data)] == [(paths[1], paths[0], 1.0), (paths[2], paths[3], 0.5)]
    assert data.pairs["category"].tolist() == ["People", "Food"]
    assert {image.key: image.read() for image in data.images} == {path: png(i) for i, path in enumerate(paths)}
    os.remove(tmp_path / "images" / "test" / "test_2.zip")
    assert [key for key, _ in check(read("imagereward", data_dir=tmp_path)).bad] == paths[2:]  # named, not replaced


def pickapic(path: Path, **change: list[object]) -> None:
    rows: dict[str, object] = {
        "are_different": [True] * 4, "caption": ["x", "x", "y", "z"], "has_label": [True, True, True, False],
        "image_0_uid": ["a", "c", "b", "a"], "image_1_uid": ["b", "a", "d", "d"],
        "jpg_0": [png(0, kind="JPEG"), png(2, kind="JPEG"), png(1, kind="JPEG"), png(0, kind="JPEG")],
        "jpg_1": [png(1, kind="JPEG"), png(0, kind="JPEG"), png(3, kind="JPEG"), png(3, kind="JPEG")],
        "label_0": [1.0, 0.5, 0.0, 0.0], "label_1": [0.0, 0.5, 1.0, 0.0],
        "model_0": ["m", "n", "m", "m"], "model_1": ["o", "o", "n", "o"], "ranking_id": [7, 8, 9, 10],
    }  # fmt: skip
    kept = {column: values for column, values in {**rows, **change}.items() if values is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(kept), path, row_group_size=3)


@pytest.mark.parametrize("name", ["pickapic", "pickapic_v2"])
def test_pickapic_shards(tmp_path: Path, name: str) -> None:
    pickapic(tmp_path / "data" / "test_unique-00000-of-00001-ab.parquet")
    data = read(name, data_dir=tmp_path)
    assert data.name == name and data.split == "test_unique" and data.protocol == "pickscore-threshold"
    assert shown(data) == [
        ("test_unique-7", "a", "b", 1.0), ("test_unique-8", "c", "a", 0.5), ("test_unique-9", "d", "b", 1.0),
    ]  # fmt: skip
    assert data.pairs["chosen_first"].tolist() == [True, True, False] and data.dropped == {"no label": 1}
    assert data.pairs["source_chosen"].tolist() == ["m", "n", "n"]
    assert data.pairs["source_rejected"].tolist() == ["o", "o", "m"]
    shade = {"a": 0, "b": 1, "c": 2, "d": 3}
    assert all(image.read() == png(shade[image.key], kind="JPEG") for image in data.images) and len(data.images) == 4
    with pytest.raises(MissingError, match="test-"):  # test_unique is not test
        read(name, data_dir=tmp_path, split="test")


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_missing_data_says_what_and_how(tmp_path: Path, name: str) -> None:
    split = datasets.DATASETS[name].default_split
    for data_dir in (None, tmp_path / "none", tmp_path):
        with pytest.raises(MissingError) as caught:
            read(name, data_dir=data_dir)
        assert caught.value.exit_code == 3 and f"drm data get {name} --split {split}" in caught.value.hint
        assert name in caught.value.message and "\n" not in caught.value.message + caught.value.hint
    with pytest.raises(InputError, match="has no split 'dev'"):
        read(name, data_dir=tmp_path, split="dev")


def test_lists_without_their_pictures(tmp_path: Path) -> None:
    hpdv2(tmp_path)
    with pytest.raises(MissingError, match=r"hpdv2 test needs the pictures \(0.jpg and others\), not found"):
        read("hpdv2", data_dir=tmp_path)
    no_images = tmp_path / "pick" / "test_unique-0.parquet"
    pickapic(no_images, jpg_0=None, jpg_1=None)  # type: ignore[arg-type]
    with pytest.raises(MissingError, match="jpg_0 and jpg_1"):
        read("pickapic", data_dir=no_images.parent)


BAD_LISTS: dict[str, tuple[object, str]] = {
    "not a list": ({"prompt": "p"}, "not a list"),
    "empty": ([], "the list is empty"),
    "not objects": ([1], "not a list of objects"),
    "no rank": ([{"prompt": "p", "image_path": ["a", "b"]}], "entry 0 has no 'rank'"),
    "short rank": ([{"prompt": "p", "image_path": ["a", "b"], "rank": [1]}], "entry 0: 2 pictures with the ranks"),
    "null rank": ([{"prompt": "p", "image_path": ["a", "b"], "rank": [1, None]}], "entry 0"),
    "number": ([{"prompt": "p", "image_path": [1, 2], "rank": [1, 2]}], "entry 0"),
    "leaves": ([{"prompt": "p", "image_path": ["../a", "b"], "rank": [1, 2]}], "'../a' leaves the folder"),
    "one picture": ([{"prompt": "p", "image_path": ["a"], "rank": [1]}], "no pair is left"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_published_lists(tmp_path: Path, name: str) -> None:
    content, message = BAD_LISTS[name]
    dump(tmp_path / "test.json", content)
    with pytest.raises(InputError, match=message) as caught:
        read("hpdv2", data_dir=tmp_path)
    assert caught.value.message.startswith(str(tmp_path)) and "ymhao/HPDv2" in caught.value.hint


def test_bad_published_files(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text("[{")
    with pytest.raises(InputError, match="not JSON"):
        read("hpdv3", data_dir=tmp_path)
    shard = tmp_path / "test_unique-0.parquet"
    shard.write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a Parquet file"):
        read("pickapic", data_dir=tmp_path)
    pickapic(shard, label_0=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lacks the columns label_0"):
        read("pickapic", data_dir=tmp_path)
    pickapic(shard, label_0=[1.0, 2.0, 0.0, 0.0])
    with pytest.raises(InputError, match="entry 1: the label 2.0 is not in"):
        read("pickapic", data_dir=tmp_path)
    names = hpdv2(tmp_path)
    whole = tar_bytes("w:gz", *[(name, noisy("PNG")) for name in names])
    (tmp_path / "test.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a complete archive"):
        read("hpdv2", data_dir=tmp_path)
    assert gzip.decompress(whole)  # the whole one is fine


def test_names_that_are_neither_dataset_nor_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hpdv4: neither a dataset nor a file") as caught:
        read("hpdv4")
    assert caught.value.hint.startswith("did you mean hpdv")
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "x.jsonl")
    assert len(read(jsonl(tmp_path, pair()))) == 1


def test_dataset_table_is_complete() -> None:
    for name, entry in datasets.DATASETS.items():
        assert entry.default_split in entry.splits and "/" in entry.hub_id and callable(entry.reader), name
    assert published_layouts.DATASETS is datasets.DATASETS
