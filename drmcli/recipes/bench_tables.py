"""Tables and summary of `drm bench`: from scores of pictures to accuracies, differences and breakdowns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from drmcli import results
from drmcli.config import Bench
from drmcli.data.preferences import Preferences
from drmcli.errors import RunError
from drmcli.measure.protocols import Pairs, accuracy, all_protocols, calibration_curve, countable, paired_difference
from drmcli.measure.published import published
from drmcli.recipes.pairs import PairScorer
from drmcli.run import Run

GROUP_COLUMNS = {"category": ("category",), "source": ("source",), "model": ("source_chosen", "source_rejected")}
"""Breakdowns by what the data says of its pairs; a pair counts for each model that drew one of its pictures."""


@dataclass
class Opinion:
    """What one reward model or scorer says of the pictures."""

    ref: str
    scorer: PairScorer
    sigmas: list[float]
    """Sigmas; a scorer of pictures has one, 0."""
    scores: np.ndarray
    """[items, sigmas]; NaN for a picture that cannot be read."""
    seconds: float
    bad: list[str]
    """Pictures that cannot be read, as "key: reason"."""
    peak_gib: float | None

    def table(self, data: Preferences, column: int = 0) -> Pairs:
        """All pairs of the data, ready to be counted; NaN where a picture was not scored."""
        kept = self.scorer.pairs.data.pairs["pair_id"]
        sides = pd.DataFrame(
            {"a": self.scores[self.scorer.left, column], "b": self.scores[self.scorer.right, column]}, index=kept
        ).reindex(data.pairs["pair_id"])
        return Pairs(
            prompt=data.pairs["prompt"].to_numpy(),
            label=data.pairs["label"].to_numpy(float),
            score_chosen=sides["a"].to_numpy(float),
            score_rejected=sides["b"].to_numpy(float),
            chosen_first=data.pairs["chosen_first"].to_numpy(bool),
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


def write_scorers(folder: Run, opinions: list[Opinion]) -> None:
    """scorers.parquet: every model's scores at its first sigma."""
    tables = []
    for o in opinions:
        data, items = o.scorer.pairs.data, o.scorer.items
        tables.append(
            pd.DataFrame(
                {
                    "dataset": data.name,
                    "scorer": o.ref,
                    "image": [data.images[i].key for i in items[:, 1]],
                    "prompt_id": [data.prompt_ids[p] for p in items[:, 0]],
                    "prompt": [data.prompts[p] for p in items[:, 0]],
                    "sigma": o.sigmas[0],
                    "score": o.scores[:, 0],
                }
            )
        )
    results.write(folder.folder / "scorers.parquet", "scorers", pd.concat(tables), folder.id)


def summarize(config: Bench, data: Preferences, opinions: list[Opinion], calibration: Pairs | None) -> dict[str, Any]:
    """Accuracies and counts; the first model at its first sigma is the headline."""
    first = opinions[0]
    tables = [first.table(data, j) for j in range(len(first.sigmas))]
    protocol = countable(data.protocol, calibrated=calibration is not None)
    head = accuracy(tables[0], protocol, calibration)
    if np.isnan(head.value):
        raise RunError(f"{config.dataset}: no pair counts under {protocol!r}", hint="the data holds only ties")
    every = all_protocols(tables[0], calibration)
    plain = countable(protocol)
    by_sigma = []
    for sigma, table in zip(first.sigmas, tables):
        a = accuracy(table, plain)
        by_sigma.append({"sigma": sigma, "accuracy": a.value, "ci95": list(a.ci95)})
    curve = calibration_curve(tables[0])
    beside = [compare(o, data, plain, tables[0]) for o in opinions]
    return {
        "dataset": config.dataset,
        "split": data.split,
        "protocol": protocol,
        "sigma": first.sigmas[0],
        "n_prompts": head.n_prompts,
        "n_pairs": head.n_pairs,
        "n_ties": head.n_ties,
        "n_predicted_ties": head.n_predicted_ties,
        "n_skipped": head.n_skipped,
        "accuracy": head.value,
        "ci95": list(head.ci95),
        "protocols": {name: a.value for name, a in every.items() if not np.isnan(a.value)},
        "protocols_ci95": {name: list(a.ci95) for name, a in every.items() if not np.isnan(a.value)},
        "by_sigma": by_sigma,
        "scorers": beside,
        "against": next((row for row in beside if row["scorer"] == config.against), None),
        "breakdown": breakdown(data, tables[0], plain),
        "calibration": {
            "ece": curve.ece,
            "bins": [
                {"predicted": float(p), "observed": float(o), "sides": int(n)}
                for p, o, n in zip(curve.predicted, curve.observed, curve.count)
                if n
            ],
        },
        "published": published_beside(config.dataset, protocol),
    }


def compare(opinion: Opinion, data: Preferences, protocol: str, first: Pairs) -> dict[str, Any]:
    """One row of the table of scorers: accuracy, difference from the first on the same pairs, speed, memory."""
    mine = opinion.table(data)
    found, gap = accuracy(mine, protocol), paired_difference(mine, first, protocol)
    looked = len(opinion.scorer.items) * len(opinion.sigmas)
    return {
        "scorer": opinion.ref,
        "sigma": opinion.sigmas[0],
        "accuracy": found.value,
        "ci95": list(found.ci95),
        "difference": gap.value,
        "difference_ci95": list(gap.ci95),
        "p_value": gap.p_value,
        "n_skipped": found.n_skipped,
        "images_per_second": round(looked / max(opinion.seconds, 1e-9), 1),
        "peak_memory_gib": opinion.peak_gib,
    }


def breakdown(data: Preferences, table: Pairs, protocol: str) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by what the data says of its pairs, largest groups first; empty where it says nothing."""
    out: dict[str, list[dict[str, Any]]] = {}
    for title, columns in GROUP_COLUMNS.items():
        known = [data.pairs[c].to_numpy(object) for c in columns if c in data.pairs]
        names = sorted({str(v) for values in known for v in values if not pd.isna(v)})
        if len(names) < 2:
            continue
        rows = []
        for name in names:
            mask = np.any([values == name for values in known], axis=0)
            found = accuracy(table.subset(mask), protocol)
            if not np.isnan(found.value):
                rows.append({"name": name, "n_pairs": found.n_pairs, "accuracy": found.value, "ci95": list(found.ci95)})
        out[title] = sorted(rows, key=lambda row: -row["n_pairs"])
    return out


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
