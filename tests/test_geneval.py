"""GenEval: counting rules on hand-made detections, a small Mask2Former and CLIP, and the whole benchmark of a generator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.data.prompts import holds_prompts_only, read_prompts
from drmcli.errors import InputError, Interrupted, MissingError
from drmcli.measure.detect import SIZE, Mask2Former, ShapesDetector
from drmcli.measure.geneval import TASKS, Clause, Detection, Item, evaluate, read_metadata, relations, summarize
from drmcli.recipes import bench
from drmcli.results import read
from drmcli.run import Interruptions, Silent
from drmcli.tiny import tasks, world

REAL = Path(__file__).parents[2] / "shared" / "data" / "geneval_metadata.jsonl"


def at(label: str, x: float, y: float, score: float = 0.95, color: str = "red", side: float = 10) -> Detection:
    """A detection with its centre at x, y."""
    return Detection(label, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), color=color)


def right(item: Item, *found: Detection) -> bool:
    return evaluate(item, found, lambda objects, label: [o.color or "" for o in objects])[0]


def test_single_and_two_objects() -> None:
    dog, both = Clause("dog", 1), Item("two_object", "", (Clause("dog", 1), Clause("cat", 1)))
    assert right(Item("single_object", "", (dog,)), at("dog", 0, 0), at("cat", 9, 9))
    assert not right(Item("single_object", "", (dog,)), at("cat", 0, 0))
    assert not right(Item("single_object", "", (dog,)), at("dog", 0, 0, score=0.3)), (
        "the threshold itself is not enough"
    )
    assert right(Item("single_object", "", (dog,)), at("dog", 0, 0, score=0.31))
    assert right(both, at("dog", 0, 0), at("cat", 0, 0))
    assert not right(both, at("dog", 0, 0), at("dog", 30, 0))


def test_counting_is_exact_and_asks_for_more_confidence() -> None:
    """Two clocks: at least two, fewer than three; a third one of 0.8 does not count, since counting asks for 0.9."""
    item = Item("counting", "", (Clause("clock", 2),), (Clause("clock", 3),))
    two = [at("clock", 0, 0), at("clock", 30, 0)]
    assert right(item, *two)
    assert not right(item, two[0])
    assert not right(item, *two, at("clock", 60, 0))
    assert right(item, *two, at("clock", 60, 0, score=0.8))
    assert not right(item, two[0], at("clock", 30, 0, score=0.85))


def test_colors_look_at_the_surest_object_alone() -> None:
    item = Item("colors", "", (Clause("car", 1, "blue"),))
    blue, red = at("car", 0, 0, 0.9, "blue"), at("car", 30, 0, 0.8, "red")
    assert right(item, red, blue)
    assert not right(item, at("car", 0, 0, 0.7, "blue"), red)


def test_color_attributes_need_both() -> None:
    item = Item("color_attr", "", (Clause("apple", 1, "black"), Clause("cup", 1, "green")))
    assert right(item, at("apple", 0, 0, color="black"), at("cup", 30, 0, color="green"))
    assert not right(item, at("apple", 0, 0, color="green"), at("cup", 30, 0, color="black"))


def test_position() -> None:
    """`a dog right of a bear`: the bear is the first clause, the dog is placed against it."""
    item = Item("position", "", (Clause("bear", 1), Clause("dog", 1, position=("right of", 0))))
    assert right(item, at("bear", 0, 0), at("dog", 30, 0))
    assert not right(item, at("bear", 30, 0), at("dog", 0, 0))
    assert not right(item, at("bear", 0, 0), at("dog", 0, 30))
    assert not right(item, at("dog", 30, 0)), "no bear to be right of"


def test_relations_by_hand() -> None:
    """Sides of 10: each axis of the offset loses 0.1 x (10 + 10) = 2 pixels, and is compared with half of its length.

    (30, 0): 28 / 30 is right of. (30, 30): 28 / 42.4 = 0.66 in both. (2, 0): nothing is left. (30, 16): y is 14 / 34 = 0.41.
    """
    origin = at("a", 0, 0)
    assert relations(at("b", 30, 0), origin) == {"right of"}
    assert relations(at("b", 30, -30), origin) == {"right of", "above"}
    assert relations(at("b", 2, 0), origin) == set()
    assert relations(at("b", -30, 16), origin) == {"left of"}
    assert relations(at("b", 0, 30), origin) == {"below"}


def test_sixteen_of_a_class_at_most() -> None:
    item = Item("counting", "", (Clause("bird", 17),))
    assert not right(item, *(at("bird", 20 * i, 0) for i in range(20)))


def test_overall_is_the_mean_over_tasks() -> None:
    """Tasks of 4 and 1 pictures with 1 and 1 right: (25 + 100) / 2, where pictures alone would give 40."""
    found = summarize(["colors"] * 4 + ["position"], [0, 0, 1, 1, 2], [True, False, False, False, True])
    assert found["overall"] == pytest.approx(62.5)
    assert found["correct_images"] == pytest.approx(40)
    assert found["correct_prompts"] == pytest.approx(200 / 3)
    assert [t["task"] for t in found["tasks"]] == ["colors", "position"]


@pytest.mark.skipif(not REAL.exists(), reason="the published prompts are not there")
def test_the_published_prompts() -> None:
    """553 prompts; for each, detections made of its own clauses are right, and nothing at all is wrong."""
    items = read_metadata(REAL)
    assert len(items) == 553
    assert {i.tag for i in items} == set(TASKS)
    places = {"left of": (-50, 0), "right of": (50, 0), "above": (0, -50), "below": (0, 50)}
    for item, line in zip(items, REAL.read_text().splitlines()):
        assert item.to_dict() == json.loads(line)
        found = []
        for clause in item.include:
            x, y = places[clause.position[0]] if clause.position else (0, 0)
            found += [
                at(clause.label, x + 20 * i * (clause.count > 1), y, color=clause.color or "")
                for i in range(clause.count)
            ]
        assert right(item, *found), item
        assert not right(item), item


def test_damaged_metadata(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    for text, fact in (("{", "cannot be read"), ('{"tag": "x"}', "line 1: not GenEval"), ("", "holds no prompt"),
                       ('{"tag": "x", "prompt": "y", "include": [{"class": "a", "count": 1}]}', "none of GenEval's")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match=fact):
            read_metadata(file)


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "tag": "x"}\n"two"\n')
    (tmp_path / "c.json").write_text('["one", "two"]')
    for name in ("a.txt", "b.jsonl", "c.json"):
        assert read_prompts(tmp_path / name) == ["one", "two"]
        assert holds_prompts_only(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "one", "chosen": "a.png", "rejected": "b.png"}\n')
    assert not holds_prompts_only(tmp_path / "pairs.jsonl")
    (tmp_path / "bad.json").write_text('[{"text": "one"}]')
    with pytest.raises(InputError, match="entry 1 has no prompt"):
        read_prompts(tmp_path / "bad.json")


def test_the_worlds_own_eye_sees_clean_pictures_right() -> None:
    items = tasks.items(10)
    pictures = [Image.fromarray(p) for p in world.draw([i.prompt for i in items], np.random.default_rng(0))]
    eye = ShapesDetector()
    found = eye.detect(pictures)
    right_ones = [
        evaluate(i, f, lambda o, label, p=p: eye.colors(p, o, label))[0] for i, f, p in zip(items, found, pictures)
    ]
    assert np.mean(right_ones) == 1
    mixed = [
        evaluate(i, f, lambda o, label: [x.color or "" for x in o])[0] for i, f in zip(items, found[1:] + found[:1])
    ]
    assert np.mean(mixed) < 0.5
    larger = eye.detect([pictures[0].resize((64, 96))])[0][0].box
    assert larger == pytest.approx(tuple(np.array(found[0][0].box) * (2, 3, 2, 3)), abs=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> tuple[Path, Path]:
    """A Mask2Former and a CLIP of random weights in their published layouts."""
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

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=3,
        id2label={0: "dog", 1: "mouse", 2: "cat"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(root / "detector")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(root / "detector")
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 400,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(root / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(generator_folder / "tokenizer")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(root / "clip")
    return root / "detector", root / "clip"


def test_mask2former_against_its_own_outputs(models: tuple[Path, Path]) -> None:
    """Scores, boxes and masks of the detections, computed a second time query by query."""
    finder = Mask2Former(str(models[0]), str(models[1]), device=torch.device("cpu"), least=0)
    assert finder.labels == ["dog", "computer mouse", "cat"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8))
    found = finder.detect([picture, picture.rotate(180)])[0]
    with torch.no_grad():
        inputs = finder.processor(images=[picture], size=SIZE, return_tensors="pt")["pixel_values"]
        out = finder.model(inputs)
    assert min(inputs.shape[2:]) == 800
    by_hand = {}
    for q in range(5):
        mask = out.masks_queries_logits[:, q : q + 1]
        for size in (inputs.shape[2:], (48, 40)):
            mask = torch.nn.functional.interpolate(mask, size=size, mode="bilinear")
        mask = mask[0, 0]
        if not (mask > 0).any():
            continue
        sure = float(mask[mask > 0].sigmoid().mean())
        for k, label in enumerate(finder.labels):
            chance = float(out.class_queries_logits[0, q].softmax(-1)[k])
            by_hand[label, round(sure * chance, 4)] = (mask > 0).numpy()
    assert len(found) == len(by_hand)
    for d in found:
        mask = by_hand[d.label, round(d.score, 4)]
        assert (mask == d.mask).mean() > 0.99
        ys, xs = np.nonzero(d.mask)
        assert d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    colors = finder.colors(picture, found[:2], "dog")
    assert len(colors) == min(2, len(found))


def test_a_detector_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="--detector"):
        Mask2Former(str(tmp_path / "none"), "x/y", device=torch.device("cpu"))


def flags(out: Path, **more: object) -> object:
    return resolve("bench", flags={"out": str(out), "steps": 2, "num_images": 2} | more)


def test_geneval_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws, lays out, evaluates; the folder that it leaves gives the same figures again; an interruption loses nothing."""
    monkeypatch.setattr(tasks.items, "__defaults__", (3,))
    whole = bench.run(flags(tmp_path / "a", dataset="geneval"), Silent())
    assert whole["n_images"] == 2 * whole["n_prompts"]
    assert whole["tasks_left_out"] == ["counting"]
    assert whole["accuracy"] == whole["overall"]
    assert len(read(tmp_path / "a" / "geneval.parquet")) == whole["n_images"]
    again = bench.run(flags(tmp_path / "b", dataset="geneval", images=str(tmp_path / "a" / "images")), Silent())
    assert again["tasks"] == whole["tasks"]

    monkeypatch.setattr(Interruptions, "__enter__", lambda self: setattr(self, "asked", True) or self)
    with pytest.raises(Interrupted):
        bench.run(
            flags(tmp_path / "c", dataset="geneval", images=str(tmp_path / "a" / "images"), batch_size=8), Silent()
        )
    monkeypatch.undo()
    resumed = bench.run(
        flags(tmp_path / "c", dataset="geneval", images=str(tmp_path / "a" / "images"), batch_size=8), Silent()
    )
    assert resumed["tasks"] == whole["tasks"]


