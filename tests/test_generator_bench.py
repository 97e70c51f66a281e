"""The benchmark of a generator: GenEval's rules computed a second time, what the detector must not do, and runs that are cut short."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.data.prompts import holds_prompts_only
from drmcli.errors import InputError, Interrupted
from drmcli.measure.detect import RENAMED, Mask2Former, ShapesDetector, check_labels
from drmcli.measure.geneval import COLORS, TASKS, Clause, Detection, Item, evaluate, read_metadata, summarize
from drmcli.recipes import bench
from drmcli.results import read
from drmcli.run import Interruptions, Silent
from drmcli.tiny import tasks

REAL = Path(__file__).parents[2] / "shared" / "data" / "geneval_metadata.jsonl"
COCO_80 = """person bicycle car motorbike aeroplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench
bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball
kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich
orange broccoli carrot hot_dog pizza donut cake chair sofa pottedplant bed diningtable toilet tvmonitor laptop mouse remote keyboard
cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"""
"""Classes in the words of the label file that 80-class detectors of transformers carry."""


# --- the rules, a second time ---------------------------------------------------------------------------------------------


def by_the_book(item: Item, detections: list[Detection]) -> bool:
    """GenEval's verdict in plain scalar arithmetic, from the description of its rules alone."""
    bar = 0.9 if item.tag == "counting" else 0.3
    groups: dict[str, list[Detection]] = {}
    for name in {d.label for d in detections}:
        groups[name] = sorted((d for d in detections if d.label == name and d.score > bar), key=lambda d: -d.score)[:16]
    verdict, matched = True, []
    for clause in item.include:
        mine = groups.get(clause.label, [])[: clause.count]
        fine = len(mine) == clause.count
        if fine and clause.color:
            fine = sum(d.color == clause.color for d in mine) == clause.count
        if fine and clause.position:
            word, number = clause.position
            fine = matched[number] is not None and all(is_there(word, a, b) for a in mine for b in matched[number])
        matched.append(mine if fine else None)
        verdict = verdict and fine
    return verdict and all(len(groups.get(c.label, [])) < c.count for c in item.exclude)


