"""HPDv2, HPDv3, ImageRewardDB and Pick-a-Pic, read from a folder in the layout their publishers ship.

Pictures may be unpacked or still in the publisher's archives. Uncompressed tar and zip are read in place; a compressed
tar (or one in parts) is unpacked once, into a folder `unpacked-NAME` beside it. Unlike own files, links in the folder
are followed (people link large data sets together), but no listed name may be absolute or contain `..`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from drmcli.data.archives import Member, index, stays_inside, unpack
from drmcli.data.images import FileImage, ImageSource, ParquetImage
from drmcli.data.parquet import opened
from drmcli.data.preferences import Preferences, assemble, text_id
from drmcli.data.published_rows import Row, Table, agreement_of, published_prompt
from drmcli.data.rows import MAX_BAD, BadRow, LeftOut
from drmcli.data.text import cut, parse_json, read_text, short
from drmcli.errors import InputError, MissingError

HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPDV3_MIN_CONFIDENCE = 0.95
"""Pairs the HPSv3 authors train on (arXiv 2508.03789)."""
_ARCHIVES = re.compile(r"(?P<stem>.+?)\.(?P<kind>tar|zip|tar\.gz|tgz)(?P<part>\.\d+)?$")


def read_hpdv2(
    folder: str | Path, split: str = "test", *, name: str = "hpdv2", max_bad: float = MAX_BAD
) -> Preferences:
    """HPDv2 (arXiv 2306.09341, hub ymhao/HPDv2): test.json with rankings of 9, train.json with pairs.

    `agreement` is from `raw_annotations`. `category` is the style, from the picture's folder or from the prompt lists
    in `benchmark/`.
    """
    at = _Folder(folder, name, split, max_bad)
    styles = _hpdv2_styles(at)
    table = Table()
    for number, entry in enumerate(at.entries(f"{split}.json")):
        with at.entry(f"{split}.json", number):
            prompt = published_prompt(entry["prompt"])
            if split == "test":
                paths, ranks = entry["image_path"], entry["rank"]
                raw = [annotation["rank"] for annotation in entry.get("raw_annotations") or [] if annotation]
            else:
                # 1 marks the preferred one; of three or more, nothing is known about the others' order.
                paths, ranks, raw = entry["file_path"], [1 - float(mark) for mark in entry["human_preference"]], []
            style = next((part for part in Path(str(paths[0])).parts[:-1] if part in HPDV2_STYLES), styles.get(prompt))
            ties = split == "test" or len(paths) == 2
            table.ranking(prompt, f"{split}-{number:06d}", paths, ranks, raw=raw, ties=ties, category=style)
    return at.preferences("hpdv2", table, roots=(f"{split}", "images", f"images/{split}"), archive=split)


def read_hpdv3(
    folder: str | Path, split: str = "test", *, min_confidence: float | None = None, name: str = "hpdv3",
    max_bad: float = MAX_BAD,
) -> Preferences:  # fmt: skip
    """HPDv3 (arXiv 2508.03789, hub MizzenAI/HPDv3): pairs {prompt, path1, path2, model1, model2, confidence,
    choice_dist}.

    The published files always list the preferred picture first, so `chosen_first` is drawn by a fixed seed.
    `min_confidence` drops pairs of a lower confidence and keeps those that have none; default 0.95 for train, else off.
    """
    at = _Folder(folder, name, split, max_bad)
    if min_confidence is None:
        min_confidence = HPDV3_MIN_CONFIDENCE if split == "train" else 0.0
    table = Table()
    for number, entry in enumerate(at.entries(f"{split}.json")):
        with at.entry(f"{split}.json", number):
            confidence = entry.get("confidence")
            if confidence is not None and float(confidence) < min_confidence:
                table.drop(f"confidence below {min_confidence:g}")
                continue
            prompt, share = published_prompt(entry["prompt"]), agreement_of(entry.get("choice_dist"))
            models = entry.get("model1"), entry.get("model2"), entry.get("source")
            pair_id = f"{split}-{number:07d}"
            table.add(
                Row(prompt, text_id(prompt), pair_id, entry["path1"], entry["path2"], 1.0, *models, agreement=share)
            )
    return at.preferences("strict", table, roots=("images",), archive="images", draw_sides=True)


def read_imagereward(
    folder: str | Path, split: str = "test", *, name: str = "imagereward", max_bad: float = MAX_BAD
) -> Preferences:
    """ImageRewardDB (arXiv 2304.05977): rankings of 4 to 9, ties and gaps in the ranks allowed.

    Either the authors' list `test.json` {id, prompt, generations, ranking} (github THUDM/ImageReward, data/), the one
    the published accuracy is counted on, or the hub's `metadata-SPLIT.parquet` (THUDM/ImageRewardDB), which has
    categories.
    """
    at = _Folder(folder, name, split, max_bad)
    table = Table()
    listed, metadata = [f"{split}.json", f"data/{split}.json"], at.folder / f"metadata-{split}.parquet"
    if at.first(*listed) is None and metadata.is_file():
        columns = ["image_path", "prompt_id", "prompt", "classification", "rank"]
        frame = at.parquet(metadata, columns).to_pandas()
        for at_row in np.flatnonzero(frame["prompt_id"].isna()):
            with at.entry(metadata.name, int(at_row)):
                raise BadRow("prompt_id is missing", hint="")
        for prompt_id, group in frame.groupby("prompt_id", sort=False):
            with at.entry(metadata.name, int(group.index[0])):
                table.ranking(
                    published_prompt(group["prompt"].iloc[0]), str(prompt_id), list(group["image_path"]), list(group["rank"]),
                    category=group["classification"].iloc[0],
                )  # fmt: skip
    else:
        for number, entry in enumerate(at.entries(*listed)):
            with at.entry(listed[0], number):
                table.ranking(
                    published_prompt(entry["prompt"]), str(entry["id"]), entry["generations"], entry["ranking"]
                )
    roots = ("data/test_images", "test_images", "data", "images", f"images/{split}")
    return at.preferences("strict", table, roots=roots, archive=("test_images", f"{split}_"))


def read_pickapic(
    folder: str | Path, split: str = "test_unique", *, name: str = "pickapic", max_bad: float = MAX_BAD
) -> Preferences:
    """Pick-a-Pic v1 and v2 (arXiv 2305.01569, hub yuvalkirstain/pickapic_v1 and _v2): Parquet shards with the bytes.

    `label_0` is the probability that picture 0 is better (0.5 is a tie); rows without `has_label` are dropped and
    counted.
    """
    at = _Folder(folder, name, split, max_bad)
    shards = sorted([*at.folder.glob(f"{split}-*.parquet"), *at.folder.glob(f"data/{split}-*.parquet")])
    if not shards:
        raise at.missing(f"{split}-*.parquet")
    columns = ["caption", "image_0_uid", "image_1_uid", "label_0", "has_label", "model_0", "model_1", "ranking_id"]
    table = Table()
    sources: dict[str, ImageSource] = {}
    for shard in shards:
        names = at.schema(shard)
        if not {"jpg_0", "jpg_1"} <= set(names):
            raise at.missing(f"the columns jpg_0 and jpg_1 of {shard.name} (a variant without pictures)")
        sizes = at.row_groups(shard)
        places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
        for (group, row), entry in zip(places, at.parquet(shard, columns).to_pylist(), strict=True):
            with at.entry(shard.name, row):
                if not entry["has_label"]:
                    table.drop("no label")
                    continue
                first, second = str(entry["image_0_uid"]), str(entry["image_1_uid"])
                prompt = published_prompt(entry["caption"])
                label, models = float(entry["label_0"]), (entry["model_0"], entry["model_1"])
                for side, uid in enumerate((first, second)):
                    sources.setdefault(uid, ParquetImage(uid, shard, f"jpg_{side}", group, row))
                table.add(Row(prompt, text_id(prompt), f"{split}-{entry['ranking_id']}", first, second, label, *models))
    return at.preferences("pickscore-threshold", table, sources=sources)


class Reader(Protocol):
    """Reads one split of a published dataset from its folder."""

    def __call__(self, folder: str | Path, split: str, *, name: str, max_bad: float) -> Preferences: ...


@dataclass(frozen=True)
class Published:
    """A published dataset, as its publishers describe it."""

    reader: Reader
    description: str
    licence: str
    size: str
    """Of what must be fetched, by split."""
    gated: bool
    hub_id: str
    splits: tuple[str, ...]
    default_split: str


DATASETS: dict[str, Published] = {
    "hpdv2": Published(
        read_hpdv2, "798 k choices between 430 k pictures; test: 400 prompts x 9 ranked pictures (arXiv 2306.09341)",
        "Apache-2.0", "test 158 MB, train 32 GB", False, "ymhao/HPDv2", ("train", "test"), "test",
    ),
    "hpdv3": Published(
        read_hpdv3, "1.17 M pairs of pictures by many models and photographs (arXiv 2508.03789)",
        "MIT", "1.08 M pictures in 13 archive parts; test has none of its own", False, "MizzenAI/HPDv3",
        ("train", "test"), "test",
    ),
    "pickapic": Published(
        read_pickapic, "Pick-a-Pic v1: 584 k pairs chosen by users of a web application (arXiv 2305.01569)",
        "see its hub page", "all splits about 190 GB; test_unique is 500 pairs", False, "yuvalkirstain/pickapic_v1",
        ("train", "validation", "test", "validation_unique", "test_unique"), "test_unique",
    ),
    "pickapic_v2": Published(
        read_pickapic, "Pick-a-Pic v2: 959 k pairs, same schema (arXiv 2305.01569)",
        "see its hub page", "all splits about 322 GB; test_unique is 500 pairs", False, "yuvalkirstain/pickapic_v2",
        ("train", "validation", "test", "validation_unique", "test_unique"), "test_unique",
    ),
    "imagereward": Published(
        read_imagereward, "466 test prompts with 4 to 9 ranked pictures, by trained annotators (arXiv 2304.05977)",
        "Apache-2.0", "test 1.14 GB, validation 1.08 GB", False, "THUDM/ImageRewardDB",
        ("train", "validation", "test"), "test",
    ),
}  # fmt: skip


def _let_go(items: list[Any]) -> Iterator[Any]:
    """The items of a list, which is emptied on the way."""
    items.reverse()
    while items:
        yield items.pop()


class _Folder:
    """A published dataset's folder: finds its files and pictures, and says what is missing."""

    def __init__(self, folder: str | Path, name: str, split: str, max_bad: float):
        self.folder, self.name, self.split = Path(folder), name, split
        self.bad, self.total = LeftOut(max_bad), 0
        if split not in DATASETS[name].splits:
            raise InputError(f"{name}: has no split {split!r}", hint=f"use one of {', '.join(DATASETS[name].splits)}")
        if not self.folder.is_dir():
            raise self.missing("this folder")

    def missing(self, what: str) -> MissingError:
        return MissingError(
            f"{self.folder}: {self.name} {self.split} needs {what}, not found",
            hint=f"get it with `drm data get {self.name} --split {self.split}`, or from "
            f"https://huggingface.co/datasets/{DATASETS[self.name].hub_id}",
        )

    def broken(self, file: str, fact: str) -> InputError:
        return InputError(f"{self.folder / file}: {fact}", hint=self._hint())

    def _hint(self) -> str:
        return f"not as {DATASETS[self.name].hub_id} publishes it; fetch the file again"

    @contextmanager
    def entry(self, file: str, number: int) -> Iterator[None]:
        """One entry of a published list: a mistake in it is counted, with its place, and the entry is left out."""
        self.total += 1
        try:
            yield
        except KeyError as error:
            fact = f" has no {error.args[0]!r}"
        except InputError as error:
            fact = f": {error.message}"
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            fact = f": {cut(str(error), 200)}"
        else:
            return
        self.bad.add(BadRow(f"{self.folder / file}: entry {number}{fact}", hint=self._hint()))

    def first(self, *names: str) -> Path | None:
        return next((path for name in names if (path := self.folder / name).is_file()), None)

    def entries(self, *names: str) -> Iterator[dict[str, Any]]:
        """The objects of the first of these JSON files that is there. Each is let go when the next is asked for: HPDv3 has a million."""
        path = self.first(*names)
        if path is None:
            raise self.missing(names[0])
        content = self.json(path)
        if not content or not all(isinstance(entry, dict) for entry in content):
            raise self.broken(path.name, "not a list of objects" if content else "the list is empty")
        return _let_go(content)

    def json(self, path: Path) -> list[Any]:
        content = parse_json(read_text(path), f"{path}:", hint=self._hint())
        if not isinstance(content, list):
            raise self.broken(path.name, "not a list")
        return content

    def schema(self, path: Path) -> list[str]:
        with self._whole(path), opened(path) as file:
            return list(file.schema_arrow.names)

    def row_groups(self, path: Path) -> list[int]:
        """Rows of each row group."""
        with self._whole(path), opened(path) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def parquet(self, path: Path, columns: list[str]) -> pa.Table:
        names = self.schema(path)
        lacking = [column for column in columns if column not in names]
        if lacking:
            raise self.broken(path.name, f"lacks the columns {', '.join(lacking)}")
        with self._whole(path), opened(path) as file:
            table = file.read(columns=columns)
            table.validate(full=True)  # else text that is no UTF-8 is met much later
            return table

    @contextmanager
    def _whole(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self.broken(path.name, f"not a Parquet file that can be read ({cut(str(error), 200)})") from None

    def preferences(
        self, protocol: str, table: Table, *, roots: Sequence[str] = (), archive: str | tuple[str, ...] = (),
        draw_sides: bool = False, sources: dict[str, ImageSource] | None = None,
    ) -> Preferences:  # fmt: skip
        self.bad.settle(self.total)
        if not table.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in table.dropped.items())
            raise self.broken("", f"{self.split}: no pair is left ({reasons or 'every list is too short'})")
        frame = pd.DataFrame(table.rows).dropna(axis=1, how="all")
        repeats = frame.groupby("pair_id").cumcount()
        frame["pair_id"] = frame["pair_id"].where(repeats == 0, frame["pair_id"] + "#" + (repeats + 1).astype(str))
        get = self._pictures([*frame["first"], *frame["second"]], roots, archive) if sources is None else sources
        return assemble(self.name, self.split, protocol, get, frame, draw_sides=draw_sides, dropped=table.dropped,
                        bad_rows=self.bad.names)  # fmt: skip

    def _pictures(
        self, names: list[str], roots: Sequence[str], archive: str | tuple[str, ...]
    ) -> Callable[[str], ImageSource]:
        """How a listed name becomes a picture: below the folder, below one of its `roots`, or in an archive.

        A name whose picture is nowhere still gets a source: reading it then raises BadImage, and it is counted.
        """
        for name in names:
            if not stays_inside(name):
                raise self.broken("", f"{self.split}: the listed picture {short(name)} leaves the folder")
        probes = names[:: max(1, len(names) // 16)]
        places = [path for path in (self.folder, *(self.folder / part for part in roots)) if path.is_dir()]

        def unpacked() -> Callable[[str], ImageSource] | None:
            # Only this split's own: another split may have other pictures of the same names.
            prefixes = (archive,) if isinstance(archive, str) else archive
            new = [path for place in places for prefix in prefixes for path in place.glob(f"unpacked-{prefix}*")]
            below = [*places, *new, *(inner for path in new for inner in sorted(path.iterdir()))]
            hits = [sum((root / name).is_file() for name in probes) for root in below]
            if not any(hits):
                return None
            root = below[int(np.argmax(hits))]
            return lambda name: FileImage(name, os.path.join(root, name))

        if (get := unpacked()) is not None:
            return get
        members = self._packed(places, archive)
        if (get := unpacked()) is not None:  # what was compressed is unpacked now
            return get
        by_file: dict[str, list[Member]] = {}
        for member in members:
            by_file.setdefault(member.name.rpartition("/")[2], []).append(member)

        def find(name: str) -> Member | None:
            for member in by_file.get(name.rpartition("/")[2], ()):
                if f"/{member.name}".endswith(f"/{name}") or f"/{name}".endswith(f"/{member.name}"):
                    return member
            return None

        if not any(find(name) for name in probes):
            raise self.missing(f"the pictures ({names[0]} and others)")
        return lambda name: member.source(name) if (member := find(name)) else FileImage(name, self.folder / name)

    def _packed(self, places: Sequence[Path], prefixes: str | tuple[str, ...]) -> list[Member]:
        """Members of the archives that can be read in place; the others are unpacked beside themselves."""
        groups: dict[tuple[Path, str], list[Path]] = {}
        for path in sorted(path for place in places for path in place.iterdir() if path.name.startswith(prefixes)):
            if (match := _ARCHIVES.match(path.name)) and path.is_file():
                groups.setdefault((path.parent / match["stem"], match["kind"]), []).append(path)
        members: list[Member] = []
        for (stem, kind), parts in groups.items():
            if kind in ("tar", "zip") and len(parts) == 1:
                members += index(parts[0])
            elif not (target := stem.with_name(f"unpacked-{stem.name}")).exists():
                unpack(parts, target)
        return members


def _hpdv2_styles(at: _Folder) -> dict[str, str]:
    """Prompt to style, from the benchmark's prompt lists where they are there."""
    styles: dict[str, str] = {}
    for style in HPDV2_STYLES:
        if (path := at.first(f"benchmark/{style}.json")) is not None:
            styles.update({str(prompt): style for prompt in at.json(path)})
    return styles
