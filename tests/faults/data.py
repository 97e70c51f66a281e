"""Rows, holes and pictures as published files and people's own have them."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import fault

CHECK = "data check "


def png(shade: int = 0, kind: str = "PNG", mode: str = "RGB", **more: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade % 256, 40, 200 - shade % 200)).convert(mode).save(buffer, kind, **more)
    return buffer.getvalue()


def pictures(count: int, folder: str = "") -> dict[str, str | bytes]:
    return {f"{folder}{i}.png": png(i) for i in range(count)}


def row(**more: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"} | more


def rows(*found: Any) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in found)


def own(name: str, code: int, says: str, content: str, **more: Any):
    """A file a.jsonl of pairs beside four pictures."""
    return fault(name, CHECK + "a.jsonl --json", code, says, pictures(4) | {"a.jsonl": content}, **more)


def parquet(name: str, columns: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns()), folder / name)

    return make


def pickapic(**more: Any) -> dict[str, Any]:
    n = 3
    return {
        "caption": ["a cat"] * n, "has_label": [True, True, False], "image_0_uid": list("ace"), "image_1_uid": list("bdf"),
        "jpg_0": [png(i) for i in range(n)], "jpg_1": [png(10 + i) for i in range(n)], "label_0": [1.0, 0.5, None],
        "label_1": [0.0, 0.5, None], "model_0": ["x"] * n, "model_1": ["y"] * n, "ranking_id": [1, 2, 3],
    } | more  # fmt: skip


def imagereward(**more: Any) -> dict[str, Any]:
    return {
        "image_path": [f"images/test/t/{i}.png" for i in range(4)], "prompt_id": ["p"] * 4, "prompt": ["a cat"] * 4,
        "classification": ["Animals"] * 4, "rank": [1, 2, 3, 3],
    } | more  # fmt: skip


def hpdv3(*entries: dict[str, Any]) -> dict[str, str | bytes]:
    base = {
        "prompt": "a cat",
        "path1": "images/0.png",
        "path2": "images/1.png",
        "model1": "m",
        "model2": "n",
        "confidence": 0.99,
        "choice_dist": [9, 1],
    }
    return pictures(4, "h/images/") | {"h/test.json": json.dumps([base | entry for entry in entries])}


HPDV3, IMAGEREWARD, PICKAPIC = (f"{CHECK}{name} --json --data-dir " for name in ("hpdv3", "imagereward", "pickapic"))
GOOD = [row(chosen=f"{i % 3}.png", rejected="3.png", prompt=f"a cat {i}") for i in range(20)]
HPDV2 = {"prompt": "a cat", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 3], "raw_annotations": []}


def hpdv2(*entries: Any) -> dict[str, str | bytes]:
    return pictures(3, "v/test/") | {"v/test.json": json.dumps(list(entries))}


def picture(name: str, code: int, says: str, data: Callable[[], bytes], **more: Any):
    """A picture that is one side of a pair."""

    def make(folder: Path) -> None:
        (folder / "0.png").write_bytes(data())

    files = {"1.png": png(1), "a.jsonl": rows(row())}
    return fault(f"picture {name}", CHECK + "a.jsonl --json", code, says, files, make=make, **more)


def with_text(kind: str) -> bytes:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=kind == "zTXt") if kind != "iTXt" else info.add_itxt(
        "w", "y" * 3_000_000, zip=True
    )
    return png(pnginfo=info)


def palette() -> bytes:
    from PIL import Image

    image = Image.new("RGB", (24, 16), (200, 30, 30)).quantize(8)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 128, 255]))
    return buffer.getvalue()


def wide(kind: str, dtype: str) -> bytes:
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=dtype)).save(buffer, kind)
    return buffer.getvalue()


def sized(width: int, height: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def avif() -> bytes:
    from drmcli.data.images import FORMATS

    return png(kind="AVIF" if "AVIF" in FORMATS else "WEBP")


FAULTS = [
    # own files: one bad row is named, counted, left out
    *(own(f"row {name} of many", 1, f"line 21.*{says}", rows(*GOOD, bad)) for name, bad, says in (
        ("null prompt", row(prompt=None), "prompt is missing"), ("number as prompt", row(prompt=3), "prompt is a int"),
        ("empty prompt", row(prompt=" "), "prompt is empty"), ("null picture", row(chosen=None), "a picture is missing"),
        ("number as picture", row(rejected=7), "a picture is a int"), ("damaged", "{oops", "is not JSON"), ("list", "[1]", "not an object"),
        ("label 2", row(label=2), "label is 2"), ("label text", row(label="yes"), "label is 'yes'"), ("weight -1", row(weight=-1), "weight is -1"),
        ("weight nan", rows(row(weight=float("nan"))).strip(), "weight is nan"), ("without columns", {"prompt": "x"}, "lacks columns"),
        ("prompt_id list", row(prompt_id=[1]), "prompt_id is a list"), ("surrogate", row(prompt="\ud800"), "not UTF-8"),
        ("key twice", '{"prompt": "a", "prompt": "b", "chosen": "0.png", "rejected": "1.png"}', "is there twice"),
    )),
    fault("one bad row of few is refused", "train-reward --data a.jsonl --steps 1 --out r", 2, "line 2: prompt is missing, not text .1 of 3 rows",
          pictures(4) | {"a.jsonl": rows(row(), row(prompt=None), row())}),
    own("missing picture", 1, "gone.png: missing", rows(*GOOD, row(chosen="gone.png"))),
    own("Windows' separators", 0, '"pairs": 1', rows(row(chosen="s\\0.png", rejected="s\\1.png")),
        make=lambda folder: [(folder / "s").mkdir(), *[(folder / f"{i}.png").rename(folder / "s" / f"{i}.png") for i in (0, 1)]]),
    own("Windows' way out", 2, "leaves the file's folder", rows(row(chosen="..\\0.png"))),
    own("one pair", 0, '"pairs": 1', rows(row())),
    own("huge value", 2, r"label is", rows(row(label="x" * 100_000))),
    fault("CSV column twice", CHECK + "a.csv", 2, "'chosen' is there twice", {"a.csv": "prompt,chosen,rejected,chosen\na,0,1,2\n"}),
    fault("CSV semicolons", CHECK + "a.csv --json", 0, '"pairs": 1', pictures(2) | {"a.csv": "\ufeffPrompt;Chosen;Rejected\r\na cat, asleep;0.png;1.png\r\n"}),
    fault("TSV", CHECK + "a.tsv --json", 0, '"pairs": 1', pictures(2) | {"a.tsv": "prompt\tchosen\trejected\na cat\t0.png\t1.png\n"}),
    fault("CSV bad row of many", CHECK + "a.csv --json", 1, "line 102 has another number of fields",
          pictures(2) | {"a.csv": "prompt,chosen,rejected\n" + "a cat,0.png,1.png\n" * 100 + "a cat, asleep,0.png,1.png\n"}),
    fault("CSV empty columns at the end", CHECK + "a.csv --json", 0, '"pairs": 1', pictures(2) | {"a.csv": "prompt,chosen,rejected,,\na cat,0.png,1.png,,\n"}),
    fault("Parquet null picture", CHECK + "a.parquet --json", 1, "row 29: a picture is missing",
          make=parquet("a.parquet", lambda: {"prompt": ["a cat"] * 30, "chosen": [*[png(1)] * 29, None], "rejected": [png(2)] * 30})),
    fault("Parquet null prompt", CHECK + "a.parquet --json", 1, "row 1: prompt is missing",
          make=parquet("a.parquet", lambda: {"prompt": ["a", None], "chosen": [png(1)] * 2, "rejected": [png(2)] * 2})),
    fault("Parquet cut", CHECK + "a.parquet", 2, "not a readable Parquet", {"a.parquet": b"PAR1" + bytes(100) + b"PAR1"}),
    # published layouts
    fault("hpdv3 null votes", HPDV3 + "h", 0, '"pairs": 3', hpdv3({"choice_dist": None, "confidence": None}, {"choice_dist": [None, None]}, {"choice_dist": [9, None]})),
    fault("hpdv3 null prompt", HPDV3 + "h", 1, "entry 1: prompt is missing", hpdv3({}, {"prompt": None})),
    fault("hpdv3 null path", HPDV3 + "h", 1, "entry 1: a picture is missing", hpdv3({}, {"path2": None})),
    fault("hpdv3 number as path", HPDV3 + "h", 1, "entry 1: a picture is a int", hpdv3({}, {"path2": 3})),
    fault("hpdv3 text as confidence", HPDV3 + "h", 1, "entry 1: could not convert", hpdv3({}, {"confidence": "high"})),
    fault("hpdv3 surrogate", HPDV3 + "h", 1, "entry 1: .*not UTF-8", hpdv3({}, {"prompt": "\ud800"})),
    fault("hpdv3 Windows' separators", HPDV3 + "h", 0, '"pairs": 1', hpdv3({"path1": "images\\0.png"})),
    fault("hpdv3 way out", HPDV3 + "h", 2, "leaves the folder", hpdv3({"path1": "../0.png"})),
    fault("hpdv3 all null", HPDV3 + "h", 2, "prompt is missing", hpdv3({"prompt": None})),
    fault("hpdv3 BOM", HPDV3 + "h", 0, '"pairs": 1', {k: b"\xef\xbb\xbf" + v.encode() if isinstance(v, str) else v for k, v in hpdv3({}).items()}),
    fault("hpdv3 deep", HPDV3 + "h", 2, "nested too deep", {"h/test.json": "[" * 100_000}),
    fault("hpdv3 object", HPDV3 + "h", 2, "not a list", {"h/test.json": "{}"}),
    fault("hpdv3 folder missing", HPDV3 + "nowhere", 3, "nowhere: hpdv3 test needs this folder"),
    fault("hpdv2 null rank", f"{CHECK}hpdv2 --json --data-dir v", 0, '"picture without a rank": 1', hpdv2(HPDV2 | {"rank": [1, None, 3]})),
    fault("hpdv2 short ranks", f"{CHECK}hpdv2 --json --data-dir v", 1, "entry 1: 3 pictures with the ranks", hpdv2(HPDV2, HPDV2 | {"rank": [1]})),
    fault("hpdv2 null annotation", f"{CHECK}hpdv2 --json --data-dir v", 0, '"pairs": 3', hpdv2(HPDV2 | {"raw_annotations": [None, {"rank": [1, None, 2]}]})),
    fault("hpdv2 without prompt", f"{CHECK}hpdv2 --json --data-dir v", 1, "entry 1 has no 'prompt'", hpdv2(HPDV2, {"image_path": [], "rank": []})),
    fault("hpdv2 relative folder", f"{CHECK}hpdv2 --json --data-dir ./v/../v", 0, '"pairs": 3', hpdv2(HPDV2)),
    fault("imagereward null rank", IMAGEREWARD + "d", 0, '"picture without a rank": 1', pictures(4, "d/images/test/t/"),
          make=parquet("d/metadata-test.parquet", lambda: imagereward(rank=[1, None, 3, 3]))),
    fault("imagereward null prompt", IMAGEREWARD + "d", 2, "prompt is missing", pictures(4, "d/images/test/t/"),
          make=parquet("d/metadata-test.parquet", lambda: imagereward(prompt=[None] * 4))),
    fault("imagereward null id", IMAGEREWARD + "d", 1, "prompt_id is missing", pictures(4, "d/images/test/t/"),
          make=parquet("d/metadata-test.parquet", lambda: imagereward(prompt_id=["p", "p", "p", None]))),
    fault("imagereward JSON null rank", IMAGEREWARD + "d", 0, '"pairs": 3', pictures(4, "d/images/") | {"d/test.json": json.dumps([
          {"id": "x", "prompt": "a cat", "generations": [f"{i}.png" for i in range(4)], "ranking": [1, 2, None, 3]}])}),
    fault("pickapic relative folder", PICKAPIC + "pp", 0, '"pairs": 2', make=parquet("pp/data/test_unique-00000-of-00001.parquet", pickapic)),
    fault("pickapic null caption", PICKAPIC + "pp", 1, "entry 0: prompt is missing",
          make=parquet("pp/data/test_unique-00000-of-00001.parquet", lambda: pickapic(caption=[None, "a", "b"]))),
    fault("pickapic null label", PICKAPIC + "pp", 1, "entry 0", make=parquet("pp/test_unique-0.parquet", lambda: pickapic(label_0=[None, 0.5, None]))),
    fault("pickapic null picture", PICKAPIC + "pp", 1, "a: empty, 0 bytes",
          make=parquet("pp/test_unique-0.parquet", lambda: pickapic(jpg_0=[None, png(1), png(2)]))),
    fault("pickapic cut", PICKAPIC + "pp", 2, "not a Parquet file", {"pp/test_unique-0.parquet": b"PAR1" + bytes(50) + b"PAR1"}),
    # pictures
    *(picture(f"with 3 MB of {kind}", 0, '"pairs": 1', lambda kind=kind: with_text(kind)) for kind in ("tEXt", "zTXt", "iTXt")),
    picture("palette with transparency", 0, '"pairs": 1', palette, never="Palette|warning"),
    picture("CMYK", 0, '"pairs": 1', lambda: png(kind="JPEG", mode="CMYK")),
    picture("grey with alpha", 0, '"pairs": 1', lambda: png(mode="LA")),
    picture("one bit", 0, '"pairs": 1', lambda: png(mode="1")),
    picture("AVIF", 0, '"pairs": 1', avif),
    picture("animated", 0, '"pairs": 1', lambda: png(kind="GIF", save_all=True)),
    picture("16-bit grey PNG", 0, '"pairs": 1', lambda: wide("PNG", "uint16")),
    picture("16-bit grey TIFF", 0, '"pairs": 1', lambda: wide("TIFF", "uint16")),
    picture("32-bit TIFF", 1, "more than 16 bits", lambda: wide("TIFF", "int32")),
    picture("TIFF of floats", 1, "more than 16 bits", lambda: wide("TIFF", "float32")),
    picture("very narrow", 1, "one side is more than", lambda: sized(1, 3000)),
    picture("damaged EXIF", 0, '"pairs": 1', lambda: png(kind="JPEG", exif=b"Exif\0\0garbage")),
    picture("text", 1, "not a picture", lambda: b"hello"),
    picture("SVG", 1, "not a picture", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    picture("cut", 1, "damaged", lambda: png(kind="JPEG")[:300]),
]  # fmt: skip
