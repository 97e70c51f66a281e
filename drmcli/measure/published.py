"""Published preference accuracies, to print beside our own. Plain figures with their source; nothing here is measured
by us.

A figure may only be compared with one of ours that was counted by the same protocol. Most sources do not say how they
treat ties or average, and some disagree about the same model on the same data: every figure is a row of its own, and
rows differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published figure."""

    model: str
    dataset: str
    """hpdv2, hpdv3, pickapic or imagereward: the test split."""
    accuracy: float
    """Percent."""
    source: str
    """Where it stands."""
    protocol: str | None
    """Name in `protocols.PROTOCOLS` of how it was counted, by the code or text of its source; None: the source does not
    say."""
    note: str = ""
    """What else keeps it from being compared."""


HPSV3 = "HPSv3 project page, preference accuracy table (https://github.com/MizzenAI/HPSv3)"
HPSV2 = "HPSv2 README (https://github.com/tgxs002/HPSv2)"
MPS = "MPS README (https://github.com/Kwai-Kolors/MPS)"
IMAGEREWARD = "ImageReward, Xu et al. 2023 (https://arxiv.org/abs/2304.05977), test.py of its repository"
PICKAPIC = "Pick-a-Pic dataset card, leaderboard (https://huggingface.co/datasets/yuvalkirstain/pickapic_v1)"
DINA = "DiNa-LRM (https://github.com/HKUST-C4G/diffusion-rm)"
DIT = "DiT-Reward, abstract (https://arxiv.org/abs/2606.23626)"
DRM = "DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026"
LIGHTRFT = "LightRFT, reward model guide (https://github.com/opendilab/LightRFT)"
IMSCORE = "imscore bench.md (https://github.com/RE-N-Y/imscore)"

_OTHER_HPDV2 = "three points or more below the figures of the HPSv2 and HPSv3 authors for the same model"
_UNSTATED = "the authors do not say how ties are counted, nor which version and split of Pick-a-Pic"
_DINA = "the released inference engine counts ties-wrong-micro; that the figure was counted so is not stated"
_IMSCORE_PICK = "Pick-a-Pic v2, ties dropped; PickScore's training data overlaps it"

