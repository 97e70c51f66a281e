"""`drm bench`: preference accuracy of reward models and other scorers, in every counting convention.

Each unique picture is encoded once and scored once at each sigma, however many pairs it is in. Scores are kept in part files
while the run goes on, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drmcli import results
from drmcli.config import Bench, dataset_names, spoken
from drmcli.data.batches import IndexedPairs
from drmcli.data.datasets import DATASETS
from drmcli.data.images import BadImage, load_image
from drmcli.data.preferences import Preferences
from drmcli.data.prompts import of_generators
from drmcli.data.sources import LivePrompts
from drmcli.errors import InputError, RunError
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.measure.protocols import Pairs
from drmcli.plots import accuracy_by_noise, calibration_plot
from drmcli.recipes import generated
from drmcli.recipes.bench_tables import Opinion, summarize, write_scorers, write_tables
from drmcli.recipes.pairs import LazyGenerator, PairScorer, encode_pairs, first_pairs, load_preferences
from drmcli.run import SILENT, Interruptions, Reporter, Run, guarded, open_run
from drmcli.scorers import Scorer, load_scorer, read_reference
from drmcli.scorers.drm import RewardScorer

PART_ITEMS = 2048
"""Pictures scored between two part files."""


def run(config: Bench, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Measure reward models and scorers on the same pairs, or a generator. Returns what summary.json holds."""
    if "," in config.dataset:
        return run_many(config, reporter)
    if of_generators(config.dataset):
        return generated.run(config, reporter)
    refs = list(dict.fromkeys(r for r in (config.reward, *config.scorers, config.against) if r and r != "none"))
    if not refs:
        raise InputError("--reward none: nothing is left to measure", hint="name a scorer, for example --scorer clip")
    for ref in refs:  # before minutes of drawing and encoding
        read_reference(ref, flag_of(config, ref))
    with open_run("bench", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite measures again")
            return folder.finished
        bench = _Bench(config, folder)
        bench.load(refs[0])  # what is wrong with it should not come out after minutes of drawing and encoding
        data = bench.data(config.split)
        with Interruptions() as interruptions:
            opinions = [bench.ask(ref, data, i, interruptions) for i, ref in enumerate(refs)]
            calibration = bench.calibrate(opinions[0], interruptions)
        first = opinions[0]
        write_tables(folder, first.scorer, first.scores, first.sigmas)
        if len(opinions) > 1:
            write_scorers(folder, opinions)
        summary = summarize(config, data, opinions, calibration)
        summary |= {
            "seed": config.seed,
            "device": str(bench.device),
            "dtype": {v: k for k, v in DTYPES.items()}[bench.dtype],
            "seconds": round(time.monotonic() - folder.started, 2),
            "reward": first.ref,
            "noise_samples": config.noise_samples,
            "n_images": len(data.images) - len(first.bad),
            "n_images_scored": int(np.isfinite(first.scores[:, 0]).sum()),
            "bad_images": first.bad,
        }
        with guarded(folder.folder):
            if len(summary["by_sigma"]) > 1:  # one sigma is no curve
                accuracy_by_noise(
                    folder.folder / "accuracy_by_noise.png",
                    {config.dataset: summary["by_sigma"]},
                    title=f"{config.dataset}: pair accuracy by sigma",
                )
            calibration_plot(folder.folder / "calibration.png", summary["calibration"], title=config.dataset)
            shutil.rmtree(folder.folder / "partial", ignore_errors=True)
        return folder.finish(summary)


def names_of_pairs(config: Bench) -> list[str]:
    """The datasets of a list. Raises InputError for names that cannot be one table, before any of them is measured."""
    names = dataset_names(config.dataset)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"--dataset {config.dataset}: {name} is there twice", hint="name each once")
        if of_generators(name):
            raise InputError(f"--dataset {config.dataset}: {name} is of generators", hint="measure it by itself")
    return names


def part_folders(names: list[str]) -> dict[str, str]:
    """A folder's name for each dataset: its stem, or the first free one of STEM-2, STEM-3, ..."""
    found: dict[str, str] = {}
    for name in names:
        stem = Path(name).stem
        numbered = (f"{stem}-{i}" for i in itertools.count(2))
        found[name] = next(n for n in itertools.chain([stem], numbered) if n not in found.values())
    return found


