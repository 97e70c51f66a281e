"""The embedded world: captions of coloured shapes, pictures of them with human-like flaws.

A caption is `a large red circle on the left` or `a small blue square above a large green triangle`. Pictures are
32 x 32 RGB, drawn from signed distance functions for a whole batch at once (NumPy, no loop over pictures).
`drmcli.tiny.judge` is the other half: it scores any picture against its caption.

Dimension letters: B pictures, O objects in a picture (2, the second may be absent), H = W = 32 pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from drmcli.errors import InputError

SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.14, 0.66, 0.28),
    "blue": (0.16, 0.34, 0.88),
    "yellow": (0.95, 0.80, 0.12),
    "purple": (0.58, 0.22, 0.74),
    "black": (0.10, 0.10, 0.12),
}
COLOR_NAMES = tuple(COLORS)
COLOR_TABLE = np.array([COLORS[name] for name in COLOR_NAMES], dtype=np.float32)
RADII = {"large": 6.8, "small": 4.4}
SIZES = tuple(RADII)
PLACES: dict[str, tuple[float, float]] = {
    "in the center": (16.0, 16.0),
    "on the left": (8.5, 16.0),
    "on the right": (23.5, 16.0),
    "at the top": (16.0, 8.5),
    "at the bottom": (16.0, 23.5),
}
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "above": ((16.0, 8.8), (16.0, 23.2)),
    "below": ((16.0, 23.2), (16.0, 8.8)),
    "left of": ((8.8, 16.0), (23.2, 16.0)),
    "right of": ((23.2, 16.0), (8.8, 16.0)),
}
BACKGROUND = 0.93
SPLITS = ("train", "val", "test")
FLAWS = (
    "color", "shape", "size", "place", "count", "framing",
    "tint", "clutter", "wobble", "off-color", "blur", "noise",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of a caption. `size` is None where the caption does not say."""

    size: str | None
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}" if self.size else f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """A parsed caption: one thing and perhaps its place, or two things and their relation."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    def __str__(self) -> str:
        if self.relation:
            return f"{self.things[0]} {self.relation} {self.things[1]}"
        return f"{self.things[0]} {self.place}" if self.place else str(self.things[0])


_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_ONE = re.compile(rf"^{_THING}(?: ({'|'.join(PLACES)}))?\.?$")
_TWO = re.compile(rf"^{_THING} ({'|'.join(RELATIONS)}) {_THING}\.?$")


def parse(text: str) -> Caption:
    """Read a caption of the world. Sizes and the place may be left out.

    Raises InputError for any other text: the judge can only judge what it can read.
    """
    words = " ".join(text.lower().split())
    if one := _ONE.match(words):
        size, color, shape, place = one.groups()
        return Caption((Thing(size, color, shape),), place=place)
    if two := _TWO.match(words):
        a, relation, b = two.groups()[:3], two.group(4), two.groups()[4:]
        return Caption((Thing(*a), Thing(*b)), relation=relation)
    raise InputError(
        f"caption: the embedded world has no words for {text!r}",
        hint="write it like `a large red circle above a small blue square` or `a small green triangle on the left`",
    )


@cache
def captions(split: str) -> tuple[str, ...]:
    """All captions of a split (train 80 %, val 10 %, test 10 %), in a fixed shuffled order.

    The split is a hash of the text, so it never changes and no caption is in two of them.
    """
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is not a split of shapes", hint=f"use one of {', '.join(SPLITS)}")
    things = [Thing(*words) for words in itertools.product(SIZES, COLORS, SHAPES)]
    every = [Caption((thing,), place=place) for thing in things for place in PLACES]
    every += [
        Caption((a, b), relation=relation)
        for a, b in itertools.product(things, things)
        if a.color != b.color  # two things of one colour could not be told apart by the judge
        for relation in RELATIONS
    ]
    digests = [(hashlib.sha256(str(caption).encode()).digest(), str(caption)) for caption in every]
    bounds = {"train": (0, 205), "val": (205, 230), "test": (230, 256)}[split]
    return tuple(text for digest, text in sorted(digests) if bounds[0] <= digest[-1] < bounds[1])


@dataclass
class Scene:
    """What is drawn, for a whole batch. Lengths in pixels, colours in [0, 1]."""

    shape: np.ndarray
    """[B, O] index into SHAPES."""
    color: np.ndarray
    """[B, O, 3]."""
    center: np.ndarray
    """[B, O, 2] x, y of the middle of the bounding box."""
    radius: np.ndarray
    """[B, O]."""
    present: np.ndarray
    """[B, O] 0 or 1."""
    wobble: np.ndarray
    """[B, O, 3] amplitude (share of the radius), frequency, phase of the outline."""
    background: np.ndarray
    """[B, 3]."""
    clutter: np.ndarray
    """[B, 5, 6] x, y, radius, r, g, b of small specks; radius 0 is none."""
    blur: np.ndarray
    """[B] share of a 3 x 3 box blur applied twice, 0 to 1."""
    noise: np.ndarray
    """[B] standard deviation of pixel noise."""


