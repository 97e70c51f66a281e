"""The figures of the paper: DRM, Zhang et al., CVPR 2026, arXiv 2605.25661. Published values, none measured by us."""

from __future__ import annotations

DATASETS = ("imagereward", "hpdv2", "pickapic", "hpdv3")
"""Test sets of preferences, in the order of the paper's table."""
ACCURACY = {"imagereward": 64.1, "hpdv2": 82.2, "pickapic": 73.4, "hpdv3": 74.0}
"""Accuracy in percent of the published model."""
RANDOM_START = {"pickapic": 57.5, "hpdv2": 65.0, "hpdv3": 59.3}
"""The same architecture from random weights, after one epoch."""
BY_SIGMA = {0.0: 74.0, 0.75: 65.1}
"""Accuracy on HPDv3 by sigma (the paper's t / 1000)."""
SCORERS = ("imagereward", "pickscore", "hpsv3")
"""Scorers of drawn pictures, in the order of the tables below."""
ALIGNED = {
    "before": (1.01, 16.76, 8.95),
    "pickscore, flow-grpo": (1.14, 16.94, 9.64),
    "hpsv3, flow-grpo": (1.15, 16.90, 9.71),
    "drm, flow-grpo": (1.14, 16.95, 10.07),
    "drm, step-grpo": (1.17, 17.04, 10.28),
}
"""Mean ImageReward, PickScore and HPSv3 of pictures, by reward and algorithm."""
GENEVAL = 78.0
"""GenEval overall in percent after Step-GRPO."""
SAMPLING = {
    1: (2.88, 1.01, 16.76, 8.95, 0.650),
    2: (5.63, 1.08, 16.84, 9.02, 0.661),
    4: (7.75, 1.14, 16.81, 9.32, 0.663),
    6: (9.83, 1.15, 16.93, 9.49, 0.662),
}
"""Step-wise Sampling by k: seconds a picture, ImageReward, PickScore, HPSv3, LPIPS diversity."""
