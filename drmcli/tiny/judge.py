"""The judge of the embedded world: a pixel-space score of any picture against its caption.

It plays the human: it labels preference pairs, and it is the yardstick that no reward model is trained on directly.
It knows the world's rules and nothing of any model. Four parts, each in [0, 1]:

- `objects`     soft IoU of each wanted colour's mask with the ideal shape at the place where that colour is found
- `shape`       how clearly the mask is the wanted shape rather than one of the others
- `position`    is it where the caption says, or the two in the right relation
- `cleanliness` everything else is plain background

Dimension letters as in `world`: B pictures, O = 2 objects, S shapes, H = W = 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drmcli.tiny import world

WEIGHTS = {"objects": 0.40, "shape": 0.15, "position": 0.20, "cleanliness": 0.25}


@dataclass
class Verdict:
    """Scores of a batch: `score` [B] in [0, 1] and its parts, [B] each."""

    score: np.ndarray
    objects: np.ndarray
    shape: np.ndarray
    position: np.ndarray
    cleanliness: np.ndarray


def judge(images: np.ndarray, texts: list[str]) -> Verdict:
    """Score pictures against captions.

    images: uint8 [B, 32, 32, 3]; texts: B captions of the world (InputError for other text). 1 is a clean picture of
    what was asked, 0 a blank one.
    """
    captions = [world.parse(text) for text in texts]
    x = images.astype(np.float32) / 255.0
    b = len(captions)
    wanted = np.array([[t.color for t in c.things] + [c.things[0].color] * (2 - len(c.things)) for c in captions])
    color = world.COLOR_TABLE[np.vectorize(world.COLOR_NAMES.index)(wanted)]  # [B, O, 3]
    shape = np.array([[world.SHAPES.index(t.shape) for t in c.things] + [0] * (2 - len(c.things)) for c in captions])
    size = np.array(
        [[world.RADII.get(t.size or "", 0.0) for t in c.things] + [0.0] * (2 - len(c.things)) for c in captions]
    )
    real = np.array([[True, len(c.things) == 2] for c in captions])  # [B, O] is this object asked for?

    mask, distance = _color_masks(x, color)
    area, centroid = _where(mask)
    presence = np.clip(area / 20.0, 0, 1)
    radius = np.where(size > 0, size, np.clip(np.sqrt(area / np.pi), 3.0, 9.0))

    # Likeness to all shapes with the found area, for the shape part; to the wanted shape and size, for the object part.
    likeness = _likeness(mask, area, centroid)  # [B, O, S]
    odds = np.exp((likeness - likeness.max(-1, keepdims=True)) / 0.04)
    shape_part = np.take_along_axis(odds / odds.sum(-1, keepdims=True), shape[..., None], -1)[..., 0] * presence
    ideal = _templates(shape, centroid, radius, scale_triangle=False)
    object_part = np.clip(_iou(mask, ideal) / 0.85, 0, 1)

    position = np.array([_position(c, centroid[i], presence[i]) for i, c in enumerate(captions)], dtype=np.float32)

    # What is left when the wanted objects are taken away should be plain background.
    union = np.clip(np.where(real[..., None, None], np.maximum(mask, ideal), 0).max(1), 0, 1)  # [B, H, W]
    grown = np.pad(union, ((0, 0), (1, 1), (1, 1)))
    grown = np.max([grown[:, i : i + world.SIZE, j : j + world.SIZE] for i in range(3) for j in range(3)], axis=0)
    dirt = np.abs(x - world.BACKGROUND).max(-1) * (1 - grown)
    inside = np.where(real[..., None, None], ideal * np.clip(distance - 0.1, 0, 1), 0).sum(1)
    ripple = (dirt + inside).sum((-1, -2)) / (world.SIZE * world.SIZE)
    # A stray blob of a wanted colour, far from its template, is dirt as well: too many objects.
    stray = (np.clip(mask - ideal, 0, 1) * real[..., None, None]).sum((1, 2, 3)) / (world.SIZE * world.SIZE)
    found = np.where(real, presence, 1).min(1)
    cleanliness = np.exp(-12.0 * np.clip(ripple - 0.012, 0, None) - 6.0 * np.clip(stray - 0.03, 0, None)) * found

    def mean(part: np.ndarray) -> np.ndarray:
        return (part * real).sum(1) / real.sum(1)

    objects, shapes = mean(object_part), mean(shape_part)
    parts = {"objects": objects, "shape": shapes, "position": position, "cleanliness": cleanliness}
    score = sum(WEIGHTS[name] * value for name, value in parts.items())
    assert score.shape == (b,)
    return Verdict(score=score, **parts)


@dataclass
class Found:
    """A shape that is seen in a picture."""

    shape: str
    color: str
    score: float
    """How much it looks like that shape, 0 to 1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, pixels."""


def find(images: np.ndarray) -> list[list[Found]]:
    """The shape of each colour that is there, without a caption. images: uint8 [B, 32, 32, 3]."""
    x = images.astype(np.float32) / 255.0
    mask, _ = _color_masks(
        x, np.broadcast_to(world.COLOR_TABLE, (len(x), *world.COLOR_TABLE.shape))
    )  # [B, colours, H, W]
    area, centroid = _where(mask)
    likeness = _likeness(mask, area, centroid)  # [B, colours, S]
    out: list[list[Found]] = [[] for _ in images]
    for b, c in zip(*np.nonzero(area >= 20)):
        solid = mask[b, c] > 0.5
        if not solid.any():
            continue
        ys, xs = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        best = int(likeness[b, c].argmax())
        box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
        out[b].append(Found(world.SHAPES[best], world.COLOR_NAMES[c], float(likeness[b, c, best]), box))
    return out


def _color_masks(x: np.ndarray, color: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft masks [B, O, H, W] of colours [B, O, 3] in pictures x, and the distances they are from.

    Full within 0.18 of the colour, nothing beyond 0.42 or where another colour is nearer.
    """
    palette = np.concatenate([world.COLOR_TABLE, np.full((1, 3), world.BACKGROUND, dtype=np.float32)])
    nearest = np.linalg.norm(x[:, :, :, None] - palette, axis=-1).min(-1)  # [B, H, W]
    distance = np.linalg.norm(x[:, None] - color[:, :, None, None], axis=-1)  # [B, O, H, W]
    return np.clip((0.42 - distance) / 0.24, 0, 1) * np.clip(1 - (distance - nearest[:, None]) / 0.1, 0, 1), distance