def run_many(config: Bench, reporter: Reporter) -> dict[str, Any]:
    """Several datasets, each a run of its own inside the folder, and one table of scorers by datasets.

    `--data-dir` holds a folder for each that is named like it, where there is one. `accuracy` is the lowest of the first scorer's.
    """
    names = names_of_pairs(config)
    with open_run("bench", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite measures again")
            return folder.finished
        parts, folders = [], part_folders(names)
        for name in names:
            inner = Path(config.data_dir) / name if config.data_dir else None
            flags: dict[str, Any] = {"dataset": name, "out": str(folder.folder / folders[name])}
            flags |= {"data_dir": str(inner)} if inner is not None and inner.is_dir() else {}
            part = run(replace(config, **flags), generated.Part(reporter, name))
            parts.append(part)
        scorers = [row["scorer"] for row in parts[0]["scorers"]]
        table = [
            {"scorer": ref}
            | {
                part["dataset"]: {k: row[k] for k in ("accuracy", "ci95", "images_per_second", "peak_memory_gib")}
                for part in parts
                for row in part["scorers"]
                if row["scorer"] == ref
            }
            for ref in scorers
        ]
        shared = ("seed", "device", "dtype", "reward", "noise_samples")
        return folder.finish(
            {k: parts[0][k] for k in shared}
            | {
                "seconds": round(time.monotonic() - folder.started, 2),
                "dataset": config.dataset,
                "accuracy": min(part["accuracy"] for part in parts),
                "datasets": parts,
                "table": table,
            }
        )


def flag_of(config: Bench, ref: str) -> str:
    """The flag that named a model."""
    return "--reward" if ref == config.reward else "--against" if ref == config.against else "--scorer"


class _Bench:
    """One run: where it computes, and what its opinions share."""

    def __init__(self, config: Bench, folder: Run):
        self.config, self.folder = config, folder
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.drawer = LazyGenerator.of(config, self.device)
        self._loaded: tuple[str, Scorer] | None = None

    def data(self, split: str | None) -> Preferences:
        """The pairs of a split, the one to bench for None; pictures of `shapes` are drawn by the generator that is named."""
        config = self.config
        split = split or (DATASETS[config.dataset].default_split if config.dataset in DATASETS else "test")
        prompts = None if config.pairs is None else -(-config.pairs // 5)
        data = load_preferences(
            config.dataset, split, config, self.drawer, self.folder.reporter, flag="--dataset", prompts=prompts
        )
        return data if config.pairs is None else first_pairs(data, config.pairs)

    def load(self, ref: str) -> Scorer:
        """A scorer; the last one that was asked for is kept."""
        if self._loaded is None or self._loaded[0] != ref:
            config = self.config
            self._loaded = None  # its memory goes before the next is loaded
            model = load_scorer(
                ref,
                device=self.device,
                dtype=self.dtype,
                kernels=Kernels.of(config, self.device),
                flag=flag_of(config, ref),
            )
            self._loaded = ref, model
        return self._loaded[1]

    def ask(self, ref: str, data: Preferences, number: int, interruptions: Interruptions, part: str = "") -> Opinion:
        """One model's scores of every picture, going on from an interrupted run's part files."""
        config, folder = self.config, self.folder
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        score: Callable[[np.ndarray], np.ndarray]
        bad: list[str] = []
        model = self.load(ref)
        if not isinstance(model, RewardScorer):
            sigmas, scorer = [0.0], PairScorer(IndexedPairs(data))

            def score(index: np.ndarray) -> np.ndarray:
                parts = scorer.batch.each(
                    lambda at: _score_pictures(model, ref, scorer, index[at], bad)[:, None], len(index)
                )
                return np.concatenate(parts)

        else:
            reward = model.model
            self.drawer.free()
            base = LazyGenerator.of_reward(reward, self.dtype, self.device)  # prompts as in its training
            sigmas = config.sigmas
            pairs, bad, warnings = encode_pairs(
                data, config, base, folder, resolution=config.resolution or reward.config.resolution
            )
            for text in warnings:
                folder.warn(text)
            base.free(keep_text=isinstance(pairs.encoded.source, LivePrompts))
            scorer = PairScorer(pairs)

            def score(index: np.ndarray) -> np.ndarray:
                found = scorer.score(
                    reward,
                    index,
                    sigmas,
                    noise_samples=config.noise_samples,
                    seed=config.seed,
                    device=self.device,
                    shared_noise=config.shared_noise,
                )
                return found.double().cpu().numpy()

        started = time.monotonic()
        scores = score_items(
            config,
            folder,
            score,
            len(scorer.items),
            sigmas,
            f"{number}{part}",
            f"score by {spoken(ref)}",
            interruptions,
        )
        if not isinstance(model, RewardScorer):
            bad = _check_bad(config, folder, scorer, scores, bad)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        return Opinion(ref, scorer, sigmas, scores, time.monotonic() - started, bad, peak)

    def calibrate(self, first: Opinion, interruptions: Interruptions) -> Pairs | None:
        """The first model's scores of the calibration split, for protocols that choose a threshold there."""
        if self.config.calibration_split is None:
            return None
        data = self.data(self.config.calibration_split)
        return self.ask(first.ref, data, 0, interruptions, "-calibration").table(data)


def _score_pictures(model: Scorer, ref: str, scorer: PairScorer, index: np.ndarray, bad: list[str]) -> np.ndarray:
    """Scores [n] of some items by a scorer of pictures; NaN for those that cannot be read, which are added to `bad`."""
    data = scorer.pairs.data
    images, texts, where = [], [], []
    for position, (prompt, image) in enumerate(scorer.items[index]):
        try:
            images.append(load_image(data.images[image]))
        except BadImage as error:
            bad.append(f"{error.key}: {error.reason}")
            continue
        texts.append(data.prompts[prompt])
        where.append(position)
    out = np.full(len(index), np.nan)
    if images:
        out[where] = model.score_images(images, texts).double().numpy()
        if not np.isfinite(out[where]).all():
            raise RunError(f"--scorer {ref}: a score is not finite", hint="check its weights, or use --dtype fp32")
    return out


def _check_bad(config: Bench, folder: Run, scorer: PairScorer, scores: np.ndarray, found: list[str]) -> list[str]:
    """Pictures that a scorer could not read, with the same limit as encoding has."""
    data = scorer.pairs.data
    lost = sorted({data.images[i].key for i in scorer.items[np.isnan(scores[:, 0]), 1]})
    if 100 * len(lost) > config.max_bad * len(data.images):
        raise RunError(
            f"{data.name}: {len(lost)} of {len(data.images)} images cannot be read, the first is {lost[0]}",
            hint="mend them, or raise --max-bad",
        )
    if lost:
        folder.warn(f"{data.name}: left out {len(lost)} images that cannot be read, the first is {lost[0]}")
    reasons = {text.split(": ")[0]: text for text in found}
    return [reasons.get(key, key) for key in lost]


def score_items(
    config: Bench,
    folder: Run,
    score: Callable[[np.ndarray], np.ndarray],
    total: int,
    sigmas: list[float],
    name: str,
    task: str,
    interruptions: Interruptions,
) -> np.ndarray:
    """Scores [items, sigmas], going on from the part files of an interrupted run."""
    scores = np.full((total, len(sigmas)), np.nan)
    parts = results.Parts(folder.folder / "partial" / name, "partial_scores", folder.id)
    done = 0
    for number, earlier in parts.whole(folder.warn):
        if (
            int(earlier["item"].min()) != done or number > total
        ):  # a part is missing: this one and what follows is scored again
            parts.drop_after(done)
            break
        scores[earlier["item"], earlier["column"]] = earlier["score"]
        done = number
    unsaved = done
    for start in range(done, total, config.batch_size):
        index = np.arange(start, min(start + config.batch_size, total))
        scores[index] = score(index)
        done = int(index[-1]) + 1
        folder.reporter.progress(task, done, total)
        if interruptions.asked or done - unsaved >= PART_ITEMS:
            for item in range(unsaved, done):
                for column in range(len(sigmas)):
                    parts.add(item=item, column=column, score=scores[item, column])
            parts.flush(done)
            unsaved = done
        if interruptions.asked and done < total:
            raise interruptions.stop(f"{done} of {total} pictures are scored in {folder.folder}")
    return scores


def plan(config: Bench) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.recipes import hours
    from drmcli.recipes.data_plan import benchmark_data
    from drmcli.recipes.footprints import of_bench
    from drmcli.recipes.plan import describe_generator

    if "," in config.dataset:
        names_of_pairs(config)
    elif of_generators(config.dataset):
        return generated.plan(config)
    known = describe_generator(config)
    facts = benchmark_data(config).facts(config, known, known.latent_side(config.resolution))
    return (
        {
            "dataset": config.dataset,
            "sigmas": config.sigmas,
            "noise samples": config.noise_samples,
            "forward passes a picture": hours.passes(config.sigmas, config.noise_samples),
            "download": known.download,
        }
        | facts
        | of_bench(config)
        | hours.of_bench(config, known, facts)
    )