PUBLISHED: tuple[Published, ...] = (
    Published("CLIP ViT-H/14", "imagereward", 57.1, HPSV3, None),
    Published("CLIP ViT-H/14", "pickapic", 60.8, HPSV3, None, _UNSTATED),
    Published("CLIP ViT-H/14", "hpdv2", 65.1, HPSV3, None),
    Published("CLIP ViT-H/14", "hpdv3", 48.6, HPSV3, "strict"),
    Published("Aesthetic", "imagereward", 57.4, HPSV3, None),
    Published("Aesthetic", "pickapic", 56.8, HPSV3, None, _UNSTATED),
    Published("Aesthetic", "hpdv2", 76.8, HPSV3, None),
    Published("Aesthetic", "hpdv3", 59.9, HPSV3, "strict"),
    Published("ImageReward", "imagereward", 65.1, HPSV3, None),
    Published("ImageReward", "pickapic", 61.1, HPSV3, None, _UNSTATED),
    Published("ImageReward", "hpdv2", 74.0, HPSV3, None),
    Published("ImageReward", "hpdv3", 58.6, HPSV3, "strict"),
    Published("PickScore", "imagereward", 61.6, HPSV3, None),
    Published("PickScore", "pickapic", 70.5, HPSV3, None, _UNSTATED),
    Published("PickScore", "hpdv2", 79.8, HPSV3, None),
    Published("PickScore", "hpdv3", 65.6, HPSV3, "strict"),
    Published("HPS", "imagereward", 61.2, HPSV3, None),
    Published("HPS", "pickapic", 66.7, HPSV3, None, _UNSTATED),
    Published("HPS", "hpdv2", 77.6, HPSV3, None),
    Published("HPS", "hpdv3", 63.8, HPSV3, "strict"),
    Published("HPSv2", "imagereward", 65.7, HPSV3, None),
    Published("HPSv2", "pickapic", 63.8, HPSV3, None, _UNSTATED),
    Published("HPSv2", "hpdv2", 83.3, HPSV3, None),
    Published("HPSv2", "hpdv3", 65.3, HPSV3, "strict"),
    Published("MPS", "imagereward", 67.5, HPSV3, None),
    Published("MPS", "pickapic", 63.1, HPSV3, None, _UNSTATED),
    Published("MPS", "hpdv2", 83.5, HPSV3, None),
    Published("MPS", "hpdv3", 64.3, HPSV3, "strict"),
    Published("HPSv3", "imagereward", 66.8, HPSV3, None),
    Published("HPSv3", "pickapic", 72.8, HPSV3, None, _UNSTATED),
    Published("HPSv3", "hpdv2", 85.4, HPSV3, None),
    Published("HPSv3", "hpdv3", 76.9, HPSV3, "strict"),
    Published("HPSv2.1", "imagereward", 66.8, HPSV2, "imagereward-macro"),
    Published("HPSv2.1", "hpdv2", 84.1, HPSV2, "hpdv2"),
    Published("PickScore", "imagereward", 62.9, HPSV2, "imagereward-macro"),
    Published("PickScore", "hpdv2", 79.8, HPSV2, "hpdv2"),
    Published("single human", "imagereward", 65.3, HPSV2, None),
    Published("single human", "hpdv2", 78.1, HPSV2, None),
    Published("ImageReward", "imagereward", 65.14, IMAGEREWARD, "strict"),
    Published("CLIP", "imagereward", 54.82, IMAGEREWARD, "strict"),
    Published("Aesthetic", "imagereward", 57.35, IMAGEREWARD, "strict"),
    Published("BLIP", "imagereward", 57.76, IMAGEREWARD, "strict"),
    Published("PickScore", "pickapic", 70.2, PICKAPIC, "pickscore-threshold"),
    Published("single human", "pickapic", 68.0, PICKAPIC, None),
    Published("HPS", "pickapic", 66.7, PICKAPIC, "pickscore-threshold"),
    Published("ImageReward", "pickapic", 61.1, PICKAPIC, "pickscore-threshold"),
    Published("CLIP ViT-H/14", "pickapic", 60.8, PICKAPIC, "pickscore-threshold"),
    Published("Aesthetic", "pickapic", 56.8, PICKAPIC, "pickscore-threshold"),
    Published("Aesthetic", "imagereward", 57.4, MPS, "strict"),
    Published("ImageReward", "imagereward", 65.1, MPS, "strict"),
    Published("HPS", "imagereward", 61.2, MPS, "strict"),
    Published("Aesthetic", "hpdv2", 72.6, MPS, "hpdv2", _OTHER_HPDV2),
    Published("ImageReward", "hpdv2", 70.6, MPS, "hpdv2", _OTHER_HPDV2),
    Published("HPS", "hpdv2", 73.1, MPS, "hpdv2", _OTHER_HPDV2),
    Published("DiNa-LRM", "imagereward", 61.75, DINA, None, _DINA),
    Published("DiNa-LRM", "hpdv2", 84.31, DINA, None, _DINA),
    Published("DiNa-LRM", "hpdv3", 75.04, DINA, None, _DINA),
    Published("HPSv3", "imagereward", 67.03, DINA, None, "re-run by the DiNa-LRM authors"),
    Published("HPSv3", "hpdv2", 85.36, DINA, None, "re-run by the DiNa-LRM authors"),
    Published("HPSv3", "hpdv3", 76.03, DINA, None, "re-run by the DiNa-LRM authors"),
    Published("DiT-Reward", "hpdv2", 85.6, DIT, None),
    Published("DiT-Reward", "hpdv3", 77.6, DIT, None),
    Published("DRM", "imagereward", 64.1, DRM, None),
    Published("DRM", "pickapic", 73.4, DRM, None, _UNSTATED),
    Published("DRM", "hpdv2", 82.2, DRM, None),
    Published("DRM", "hpdv3", 74.0, DRM, None),
    Published("Qwen2.5-VL-3B (LightRFT)", "imagereward", 61.37, LIGHTRFT, None),
    Published("Qwen2.5-VL-3B (LightRFT)", "hpdv3", 72.35, LIGHTRFT, None),
    Published("PickScore", "imagereward", 66.7, IMSCORE, None, "ties dropped"),
    Published("HPSv2.1", "imagereward", 67.5, IMSCORE, None, "ties dropped"),
    Published("MPS", "imagereward", 67.8, IMSCORE, None, "ties dropped"),
    Published("ImageReward", "imagereward", 65.8, IMSCORE, None, "ties dropped"),
    Published("PickScore", "pickapic", 80.2, IMSCORE, None, _IMSCORE_PICK),
    Published("HPSv2.1", "pickapic", 69.3, IMSCORE, None, _IMSCORE_PICK),
    Published("MPS", "pickapic", 65.1, IMSCORE, None, _IMSCORE_PICK),
    Published("ImageReward", "pickapic", 60.8, IMSCORE, None, _IMSCORE_PICK),
    Published("PickScore", "hpdv2", 79.2, IMSCORE, None, "ties dropped"),
    Published("HPSv2.1", "hpdv2", 83.3, IMSCORE, None, "ties dropped"),
    Published("MPS", "hpdv2", 83.9, IMSCORE, None, "ties dropped"),
    Published("ImageReward", "hpdv2", 74.0, IMSCORE, None, "ties dropped"),
)


def published(dataset: str, model: str | None = None) -> list[Published]:
    """The figures for a dataset, of one model or of all, best first; empty where there are none."""
    rows = [row for row in PUBLISHED if row.dataset == dataset and model in (None, row.model)]
    return sorted(rows, key=lambda row: -row.accuracy)


def comparable(dataset: str, protocol: str) -> list[Published]:
    """The figures for a dataset that are known to be counted by this protocol, best first."""
    return [row for row in published(dataset) if row.protocol == protocol]