def _where(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area [B, O] and centroid [B, O, 2] of masks."""
    area = mask.sum((-1, -2))
    return area, np.einsum("bohw,hwc->boc", mask, world._GRID) / np.maximum(area, 1e-6)[..., None]


def _likeness(mask: np.ndarray, area: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """IoU [B, O, S] of masks with each shape of the same area at the same place."""
    every = np.arange(len(world.SHAPES))
    templates = _templates(every[None, None], centroid[:, :, None], np.sqrt(np.maximum(area, 20) / np.pi)[..., None])
    return _iou(mask[:, :, None], templates)


# Area of each shape drawn with radius 1: pi, (2 * 0.886)^2, 0.5 * 2.3 * 2; and its centroid below the box's middle.
_AREA = np.array([np.pi, (2 * 0.886) ** 2, 2.3], dtype=np.float32)
_DROP = np.array([0.0, 0.0, 1 / 3], dtype=np.float32)


def _templates(shape: np.ndarray, centroid: np.ndarray, radius: np.ndarray, scale_triangle: bool = True) -> np.ndarray:
    """Ideal masks [..., H, W] whose centroid is given; radius is that of the circle of equal area if scale_triangle."""
    shape, radius = np.broadcast_arrays(shape, radius)
    r = radius * np.sqrt(np.pi / _AREA[shape]) if scale_triangle else radius
    center = np.broadcast_to(centroid, (*shape.shape, 2)).copy()
    center[..., 1] -= _DROP[shape] * r
    return world.coverage(shape, center, r)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(a, b).sum((-1, -2)) / np.maximum(np.maximum(a, b).sum((-1, -2)), 1e-6)


def _position(caption: world.Caption, centroid: np.ndarray, presence: np.ndarray) -> float:
    """1 in the right place or relation, falling to 0 over a few pixels; times the presence of what is asked for."""
    if caption.relation:
        (ax, ay), (bx, by) = world.RELATIONS[caption.relation]
        want = np.array([ax - bx, ay - by]) / 14.4
        gap = centroid[0] - centroid[1]
        along = float(gap @ want)
        across = float(np.abs(gap - along * want).max())
        return float(np.clip((along - 1) / 6, 0, 1) * np.clip(1.5 - across / 8, 0, 1) * presence.min())
    if caption.place is None:
        return float(presence[0])
    away = np.linalg.norm(centroid[0] - np.array(world.PLACES[caption.place]))
    return float(np.clip(1 - (away - 3) / 5, 0, 1) * presence[0])
