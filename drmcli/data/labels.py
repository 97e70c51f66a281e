"""From scores of a prompt's pictures to preference pairs: gaps in spreads, soft labels, ties, weights. No models, no torch.

Dimension letters: P prompts, K pictures a prompt, S scorers, N = P K (K - 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Labelled:
    """Pairs [N] of positions among all pictures; `first` is not the better one by rule."""

    first: np.ndarray
    second: np.ndarray
    label: np.ndarray
    """Probability that first is better, or one vote of it; 0.5 is a tie."""
    weight: np.ndarray


def spread(scores: np.ndarray) -> float:
    """Pooled standard deviation within a prompt of scores [P, K]: what tells its pictures apart, whatever the prompts differ by."""
    return float(np.sqrt(scores.var(axis=1, ddof=1).mean()))


def combined(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Scores [S, P, K] of several scorers as one [P, K] of spread 1: each less its prompt's mean and divided by its spread,
    weighted, summed, divided again.

    A scorer that tells nothing apart (spread 0) adds nothing; where none does, all are 0.
    """
    total = np.zeros(scores.shape[1:])
    for one, weight in zip(scores, weights, strict=True):
        apart = spread(one)
        if apart > 1e-9 * np.abs(one).max():
            total += weight * (one - one.mean(axis=1, keepdims=True)) / apart
    apart = spread(total)
    return total / apart if apart > 1e-6 * np.abs(weights).sum() else np.zeros_like(total)


def pairs(
    scores: np.ndarray,
    *,
    labels: str,
    temperature: float,
    tie_gap: float,
    weight_by_gap: bool,
    rng: np.random.Generator,
) -> Labelled:
    """All pairs of each prompt's pictures from scores [P, K] of spread 1.

    P(first is better) = 1 / (1 + exp(-gap / temperature)), Bradley-Terry's. labels: soft, drawn or hard; see `config.DataMake`.
    """
    count = scores.shape[1]
    i, j = np.triu_indices(count, 1)
    first = (np.arange(len(scores))[:, None] * count + i).ravel()
    second = (np.arange(len(scores))[:, None] * count + j).ravel()
    gap = (scores[:, i] - scores[:, j]).ravel()
    probability = 1 / (1 + np.exp(-np.clip(gap / temperature, -50, 50)))
    if labels == "soft":
        label = probability
    elif labels == "drawn":
        label = (rng.random(len(gap)) < probability).astype(float)
    else:
        label = np.where(gap == 0, 0.5, (gap > 0).astype(float))
    label = np.where(np.abs(gap) < tie_gap, 0.5, label)
    weight = np.ones(len(gap))
    if weight_by_gap:
        decided = np.abs(2 * probability - 1)
        weight = decided / decided.mean() if decided.mean() > 0 else weight
    return Labelled(first, second, label, weight)
