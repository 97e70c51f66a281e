"""`drm bench` of a generator: scores of what it draws, before and after a LoRA, and GenEval.

Pictures are drawn by the same code as `drm sample`, in a run of their own inside the folder, so that an interrupted benchmark draws
none of them twice. Before and after a LoRA are compared on the same prompts and seeds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from drmcli import results
from drmcli.config import Bench, package_path, resolve, spoken
from drmcli.data.images import BadImage, FileImage, load_image
from drmcli.data.preferences import text_id
from drmcli.data.prompts import read_prompts
from drmcli.errors import InputError, MissingError, RunError
from drmcli.fitting import SMALLER, Batch
from drmcli.generator import DTYPES, Generator, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.measure.detect import check_labels, load_detector
from drmcli.measure.geneval import TASKS, Item, evaluate, read_item, read_metadata, summarize
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.recipes import sample
from drmcli.run import Interruptions, Reporter, Run, guarded, open_run
from drmcli.scorers import load_scorer
from drmcli.sheets import Block, Tile, note_of, sheet
from drmcli.tiny import tasks, world

METADATA = "evaluation_metadata.jsonl"
TASK_SETS: dict[str, Callable[[], list[Item]]] = {"shapes": tasks.items}
"""Prompts with what must be seen in each that are made, by the detector that sees it."""
SHAPES_PROMPTS = 96
"""Held-out captions of shapes-prompts."""


def run(config: Bench, reporter: Reporter) -> dict[str, Any]:
    """Measure a generator. Returns what summary.json holds."""
    with open_run("bench", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite measures again")
            return folder.finished
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        found = (
            run_geneval(config, folder, device)
            if config.dataset == "geneval"
            else run_prompts(config, folder, device, dtype)
        )
        return folder.finish(
            {
                "seed": config.seed,
                "device": str(device),
                "dtype": {v: k for k, v in DTYPES.items()}[dtype],
                "seconds": round(time.monotonic() - folder.started, 2),
                "dataset": config.dataset,
                "generator": None if config.images else config.generator,
                "lora": None if config.images else config.lora,
            }
            | found
        )


@dataclass
class Part:
    """A reporter that names the part in front of each task."""

    inner: Reporter
    title: str

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        self.inner.progress(f"{self.title}: {task}", done, total, **fields)

    def note(self, text: str) -> None:
        self.inner.note(f"{self.title}: {text}")

    def warn(self, text: str) -> None:
        self.inner.warn(f"{self.title}: {text}")


def draw(config: Bench, folder: Run, prompts: list[str], title: str, lora: str | None) -> dict[str, Any]:
    """Pictures of the prompts, or what an earlier start has left of them: the summary of a sampling run."""
    shared = (
        "seed",
        "device",
        "dtype",
        "attention",
        "compile",
        "resolution",
        "generator",
        "revision",
        "max_sequence_length",
        "vae_tiling",
        "text_encoder_3",
    )
    flags = {name: getattr(config, name) for name in shared} | {
        "prompts": prompts, "num_images": config.num_images, "steps": config.steps, "guidance_scale": config.guidance_scale,
        "lora": lora, "reward": "none", "out": str(folder.folder / f"drawn-{title}"),
    }  # fmt: skip
    return sample.run(resolve("sample", preset=config.preset, flags=flags), Part(folder.reporter, title))


def lora_folder(ref: str) -> str:
    """A LoRA's folder; of a run of `drm grpo`, its best."""
    inner = Path(package_path(ref)) / "lora"
    return str(inner) if inner.is_dir() else ref


# --- prompts ------------------------------------------------------------------------------------------------------------


def prompts_of(config: Bench) -> list[str]:
    """The prompts to draw, each once."""
    if config.dataset == "shapes-prompts":
        every = list(world.captions("test"))[: config.prompts or SHAPES_PROMPTS]
    else:
        every = read_prompts(package_path(config.dataset), flag="--dataset")
    return list(dict.fromkeys(every))[: config.prompts]