def is_there(word: str, a: Detection, b: Detection) -> bool:
    """Is a `word` b? The gap of the centres less a tenth of both sides, over the distance of the centres, is beyond a half."""
    gaps, kept = [], []
    for axis in (0, 1):
        gap = (a.box[axis] + a.box[axis + 2]) / 2 - (b.box[axis] + b.box[axis + 2]) / 2
        sides = (a.box[axis + 2] - a.box[axis]) + (b.box[axis + 2] - b.box[axis])
        gaps.append(gap)
        kept.append(math.copysign(max(abs(gap) - 0.1 * sides, 0.0), gap))
    if max(abs(k) for k in kept) < 1e-3:
        return False
    x, y = (k / math.hypot(*gaps) for k in kept)
    return {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[word]


def some_item(rng: np.random.Generator, tag: str) -> Item:
    """A prompt of a task over few classes and colours, so that chance often makes it right."""
    a, b = (str(x) for x in rng.choice(["dog", "cat", "car"], 2, replace=False))
    one, two = (str(x) for x in rng.choice(COLORS[:2], 2))
    count = int(rng.integers(2, 5))
    relation = str(rng.choice(["left of", "right of", "above", "below"]))
    return {
        "single_object": Item(tag, "", (Clause(a, 1),)),
        "two_object": Item(tag, "", (Clause(a, 1), Clause(b, 1))),
        "counting": Item(tag, "", (Clause(a, count),), (Clause(a, count + 1),)),
        "colors": Item(tag, "", (Clause(a, count - 1, one),)),
        "position": Item(tag, "", (Clause(b, 1), Clause(a, 1, position=(relation, 0)))),
        "color_attr": Item(tag, "", (Clause(a, 1, one), Clause(b, 1, two))),
    }[tag]


def some_detections(rng: np.random.Generator, most: int) -> list[Detection]:
    """Boxes on a coarse grid (offsets of zero, equal centres and touching sides happen), no two of one score."""
    n = int(rng.integers(0, most))
    scores = rng.permutation(np.linspace(0.05, 0.999, 200))[:n] ** float(rng.choice([1.0, 0.1]))
    found = []
    for score in scores:
        x, y = (int(v) * 10 for v in rng.integers(0, 8, 2))
        w, h = (int(v) * 10 for v in rng.integers(1, 6, 2))
        label, color = str(rng.choice(["dog", "cat", "car"])), str(rng.choice(COLORS[:2]))
        found.append(Detection(label, float(score), (x, y, x + w, y + h), color=color))
    return found


@pytest.mark.parametrize("tag", TASKS)
def test_every_task_against_a_second_computation(tag: str) -> None:
    rng, verdicts = np.random.default_rng(TASKS.index(tag)), []
    for _ in range(600):
        item, found = some_item(rng, tag), some_detections(rng, 14 if tag == "counting" else 8)
        verdict, reason = evaluate(item, found, lambda objects, label: [o.color or "" for o in objects])
        assert verdict == by_the_book(item, found), (item, found)
        assert bool(reason) is not verdict
        verdicts.append(verdict)
    assert 20 < sum(verdicts) < 580, "both verdicts must be seen"


@pytest.mark.skipif(not REAL.exists(), reason="the published prompts are not there")
def test_the_published_overall_over_the_real_prompts() -> None:
    """Four pictures a prompt whose verdicts are drawn: tasks are means over pictures, the overall is the mean over the six."""
    items, rng = read_metadata(REAL), np.random.default_rng(0)
    tags = [i.tag for i in items for _ in range(4)]
    prompts = [n for n in range(len(items)) for _ in range(4)]
    correct = [bool(x) for x in rng.random(len(tags)) < 0.3]
    found = summarize(tags, prompts, correct)
    shares = [[c for t, c in zip(tags, correct) if t == task] for task in TASKS]
    assert [t["n"] for t in found["tasks"]] == [320, 396, 320, 376, 400, 400]
    assert [t["accuracy"] for t in found["tasks"]] == pytest.approx([100 * sum(s) / len(s) for s in shares])
    assert found["overall"] == pytest.approx(sum(100 * sum(s) / len(s) for s in shares) / 6)
    assert (found["n_prompts"], found["n_images"]) == (553, 2212)
    assert found["correct_prompts"] == pytest.approx(100 * np.reshape(correct, (-1, 4)).any(1).mean())
    assert all(t["ci95"][0] < t["accuracy"] < t["ci95"][1] for t in found["tasks"])


# --- the detector -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="the published prompts are not there")
def test_the_detectors_words_are_all_the_prompts_words() -> None:
    """80 classes in the detector's spelling become exactly the 80 that the published prompts ask for."""
    words = [RENAMED.get(w, w) for w in (word.replace("_", " ") for word in COCO_80.split())]
    asked = {c.label for item in read_metadata(REAL) for c in (*item.include, *item.exclude)}
    assert len(words) == len(set(words)) == 80
    assert set(words) == asked


def test_a_class_that_the_detector_does_not_know() -> None:
    check_labels(ShapesDetector(), ["circle", "square", "circle"])
    with pytest.raises(InputError, match="--detector shapes: knows no bench, dog"):
        check_labels(ShapesDetector(), ["dog", "circle", "bench"])


@pytest.fixture
def finder(tmp_path: Path, generator_folder: Path) -> Mask2Former:
    """A Mask2Former and a CLIP of random weights in their published layouts, with the published processor's 384 x 384."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )  # fmt: skip

    torch.manual_seed(1)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5,
        id2label={0: "dog", 1: "sofa"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "detector")
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(tmp_path / "detector")
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(text_config=part | {"vocab_size": 400}, vision_config=part | {"image_size": 16, "patch_size": 8})
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    tokenizer = CLIPTokenizer.from_pretrained(generator_folder / "tokenizer")
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(tmp_path / "clip")
    return Mask2Former(str(tmp_path / "detector"), str(tmp_path / "clip"), device=torch.device("cpu"), least=0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_what_cannot_count_is_not_kept(finder: Mask2Former) -> None:
    """A mask of a large picture is a megabyte, and there are up to 100 of them: those below the threshold are dropped."""
    every = finder.detect([noise(40, 40)])[0]
    assert len(every) > 3
    finder.least = sorted(d.score for d in every)[2]
    kept = finder.detect([noise(40, 40)])[0]
    assert sorted(d.score for d in kept) == pytest.approx(sorted(d.score for d in every)[3:])
    assert {d.label for d in every} == {"dog", "couch"}


def test_pictures_of_several_sizes_at_once(finder: Mask2Former) -> None:
    """Padding to the largest of a batch is taken off again: every mask has its picture's size and spans it as it does alone."""
    pictures = [noise(64, 64), noise(64, 96)]
    together = finder.detect(pictures)
    for picture, found in zip(pictures, together):
        assert found
        for d in found:
            assert d.mask.shape == (picture.height, picture.width)
            ys, xs = np.nonzero(d.mask)
            assert d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    half = finder._of_one(
        torch.tensor([[5.0, 0.0, 0.0]]),
        torch.where(torch.arange(8)[None, None] < 2, 9.0, -9.0).expand(1, 8, 8),  # left quarter of a padded map
        (32, 32), (32, 16), (100, 200),
    )  # fmt: skip
    assert half[0].box == pytest.approx((0, 0, 50, 200), abs=4), "a quarter of the padded is half of the picture"


# --- runs ---------------------------------------------------------------------------------------------------------------------


def flags(out: Path, **more: object) -> object:
    return resolve("bench", flags={"out": str(out), "steps": 2, "num_images": 2, "dataset": "geneval"} | more)


def test_cut_short_while_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn before the interruption is not drawn again, and the end is that of an unbroken run."""
    monkeypatch.setattr(tasks.items, "__defaults__", (3,))
    whole = bench.run(flags(tmp_path / "a"), Silent())
    with monkeypatch.context() as patch:
        patch.setattr(Interruptions, "__enter__", lambda self: setattr(self, "asked", True) or self)
        with pytest.raises(Interrupted):
            bench.run(flags(tmp_path / "b"), Silent())
    first = {f: f.stat().st_mtime_ns for f in (tmp_path / "b").rglob("drawn-geneval/images/*.png")}
    assert 0 < len(first) < whole["n_images"]
    resumed = bench.run(flags(tmp_path / "b"), Silent())
    assert {f: f.stat().st_mtime_ns for f in first} == first
    assert resumed["tasks"] == whole["tasks"]
    pictures = [sorted((tmp_path / x / "images").rglob("*.png")) for x in "ab"]
    assert len(pictures[0]) == len(pictures[1]) == whole["n_images"]
    for mine, theirs in zip(*pictures):
        assert mine.relative_to(tmp_path / "a") == theirs.relative_to(tmp_path / "b")
        assert (np.asarray(Image.open(mine)) == np.asarray(Image.open(theirs))).all()
    home = tmp_path / "a" / "images" / "00001"
    item = json.loads((home / "metadata.jsonl").read_text())
    text = Image.open(home / "samples" / "0001.png").text
    assert (text["prompt"], text["seed"]) == (item["prompt"], "1")


def test_a_damaged_picture_leaves_every_denominator(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.items, "__defaults__", (3,))
    whole = bench.run(flags(tmp_path / "a"), Silent())
    (tmp_path / "a" / "images" / "00000" / "samples" / "0000.png").write_bytes(b"no picture")
    command = ["bench", "--dataset", "geneval", "--images", tmp_path / "a" / "images"]
    refused = drm(*command, "--out", tmp_path / "b")
    assert refused.code == 1
    assert "0000.png" in refused.err
    found = drm(*command, "--max-bad", "10", "--batch-size", "1", "--out", tmp_path / "c", "--json").json
    assert (found["n_skipped"], found["n_images"]) == (1, whole["n_images"] - 1)
    assert found["tasks"][0]["n"] == whole["tasks"][0]["n"] - 1
    assert found["tasks"][1:] == whole["tasks"][1:]
    assert found["generator"] is None, "who drew the pictures of a folder is not known"
    table = read(tmp_path / "c" / "geneval.parquet")
    assert len(table) == whole["n_images"]
    assert table.loc[table["correct"].isna(), "path"].str.endswith("00000/samples/0000.png").tolist() == [True]


def test_lists_of_pictures_are_no_prompts(tmp_path: Path) -> None:
    """Published preference lists and a pair with its columns misspelt are not drawn anew."""
    for entry in (
        {"prompt": "a cat", "image_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]},
        {"prompt": "a cat", "generations": ["images/a.webp"], "ranking": [1]},
        {"prompt": "a cat", "winner": "a.PNG", "loser": "b.JPG"},
    ):
        (tmp_path / "list.json").write_text(json.dumps([entry]))
        assert not holds_prompts_only(tmp_path / "list.json"), entry
    (tmp_path / "list.json").write_text(json.dumps([{"id": "1", "prompt": "a cat in cat.png"}]))
    assert holds_prompts_only(tmp_path / "list.json")