def test_geneval_needs_its_prompts(tmp_path: Path, drm) -> None:
    result = drm("bench", "--dataset", "geneval", "--detector", "x/y", "--out", tmp_path / "run")
    assert result.code == 3
    assert "evaluation_metadata.jsonl" in result.err
    empty = drm("bench", "--dataset", "geneval", "--images", tmp_path, "--out", tmp_path / "other")
    assert empty.code == 2
    assert "--images" in empty.err


def test_a_generator_before_and_after_a_lora(tmp_path: Path, drm, reward_folder: Path) -> None:
    """The same prompts and seeds; pictures of an interrupted run are not drawn again; the table says which wins."""
    aligned = ["--updates", "1", "--lr", "0.05", "--steps", "2", "--reward", reward_folder, "--group-size", "2"]
    sets = ["--set", "prompts_per_update=2", "--set", "eval_prompts=2", "--set", "min_std=0"]
    assert drm("grpo", *aligned, *sets, "--on-hacking", "ignore", "--out", tmp_path / "grpo").code == 0
    (tmp_path / "p.txt").write_text("\n".join(world.captions("test")[:3]))
    command = [
        "bench",
        "--dataset",
        tmp_path / "p.txt",
        "--reward",
        reward_folder,
        "--scorer",
        "shapes",
        "--steps",
        "2",
    ]
    command += ["--num-images", "2", "--lora", tmp_path / "grpo" / "lora-last", "--out", tmp_path / "run"]
    result = drm(*command, "--json")
    assert result.code == 0, result.err
    rows = {row["scorer"]: row for row in result.json["scorers"]}
    assert set(rows) == {str(reward_folder), "shapes"}
    table = read(tmp_path / "run" / "generated.parquet")
    assert len(table) == 2 * 2 * 6
    mine = table[table["scorer"] == "shapes"]
    before, after = (
        mine[mine["lora"] == x].set_index(["prompt", "seed"])["score"]
        for x in ("", str(tmp_path / "grpo" / "lora-last"))
    )
    assert rows["shapes"]["difference"] == pytest.approx((after - before).mean())
    assert rows["shapes"]["win_rate"] == pytest.approx(100 * ((np.sign(after - before) + 1) / 2).mean())
    assert (tmp_path / "run" / "before_after.png").exists()
    assert set(result.json["diversity"]) == {"before", "after"}
    shown = drm(*command)
    assert "wins" in shown.out
    refused = drm("bench", "--dataset", tmp_path / "p.txt", "--fail-under", "50", "--out", tmp_path / "x")
    assert refused.code == 2