def run_prompts(config: Bench, folder: Run, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Scores of what is drawn for a set of prompts, paired by prompt and seed where there is a LoRA."""
    refs = list(dict.fromkeys(r for r in (config.reward, *config.scorers, config.against) if r and r != "none"))
    if not refs:
        raise InputError(
            "--reward none: nothing is left to score with", hint="name a scorer, for example --scorer clip"
        )
    if config.fail_under is not None:
        raise InputError("--fail-under: scores are no accuracy", hint="leave it out for a generator")
    prompts = prompts_of(config)
    ways = {"before": None} | ({"after": lora_folder(config.lora)} if config.lora else {})
    drawn = {way: draw(config, folder, prompts, way, lora) for way, lora in ways.items()}
    prompt = np.repeat(np.arange(len(prompts)), config.num_images)
    tables, scored = [], []
    shown: dict[str, np.ndarray] = {}
    with Interruptions() as interruptions:
        for number, ref in enumerate(refs):
            scores = {}
            for way, summary in drawn.items():
                part = folder.path("partial", f"{number}-{way}.parquet")
                if not results.readable(part, folder.warn):
                    values = score_pictures(ref, summary["images"], config, folder, device, dtype)
                    results.write(
                        part, "generated", _rows(config, ways[way], summary["images"], ref, values), folder.id
                    )
                    if interruptions.asked:
                        raise interruptions.stop(f"what is drawn and scored is in {folder.folder}")
                tables.append(results.read(part))
                scores[way] = tables[-1]["score"].to_numpy(float)
            scored.append({"scorer": ref} | _compared(scores, prompt))
            shown = shown or scores
        diversity = {way: spread(config, summary["images"], device, dtype) for way, summary in drawn.items()}
    results.write(folder.folder / "generated.parquet", "generated", pd.concat(tables), folder.id)
    side_by_side(folder, drawn, config.num_images, shown)
    shutil.rmtree(folder.folder / "partial")
    return {
        "split": None,
        "n_prompts": len(prompts),
        "n_images": len(prompt),
        "scorers": scored,
        "diversity": diversity,
        "diversity_kind": "root mean square distance of a prompt's pictures in the VAE's latent space",
        "images_per_second": drawn["before"]["images_per_second"],
        "grid": str(folder.folder / "before_after.png"),
    }


def score_pictures(
    ref: str, images: list[dict[str, Any]], config: Bench, folder: Run, device: torch.device, dtype: torch.dtype
) -> np.ndarray:
    """One score a picture, by a reward model (at the first sigma asked for) or a scorer."""
    scorer = load_scorer(
        ref, device=device, dtype=dtype, kernels=Kernels.of(config, device), sigma=config.sigmas[0],
        noise_samples=config.noise_samples, seed=config.seed,
    )  # fmt: skip
    batch = Batch(config.batch_size, flag="--batch-size", hint=SMALLER)

    def some(at: slice) -> np.ndarray:
        found = scorer.score_images(_load([r["path"] for r in images[at]]), [r["prompt"] for r in images[at]])
        folder.reporter.progress(f"score by {spoken(ref)}", at.stop, len(images))
        return found.double().numpy()

    return np.concatenate(batch.each(some, len(images)))


def _load(paths: list[str]) -> list[Image.Image]:
    return [load_image(FileImage(path, Path(path))) for path in paths]


def _rows(
    config: Bench, lora: str | None, images: list[dict[str, Any]], ref: str, values: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {
            "dataset": config.dataset, "generator": config.generator, "lora": lora or "", "prompt_id": text_id(row["prompt"]),
            "prompt": row["prompt"], "seed": row["seed"], "path": row["path"], "scorer": ref, "score": float(value),
        }
        for row, value in zip(images, values)
    ]  # fmt: skip


def _compared(scores: dict[str, np.ndarray], prompt: np.ndarray) -> dict[str, Any]:
    """Mean with interval; after a LoRA also the paired difference and how often it wins, ties half."""
    before = mean_ci(scores["before"], prompt)
    row: dict[str, Any] = {"before": before.value, "before_ci95": list(before.ci95)}
    if "after" in scores:
        after, gap = mean_ci(scores["after"], prompt), paired_ci(scores["after"], scores["before"], prompt)
        wins = mean_ci((np.sign(scores["after"] - scores["before"]) + 1) / 2, prompt)
        row |= {
            "after": after.value, "after_ci95": list(after.ci95), "difference": gap.value, "difference_ci95": list(gap.ci95),
            "p_value": gap.p_value, "win_rate": 100 * wins.value, "win_rate_ci95": [100 * x for x in wins.ci95],
        }  # fmt: skip
    return row


def spread(config: Bench, images: list[dict[str, Any]], device: torch.device, dtype: torch.dtype) -> float | None:
    """Mean distance between the pictures of a prompt, see `diversity_kind`; None with one picture a prompt."""
    n = config.num_images
    if n < 2:
        return None
    generator = Generator.load(
        config.generator, revision=config.revision, device=device, dtype=dtype, components=("vae",),
        max_sequence_length=config.max_sequence_length,
    )  # fmt: skip
    paths = [row["path"] for row in images]
    latents = [
        generator.encode_images(_load(paths[i : i + n]), None).flatten(1).float() for i in range(0, len(paths), n)
    ]
    apart = [torch.cdist(x, x).sum() / (n * (n - 1)) / x.shape[1] ** 0.5 for x in latents]
    return float(torch.stack(apart).mean())


def side_by_side(folder: Run, drawn: dict[str, dict[str, Any]], n: int, scores: dict[str, np.ndarray]) -> None:
    """before_after.png: the first seed of up to eight prompts in each way, with its score by the first scorer."""
    blocks = []
    for first in range(0, min(8 * n, len(drawn["before"]["images"])), n):
        rows = {way: summary["images"][first] for way, summary in drawn.items()}
        tiles = []
        for (way, row), picture in zip(rows.items(), _load([row["path"] for row in rows.values()])):
            note = note_of(row["seed"], float(scores[way][first]))
            tiles.append(Tile(picture, note=f"{way}\n{note}" if len(drawn) > 1 else note))
        blocks.append(Block(tiles, rows["before"]["prompt"]))
    with guarded(folder.folder):
        sheet(blocks).save(folder.folder / "before_after.png")


# --- GenEval ------------------------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """One picture to evaluate."""

    number: int
    """Which item it is of."""
    item: Item
    image: int
    path: Path


def run_geneval(config: Bench, folder: Run, device: torch.device) -> dict[str, Any]:
    """Draw (or take) pictures, find objects, count by GenEval's rules. A picture that cannot be read leaves every denominator."""
    if config.images:
        shown = list(existing(Path(config.images)))
    else:
        items = items_of(config)
        summary = draw(
            config, folder, [item.prompt for item in items], "geneval", config.lora and lora_folder(config.lora)
        )
        shown = list(lay_out(folder, items, summary["images"], config.num_images))
    detector = load_detector(config.detector, config.color_model, device=device)
    check_labels(detector, [c.label for s in shown for c in (*s.item.include, *s.item.exclude)])
    parts = results.Parts(folder.folder / "partial" / "geneval", "geneval", folder.id)
    size = config.batch_size
    kept = [number for number, _ in parts.whole(folder.warn)]
    done = next((i for i, number in enumerate(kept) if i != number), len(kept))
    parts.drop_after(done - 1)
    done *= size
    with Interruptions() as interruptions:
        for start in range(done, len(shown), size):
            some = shown[start : start + size]
            read: list[tuple[Shown, Image.Image]] = []
            for s in some:
                try:
                    read.append((s, _load([str(s.path)])[0]))
                except BadImage as error:
                    _row(parts, s, None, f"cannot be read: {error.reason}")
            found = detector.detect([picture for _, picture in read]) if read else []
            for (s, picture), seen in zip(read, found):
                _row(parts, s, *evaluate(s.item, seen, partial(detector.colors, picture)))
            parts.flush(start // size)
            folder.reporter.progress("evaluate", min(start + size, len(shown)), len(shown))
            if interruptions.asked and start + size < len(shown):
                raise interruptions.stop(f"{start + size} of {len(shown)} pictures are evaluated in {folder.folder}")
    table = results.read(parts.folder)
    results.write(folder.folder / "geneval.parquet", "geneval", table, folder.id)
    lost, table = table[table["correct"].isna()], table[table["correct"].notna()]
    if 100 * len(lost) > config.max_bad * len(shown) or not len(table):
        raise RunError(
            f"--images: {len(lost)} of {len(shown)} pictures cannot be read, the first is {lost['path'].iloc[0]}",
            hint="mend them, or raise --max-bad",
        )
    if len(lost):
        folder.warn(f"left out {len(lost)} pictures that cannot be read, the first is {lost['path'].iloc[0]}")
    shutil.rmtree(folder.folder / "partial")
    counted = summarize(table["task"].tolist(), table["item"].tolist(), table["correct"].astype(bool).tolist())
    missing = [task for task in TASKS if task not in {t["task"] for t in counted["tasks"]}]
    return counted | {
        "split": None, "accuracy": counted["overall"], "detector": detector.name, "tasks_left_out": missing, "n_skipped": len(lost),
    }  # fmt: skip


def _row(parts: results.Parts, s: Shown, correct: bool | None, reason: str) -> None:
    parts.add(
        item=s.number, image=s.image, task=s.item.tag, prompt=s.item.prompt, path=str(s.path), correct=correct, reason=reason
    )  # fmt: skip


def items_of(config: Bench) -> list[Item]:
    """The prompts to draw. Raises MissingError where GenEval's metadata is not there."""
    if config.data_dir is None and config.detector in TASK_SETS:
        return TASK_SETS[config.detector]()[: config.prompts]
    where = Path(config.data_dir) if config.data_dir else None
    if where is None or not where.exists():
        raise MissingError(
            f"--data-dir{f' {where}' if where else ''}: GenEval's {METADATA} is not there",
            hint=f"fetch prompts/{METADATA} of github.com/djghosh13/geneval and give --data-dir FOLDER_OR_FILE",
        )
    found = read_metadata(where / METADATA if where.is_dir() else where)
    return found if config.prompts is None else found[: config.prompts]


def lay_out(folder: Run, items: list[Item], images: list[dict[str, Any]], each: int) -> Iterator[Shown]:
    """GenEval's own layout beside the drawn pictures: images/00000/metadata.jsonl and samples/0000.png."""
    for number, item in enumerate(items):
        home = folder.path("images", f"{number:05d}", "samples", "x").parent
        with guarded(home):
            (home.parent / "metadata.jsonl").write_text(json.dumps(item.to_dict()), encoding="utf-8")
            for i, row in enumerate(images[number * each : (number + 1) * each]):
                target = home / f"{i:04d}.png"
                if not target.exists():
                    try:
                        os.link(row["path"], target)
                    except OSError:  # another file system, or one without links
                        part = target.with_name(f".{target.name}.part")  # a copy cut short must not be taken for one
                        shutil.copyfile(row["path"], part)
                        part.replace(target)
                yield Shown(number, item, i, target)


def existing(root: Path) -> Iterator[Shown]:
    """The pictures of a folder in GenEval's layout. Raises InputError where it is none."""
    homes = sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdigit()) if root.is_dir() else []
    count = 0
    for home in homes:
        try:
            entry = json.loads((home / "metadata.jsonl").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"--images {home}: no metadata.jsonl that can be read: {error}",
                hint="give a folder in GenEval's layout",
            ) from None
        item = read_item(entry, f"--images {home / 'metadata.jsonl'}")
        for i, path in enumerate(
            sorted(p for p in (home / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", p.name))
        ):
            count += 1
            yield Shown(int(home.name), item, i, path)
    if not count:
        raise InputError(f"--images {root}: holds no NNNNN/samples/NNNN.png", hint="give a folder in GenEval's layout")


def plan(config: Bench) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.recipes.plan import describe_generator

    count = None if config.images else len(items_of(config)) if config.dataset == "geneval" else len(prompts_of(config))
    ways = 2 if config.lora and config.dataset != "geneval" else 1
    return {
        "dataset": config.dataset,
        "prompts": count or "those of the folder",
        "pictures to draw": 0 if count is None else count * config.num_images * ways,
        "download": describe_generator(config).download,
        **({} if config.timing == "off" else {"hours": "not timed; drm sample --dry-run times drawing"}),
    }
