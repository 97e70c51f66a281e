"""`drm data make`: prompts -> pictures by the generator -> scores by whatever judges -> preference pairs, a file for `--data`.

Own samples teach a reward model what it is asked while sampling; they do not teach it what a broken picture is, because a good generator
draws none. A reward model that saw them alone is fooled by gross failures (best-of-8 by one fell below best-of-2), so mix them with other
pairs: `drm train-reward --data RUN=0.7 --data shapes=0.3`.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from drmcli import results
from drmcli.config import package_path, resolve
from drmcli.config.making import DataMake
from drmcli.data.datasets import PREFERENCES
from drmcli.data.images import FileImage, load_image
from drmcli.data.labels import Labelled, combined, pairs
from drmcli.data.preferences import text_id
from drmcli.data.prompts import PROMPT_SETS, read_prompts
from drmcli.errors import InputError
from drmcli.files import damaged, guarded
from drmcli.fitting import Batch
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.recipes import sample
from drmcli.recipes.generated import Part, lora_folder
from drmcli.run import SILENT, Interruptions, Reporter, Run, open_run, seed_of
from drmcli.scorers import Scorer, load_scorer, parse_term
from drmcli.sheets import Block, Tile, note_of, sheet

SHAPES = 200
"""Captions of the embedded world that are drawn where no number is given."""
SHEET_ROWS, SHEET_COLUMNS = 16, 8
SHARED = ("seed", "device", "dtype", "attention", "compile", "resolution", "generator", "revision", "max_sequence_length", "text_encoder_3",
          "num_images", "steps", "step_rule", "noise_level", "guidance_scale", "batch_size")  # fmt: skip
"""What the drawing takes over."""


def run(config: DataMake, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Draw, judge, write. Returns what summary.json holds."""
    prompts, terms = prompts_of(config), terms_of(config)
    with open_run("data-make", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite makes it again")
            return folder.finished
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        scorers = [load_scorer(ref, device=device, dtype=dtype, flag="--label", kernels=Kernels.of(config, device),
                               sigma=config.sigma, seed=config.seed) for ref, _ in terms]  # fmt: skip
        for scorer in scorers:  # before minutes are spent on pictures that it cannot judge
            scorer.check_prompts(prompts)
        images = draw(config, folder, prompts)
        found = [judged(s, number, images, config, folder) for number, s in enumerate(scorers)]
        summary = {
            "seed": config.seed, "device": str(device), "dtype": {v: k for k, v in DTYPES.items()}[dtype],
            "label": config.label, "n_prompts": len(prompts), "n_images": len(images), "n_pairs": 0, "n_ties": 0,
            "data": str(folder.folder), "sheet": str(folder.folder / "sheet.png"),
        }  # fmt: skip
        score = None
        if scorers:
            by_prompt = np.stack(found).reshape(len(scorers), len(prompts), config.num_images)
            score = combined(by_prompt, [weight for _, weight in terms])
            made = pairs(
                score, labels=config.labels, temperature=config.temperature, tie_gap=config.tie_gap,
                weight_by_gap=config.weight_by_gap, rng=np.random.default_rng(seed_of("labels", config.seed)),
            )  # fmt: skip
            write_pairs(folder, images, made)
            summary |= {"n_pairs": len(made.label), "n_ties": int((made.label == 0.5).sum())}
            summary["mean_scores"] = {s.name: float(x.mean()) for s, x in zip(scorers, found)}
        results.write(folder.folder / "drawn.parquet", "drawn", rows_of(images, score), folder.id)
        contact_sheet(folder.folder / "sheet.png", images, score, config.num_images)
        shutil.rmtree(folder.folder / "partial", ignore_errors=True)
        return folder.finish(summary | {"seconds": round(time.monotonic() - folder.started, 2)})


def prompts_of(config: DataMake) -> list[str]:
    """The prompts to draw, each once."""
    if config.prompts in PROMPT_SETS:
        return PROMPT_SETS[config.prompts]()["train"][: config.limit or SHAPES]
    found = list(dict.fromkeys(read_prompts(package_path(config.prompts), flag="PROMPTS")))
    return found[: config.limit]


def terms_of(config: DataMake) -> list[tuple[str, float]]:
    """The scorers that label, with their weights; none for people and none."""
    if not config.label:
        hint = "give --label SCORER, for example --label hpsv3, or --label people, or --label none"
        raise InputError("--label: nothing is named that judges the pictures", hint=hint)
    if set(config.label) & {"people", "none"}:
        if len(config.label) > 1:
            raise InputError(
                f"--label {config.label[0]}: given together with --label {config.label[1]}",
                hint="give it alone, or scorers",
            )
        return []
    terms = [parse_term(text, "--label") for text in config.label]
    for (_, weight), text in zip(terms, config.label):
        if weight == 0:
            raise InputError(
                f"--label {text}: the weight must be a number other than 0", hint="for example --label clip=0.5"
            )
    return terms


def draw(config: DataMake, folder: Run, prompts: list[str]) -> list[dict[str, Any]]:
    """Pictures of the prompts, or what an earlier start has left of them: path (in the run folder), prompt and seed of each."""
    flags = {name: getattr(config, name) for name in SHARED} | {
        "prompts": prompts, "reward": "none", "mode": "plain", "out": str(folder.folder / "drawn"),
        "lora": lora_folder(config.lora) if config.lora else None,
    }  # fmt: skip
    drawn = sample.run(resolve("sample", preset=config.preset, flags=flags), Part(folder.reporter, "drawing"))
    try:
        return [row | {"path": str(Path(row["path"]).relative_to(folder.folder))} for row in drawn["images"]]
    except (KeyError, TypeError, ValueError):  # an earlier start's
        raise damaged(folder.folder / "drawn" / "summary.json", f"--out {folder.folder}") from None


def judge_some(scorer: Scorer, images: list[Image.Image], prompts: list[str], at: slice) -> np.ndarray:
    """Scores of some of these pictures."""
    return scorer.score_images(images[at], prompts[at]).double().numpy()


def judged(scorer: Scorer, number: int, images: list[dict[str, Any]], config: DataMake, folder: Run) -> np.ndarray:
    """Scores [pictures] of one scorer; what an earlier start has left is not asked again."""
    size = config.batch_size or 32
    batch = Batch(size, flag="--batch-size", hint="--dtype bf16")
    parts = results.Parts(folder.folder / "partial" / f"scores-{number}", "partial_scores", folder.id)
    known = {at: table["score"].to_numpy(float) for at, table in parts.whole(folder.warn)}
    out = []
    with Interruptions() as interruptions:
        for start in range(0, len(images), size):
            some = images[start : start + size]
            if start not in known:
                opened = [load_image(FileImage(row["path"], folder.folder / row["path"])) for row in some]
                texts = [row["prompt"] for row in some]
                values = np.concatenate(batch.each(partial(judge_some, scorer, opened, texts), len(some)))
                for i, value in enumerate(values):
                    parts.add(item=start + i, column=number, score=float(value))
                parts.flush(start)
                known[start] = values
            out.append(known[start])
            folder.reporter.progress(f"judge by {scorer.name}", start + len(some), len(images))
            if interruptions.asked and start + len(some) < len(images):
                raise interruptions.stop(f"{start + len(some)} of {len(images)} pictures are judged in {folder.folder}")
    return np.concatenate(out)


def write_pairs(folder: Run, images: list[dict[str, Any]], made: Labelled) -> None:
    """The file that `--data` reads: the better picture first."""
    swap = made.label < 0.5
    chosen, rejected = np.where(swap, made.second, made.first), np.where(swap, made.first, made.second)
    prompts = [images[i]["prompt"] for i in chosen]
    table = pd.DataFrame(
        {
            "prompt": prompts, "prompt_id": [text_id(p) for p in prompts],
            "pair_id": [f"{a}-{b}" for a, b in zip(made.first, made.second)],
            "chosen": [images[i]["path"] for i in chosen], "rejected": [images[i]["path"] for i in rejected],
            "label": np.where(swap, 1 - made.label, made.label), "weight": made.weight,
        }
    )  # fmt: skip
    results.write(folder.folder / PREFERENCES, "preferences", table, folder.id)


def rows_of(images: list[dict[str, Any]], score: np.ndarray | None) -> list[dict[str, Any]]:
    values = [float("nan")] * len(images) if score is None else score.ravel().tolist()
    return [
        {"prompt_id": text_id(r["prompt"]), "prompt": r["prompt"], "seed": r["seed"], "path": r["path"], "score": v}
        for r, v in zip(images, values)
    ]


def contact_sheet(path: Path, images: list[dict[str, Any]], score: np.ndarray | None, count: int) -> None:
    """sheet.png: a row a prompt (the first ones), its best pictures first, seed and score below."""
    blocks = []
    for row in range(min(SHEET_ROWS, len(images) // count)):
        order = np.arange(count) if score is None else np.argsort(-score[row], kind="stable")
        tiles = []
        for k in map(int, order[:SHEET_COLUMNS]):
            image = images[row * count + k]
            picture = load_image(FileImage(image["path"], path.parent / image["path"]))
            tiles.append(Tile(picture, note=note_of(image["seed"], None if score is None else float(score[row, k]))))
        blocks.append(Block(tiles, images[row * count]["prompt"]))
    with guarded(path):
        sheet(blocks).save(path)


def plan(config: DataMake) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.recipes.plan import describe_generator

    prompts, terms = prompts_of(config), terms_of(config)
    return {
        "prompts": len(prompts),
        "pictures to draw": len(prompts) * config.num_images,
        "pairs": len(prompts) * config.num_images * (config.num_images - 1) // 2 if terms else 0,
        "label": config.label,
        "download": describe_generator(config).download,
    }