_GRID = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), axis=-1).astype(np.float32)  # [H,W,2] x,y


def signed_distance(shape: np.ndarray, center: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside. shape [...], center [..., 2], radius [...] -> [..., H, W] pixels.

    Circle of the radius; square of half side 0.89 radius (equal area); upright triangle with a bounding box of 2.3 x 2
    radii, its centre in the middle of the box.
    """
    d = _GRID - center[..., None, None, :]
    dx, dy, r = d[..., 0], d[..., 1], radius[..., None, None]
    circle = np.hypot(dx, dy) - r
    square = np.maximum(np.abs(dx), np.abs(dy)) - 0.886 * r
    # Slanted sides from the apex (0, -r) to the corners (+-1.15 r, r): unit normal (2, -1.15) / |.|
    slant = (2.0 * np.abs(dx) - 1.15 * (dy + r)) / np.hypot(2.0, 1.15)
    triangle = np.maximum(slant, dy - r)
    s = shape[..., None, None]
    return np.where(s == 0, circle, np.where(s == 1, square, triangle))


def coverage(shape: np.ndarray, center: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Anti-aliased mask in [0, 1] of the ideal shape, [..., H, W]."""
    return np.clip(0.5 - signed_distance(shape, center, radius), 0.0, 1.0)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a batch. Returns uint8 [B, H, W, 3]. `rng` gives the pixel noise only."""
    distance = signed_distance(scene.shape, scene.center, scene.radius)
    d = _GRID - scene.center[..., None, None, :]
    angle = np.arctan2(d[..., 1], d[..., 0])
    amplitude, frequency, phase = (scene.wobble[..., i, None, None] for i in range(3))
    distance = distance + amplitude * scene.radius[..., None, None] * np.sin(frequency * angle + phase)
    alpha = np.clip(0.5 - distance, 0, 1) * scene.present[..., None, None]

    image: np.ndarray = np.broadcast_to(scene.background[:, None, None, :], (len(alpha), SIZE, SIZE, 3)).astype(
        np.float32
    )
    for o in range(alpha.shape[1]):
        image = image + alpha[:, o, ..., None] * (scene.color[:, o, None, None, :] - image)
    for c in range(scene.clutter.shape[1]):
        x = scene.clutter[:, c]
        speck = np.hypot(_GRID[..., 0] - x[:, 0, None, None], _GRID[..., 1] - x[:, 1, None, None]) - x[:, 2, None, None]
        mask = np.clip(0.5 - speck, 0, 1) * (x[:, 2, None, None] > 0)
        image = image + mask[..., None] * (x[:, None, None, 3:] - image)
    soft = image
    for _ in range(2):
        p = np.pad(soft, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        rows = (p[:, :-2] + p[:, 1:-1] + p[:, 2:]) / 3
        soft = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3
    image = image + scene.blur[:, None, None, None] * (soft - image)
    grain = rng.standard_normal(image.shape, dtype=np.float32) * scene.noise[:, None, None, None].astype(np.float32)
    return np.clip((image + grain) * 255 + 0.5, 0, 255).astype(np.uint8)


def clean_scene(texts: list[str], rng: np.random.Generator) -> Scene:
    """Scenes that show what their captions say, with a little freedom in place and size."""
    parsed = [parse(text) for text in texts]
    b = len(parsed)
    shape, color = np.zeros((b, 2), dtype=np.int64), np.zeros((b, 2), dtype=np.int64)
    center, radius, present = np.zeros((b, 2, 2)), np.ones((b, 2)), np.zeros((b, 2))
    for i, caption in enumerate(parsed):  # a loop over captions' words, not over pixels
        spots = RELATIONS[caption.relation] if caption.relation else (PLACES[caption.place or "in the center"],)
        for o, (thing, spot) in enumerate(zip(caption.things, spots)):
            shape[i, o] = SHAPES.index(thing.shape)
            color[i, o] = COLOR_NAMES.index(thing.color)
            center[i, o] = spot
            radius[i, o] = RADII[thing.size or "large"]
            present[i, o] = 1
    center += rng.uniform(-1, 1, center.shape)
    radius *= rng.uniform(0.95, 1.05, radius.shape)
    return Scene(
        shape=shape,
        color=COLOR_TABLE[color],
        center=center.astype(np.float32),
        radius=radius.astype(np.float32),
        present=present.astype(np.float32),
        wobble=np.zeros((b, 2, 3), dtype=np.float32),
        background=np.full((b, 3), BACKGROUND, dtype=np.float32),
        clutter=np.zeros((b, 5, 6), dtype=np.float32),
        blur=np.zeros(b, dtype=np.float32),
        noise=np.zeros(b, dtype=np.float32),
    )


def add_flaws(scene: Scene, flaws: np.ndarray, rng: np.random.Generator) -> Scene:
    """Spoil scenes as people's pictures are spoilt. flaws: bool [B, len(FLAWS)], which flaw hits which picture.

    "count" removes an object (of two) or adds a second one (to one); "place" moves an object or swaps the two.
    """
    b = len(scene.shape)
    has = {name: flaws[:, i] for i, name in enumerate(FLAWS)}
    who = np.where(scene.present[:, 1] > 0, rng.integers(0, 2, b), 0)  # the object that is hit
    hit = np.zeros((b, 2), dtype=bool)
    hit[np.arange(b), who] = True
    two = scene.present.sum(1) > 1

    def on(name: str) -> np.ndarray:
        return hit & has[name][:, None]

    other = COLOR_TABLE[rng.integers(0, len(COLORS), (b, 2))]
    color = np.where(on("color")[..., None], other, scene.color)
    shifted = np.clip(color + rng.uniform(-0.3, 0.3, color.shape), 0, 1)
    color = np.where(on("off-color")[..., None], shifted, color)
    shape = np.where(on("shape"), (scene.shape + rng.integers(1, 3, (b, 2))) % len(SHAPES), scene.shape)
    factor = np.where(scene.radius > 5.5, rng.uniform(0.5, 0.75, (b, 2)), rng.uniform(1.35, 1.8, (b, 2)))
    radius = np.where(on("size"), scene.radius * factor, scene.radius)
    moved = rng.uniform(6, SIZE - 6, (b, 2, 2))
    center = np.where((on("place") & ~two[:, None])[..., None], moved, scene.center)
    swap = (has["place"] & two)[:, None, None]
    center = np.where(swap, center[:, ::-1], center)
    edge = np.where(center > SIZE / 2, SIZE - rng.uniform(-1, 3, center.shape), rng.uniform(-1, 3, center.shape))
    axis = np.abs(center - SIZE / 2) >= np.abs(center - SIZE / 2).max(-1, keepdims=True)
    center = np.where(on("framing")[..., None] & axis, edge, center)
    present = np.where(on("count") & two[:, None], 0, scene.present)
    extra = has["count"] & ~two
    present = np.where(extra[:, None], 1, present)
    shape[extra, 1], color[extra, 1] = shape[extra, 0], color[extra, 0]
    radius[extra, 1] = radius[extra, 0] * 0.8
    away = rng.uniform(5, SIZE - 5, (b, 2))
    center[extra, 1] = away[extra]

    wobble = scene.wobble.copy()
    wobble[..., 0] = on("wobble") * rng.uniform(0.12, 0.3, (b, 2))
    wobble[..., 1] = rng.integers(3, 8, (b, 2))
    wobble[..., 2] = rng.uniform(0, 2 * np.pi, (b, 2))
    tint = rng.uniform(0.45, 1.0, (b, 3)) * BACKGROUND
    background = np.where(has["tint"][:, None], tint, scene.background)
    specks = np.concatenate(
        [rng.uniform(1, SIZE - 1, (b, 5, 2)), rng.uniform(0.7, 2.4, (b, 5, 1)), rng.uniform(0, 1, (b, 5, 3))], axis=-1
    )
    specks[..., 2] *= rng.random((b, 5)) < 0.7
    clutter = np.where(has["clutter"][:, None, None], specks, scene.clutter)
    return replace(
        scene,
        shape=shape,
        color=color.astype(np.float32),
        center=center.astype(np.float32),
        radius=radius.astype(np.float32),
        present=present.astype(np.float32),
        wobble=wobble,
        background=background.astype(np.float32),
        clutter=clutter.astype(np.float32),
        blur=np.where(has["blur"], rng.uniform(0.6, 1.0, b), scene.blur).astype(np.float32),
        noise=np.where(has["noise"], rng.uniform(0.05, 0.16, b), scene.noise).astype(np.float32),
    )


def draw(texts: list[str], rng: np.random.Generator, *, flawed: float = 0.0) -> np.ndarray:
    """Pictures for captions, uint8 [B, H, W, 3]; a share `flawed` of them gets one to three random flaws."""
    scene = clean_scene(texts, rng)
    if flawed > 0:
        rank = rng.random((len(texts), len(FLAWS))).argsort(1)
        count = np.where(rng.random(len(texts)) < flawed, rng.choice([1, 2, 3], len(texts), p=[0.5, 0.3, 0.2]), 0)
        scene = add_flaws(scene, rank < count[:, None], rng)
    return render(scene, rng)
