"""`drm bench`: preference accuracy of a reward model, at every asked noise level, in every counting convention.

Each unique picture is encoded once and scored once a noise level, however many pairs it is in. Scores are kept in part files
while the run goes on, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np
import pandas as pd
import torch

from drmcli import results
from drmcli.config import Bench
from drmcli.errors import RunError
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.plots import accuracy_by_noise
from drmcli.published import published
from drmcli.recipes.pairs import EncodedPairs, LazyGenerator, PairScorer, encode_pairs, first_pairs, load_preferences
from drmcli.reward import RewardModel
from drmcli.run import Interruptions, Reporter, Run, guarded, open_run
from drmcli.stats import Pairs, accuracy, all_protocols

PART_ITEMS = 2048
"""Pictures scored between two part files."""


def run(config: Bench, reporter: Reporter) -> dict[str, Any]:
    """Measure a reward model. Returns what summary.json holds."""
    with open_run("bench", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite measures again")
            return folder.finished
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        reward = RewardModel.from_pretrained(config.reward, device=device, dtype=dtype, attention=config.attention)
        base = LazyGenerator.of_reward(reward, dtype, device)
        drawer = base if config.generator == reward.config.base_model else LazyGenerator.of(config, device)
        prompts = None if config.pairs is None else -(-config.pairs // 5)
        data = load_preferences(
            config.dataset, config.split, config, drawer, folder.reporter, flag="--dataset", prompts=prompts
        )
        if config.pairs is not None:
            data = first_pairs(data, config.pairs)
        asked = len(data)
        pairs, bad, warnings = encode_pairs(
            data, config, base, folder, resolution=config.resolution or reward.config.resolution
        )
        for text in warnings:
            folder.warn(text)
        base.free()
        scorer = PairScorer(pairs)
        with Interruptions() as interruptions:
            scores = score_items(config, folder, reward, scorer, device, interruptions)
        write_tables(folder, scorer, scores, config.sigmas)
        tables = [
            stats_pairs(pairs, scores[scorer.left, j], scores[scorer.right, j]) for j in range(len(config.sigmas))
        ]
        summary = summarize(config, pairs, tables, skipped=asked - len(pairs))
        summary |= {
            "seed": config.seed,
            "device": str(device),
            "dtype": {v: k for k, v in DTYPES.items()}[dtype],
            "seconds": round(time.monotonic() - folder.started, 2),
            "reward": config.reward,
            "noise_samples": config.noise_samples,
            "n_images": len(pairs.data.images) - len(bad),
            "n_images_scored": len(scorer.items),
            "bad_images": bad,
        }
        with guarded(folder.folder):
            accuracy_by_noise(
                folder.folder / "accuracy_by_noise.png",
                {config.dataset: summary["by_sigma"]},
                title=f"{config.dataset}: pair accuracy by noise level",
            )
            shutil.rmtree(folder.folder / "partial", ignore_errors=True)
        return folder.finish(summary)


def score_items(
    config: Bench,
    folder: Run,
    reward: RewardModel,
    scorer: PairScorer,
    device: torch.device,
    interruptions: Interruptions,
) -> np.ndarray:
    """Scores [items, sigmas], going on from the part files of an interrupted run."""
    total = len(scorer.items)
    scores = np.full((total, len(config.sigmas)), np.nan)
    parts = results.Parts(folder.folder / "partial", "partial_scores", folder.id)
    done = 0
    if any(parts.folder.glob("part-*.parquet")):
        earlier = results.read(parts.folder)
        scores[earlier["item"], earlier["column"]] = earlier["score"]
        done = int(earlier["item"].max()) + 1
    unsaved = done
    for start in range(done, total, config.batch_size):
        index = np.arange(start, min(start + config.batch_size, total))
        some = scorer.score(
            reward,
            index,
            config.sigmas,
            noise_samples=config.noise_samples,
            seed=config.seed,
            device=device,
            shared_noise=config.shared_noise,
        )
        scores[index] = some.double().cpu().numpy()
        done = int(index[-1]) + 1
        folder.reporter.progress("score", done, total)
        if interruptions.asked or done - unsaved >= PART_ITEMS:
            for item in range(unsaved, done):
                for column in range(len(config.sigmas)):
                    parts.add(item=item, column=column, score=scores[item, column])
            parts.flush(done)
            unsaved = done
        if interruptions.asked and done < total:
            raise interruptions.stop(f"{done} of {total} pictures are scored in {folder.folder}")
    return scores


def stats_pairs(pairs: EncodedPairs, chosen: np.ndarray, rejected: np.ndarray) -> Pairs:
    """Pairs with one column of scores, ready to be counted."""
    return Pairs(
        prompt=pairs.prompt,
        label=pairs.label.astype(float),
        score_chosen=chosen,
        score_rejected=rejected,
        chosen_first=pairs.data.pairs["chosen_first"].to_numpy(bool),
    )


def write_tables(folder: Run, scorer: PairScorer, scores: np.ndarray, sigmas: list[float]) -> None:
    """scores.parquet and pairs.parquet."""
    data, pairs = scorer.pairs.data, scorer.pairs
    prompt, image = scorer.items[:, 0], scorer.items[:, 1]
    keys = np.array([source.key for source in data.images], dtype=object)
    prompts, ids = np.array(data.prompts, dtype=object), np.array(data.prompt_ids, dtype=object)
    n, m = len(scorer.items), len(pairs)
    long = pd.DataFrame(
        {
            "dataset": data.name,
            "image": np.tile(keys[image], len(sigmas)),
            "prompt_id": np.tile(ids[prompt], len(sigmas)),
            "prompt": np.tile(prompts[prompt], len(sigmas)),
            "sigma": np.repeat(np.array(sigmas, dtype=float), n),
            "score": scores.T.reshape(-1),
        }
    )
    results.write(folder.folder / "scores.parquet", "scores", long, folder.id)
    table = pd.DataFrame(
        {
            "dataset": data.name,
            "prompt_id": np.tile(ids[pairs.prompt], len(sigmas)),
            "pair_id": np.tile(data.pairs["pair_id"].to_numpy(object), len(sigmas)),
            "prompt": np.tile(prompts[pairs.prompt], len(sigmas)),
            "chosen": np.tile(keys[pairs.chosen], len(sigmas)),
            "rejected": np.tile(keys[pairs.rejected], len(sigmas)),
            "label": np.tile(pairs.label.astype(float), len(sigmas)),
            "sigma": np.repeat(np.array(sigmas, dtype=float), m),
            "score_chosen": scores[scorer.left].T.reshape(-1),
            "score_rejected": scores[scorer.right].T.reshape(-1),
        }
    )
    results.write(folder.folder / "pairs.parquet", "pairs", table, folder.id)


def summarize(config: Bench, pairs: EncodedPairs, tables: list[Pairs], *, skipped: int) -> dict[str, Any]:
    """Accuracies and counts; the first noise level is the headline."""
    protocol = pairs.data.protocol if pairs.data.protocol != "pickscore-threshold" else "ties-half"
    head = accuracy(tables[0], protocol)
    if np.isnan(head.value):
        raise RunError(f"{config.dataset}: no pair counts under {protocol!r}", hint="the data holds only ties")
    every = all_protocols(tables[0])
    by_sigma = []
    for sigma, table in zip(config.sigmas, tables):
        a = accuracy(table, protocol)
        by_sigma.append({"sigma": sigma, "accuracy": a.value, "ci95": list(a.ci95)})
    return {
        "dataset": config.dataset,
        "split": config.split,
        "protocol": protocol,
        "sigma": config.sigmas[0],
        "n_prompts": head.n_prompts,
        "n_pairs": head.n_pairs,
        "n_ties": head.n_ties,
        "n_predicted_ties": head.n_predicted_ties,
        "n_skipped": skipped + head.n_skipped,
        "accuracy": head.value,
        "ci95": list(head.ci95),
        "protocols": {name: a.value for name, a in every.items() if not np.isnan(a.value)},
        "protocols_ci95": {name: list(a.ci95) for name, a in every.items() if not np.isnan(a.value)},
        "by_sigma": by_sigma,
        "published": published_beside(config.dataset, protocol),
    }


def published_beside(dataset: str, protocol: str) -> list[dict[str, Any]]:
    """Published figures for a dataset, best first, each with whether it is known to be counted as ours is."""
    return [
        {
            "model": row.model,
            "accuracy": row.accuracy,
            "protocol": row.protocol,
            "comparable": row.protocol == protocol and not row.note,
            "note": row.note,
            "source": row.source,
        }
        for row in published(dataset.removesuffix("_v2"))
    ]


def plan(config: Bench) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.recipes.plan import describe_generator

    known = describe_generator(config)
    return {
        "dataset": config.dataset,
        "noise levels": config.sigmas,
        "noise samples": config.noise_samples,
        "forward passes a picture": sum(config.noise_samples if s > 0 else 1 for s in config.sigmas),
        "download": known.download,
    }
