"""bench, score, show and demo, from end to end on the embedded model."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_pairs
from safetensors.torch import save_file

from drmcli.config import resolve
from drmcli.data.preferences import Preferences
from drmcli.errors import Interrupted, RunError
from drmcli.measure.protocols import Pairs
from drmcli.recipes import bench, bench_tables
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.run import Interruptions, Silent

REAL = Path(__file__).parents[2] / "shared" / "data"
KEYS = {
    "command", "run", "seed", "device", "dtype", "seconds", "dataset", "split", "protocol", "n_prompts", "n_pairs", "n_ties",
    "n_skipped", "accuracy", "ci95", "protocols", "by_sigma", "n_images_scored",
}  # fmt: skip


def run(reward: Path, out: Path, **flags: object) -> dict:
    base = {"reward": str(reward), "out": str(out), "shapes_generated": 0.0}
    return bench.run(resolve("bench", flags=base | flags), Silent())


def ranking(folder: Path, ranks: list[list[int]]) -> Path:
    """A file of rankings whose pictures are those of write_pairs, four a prompt, the first list's shared by all."""
    file = write_pairs(folder, 2)
    rows = [
        {
            "prompt": f"a large red circle {place}",
            "images": ["0-a.png", "0-b.png", "1-a.png", "1-b.png"],
            "ranking": rank,
        }
        for place, rank in zip(("on the left", "on the right", "at the top"), ranks)
    ]
    target = file.with_name("ranking.jsonl")
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_shapes(reward_folder: Path, tmp_path: Path) -> None:
    summary = run(reward_folder, tmp_path / "run", pairs=30, sigmas=[0.25, 0.75])
    assert summary.keys() >= KEYS
    assert summary["n_pairs"] >= 30
    assert [row["sigma"] for row in summary["by_sigma"]] == [0.25, 0.75]
    assert summary["by_sigma"][0]["accuracy"] == summary["accuracy"]
    lo, hi = summary["ci95"]
    assert lo < summary["accuracy"] < hi
    assert (tmp_path / "run" / "accuracy_by_noise.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_tables_carry_schema_and_run(reward_folder: Path, tmp_path: Path) -> None:
    summary = run(reward_folder, tmp_path / "run", pairs=12, sigmas=[0.25, 0.5])
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    for name in ("pairs", "scores"):
        metadata = pq.read_schema(tmp_path / "run" / f"{name}.parquet").metadata
        assert metadata[b"drm_schema"].decode() == f"{name}/1"
        assert metadata[b"drm_run"].decode() == env["run_id"]
    pairs, scores = read(tmp_path / "run" / "pairs.parquet"), read(tmp_path / "run" / "scores.parquet")
    assert len(pairs) == 2 * summary["n_pairs"]
    assert len(scores) == 2 * summary["n_images_scored"]
    by_hand = (pairs["score_chosen"] > pairs["score_rejected"])[pairs["sigma"] == 0.25].mean() * 100
    assert by_hand == pytest.approx(summary["accuracy"])
    known = scores.set_index(["image", "prompt_id", "sigma"])["score"]
    row = pairs.iloc[-1]
    assert known[(row["chosen"], row["prompt_id"], row["sigma"])] == row["score_chosen"]


def test_each_picture_is_encoded_and_scored_once(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pictures under three prompts: 4 encoded, 4 x 3 scored at each of two levels, for 18 pairs of 36 sides."""
    from drmcli.generator import Generator

    count: Counter[str] = Counter()
    encode, score = Generator.encode_images, RewardModel.score

    def counted_encode(self, images, *args):
        count["encoded"] += len(images)
        return encode(self, images, *args)

    def counted_score(self, latents, *args):
        count["scored"] += len(latents)
        return score(self, latents, *args)

    monkeypatch.setattr(Generator, "encode_images", counted_encode)
    monkeypatch.setattr(RewardModel, "forward", counted_score)
    file = ranking(tmp_path / "data", [[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4]])
    cache = str(tmp_path / "cache")
    summary = run(reward_folder, tmp_path / "run", dataset=str(file), sigmas=[0.25, 0.75], cache_dir=cache)
    assert summary["n_pairs"] == 18
    assert count == {"encoded": 4, "scored": 24}
    assert summary["n_images_scored"] == 12
    run(reward_folder, tmp_path / "again", dataset=str(file), sigmas=[0.25], cache_dir=cache)
    assert count["encoded"] == 4


def test_ties_are_counted(reward_folder: Path, tmp_path: Path) -> None:
    """[1, 1, 2, 3] has one tied pair of six, [1, 1, 1, 1] six of six."""
    file = ranking(tmp_path / "data", [[1, 1, 2, 3], [1, 1, 1, 1]])
    summary = run(reward_folder, tmp_path / "run", dataset=str(file), sigmas=[0.25])
    assert (summary["n_pairs"], summary["n_ties"], summary["n_prompts"]) == (12, 7, 2)


def test_a_constant_model(reward_folder: Path, tmp_path: Path) -> None:
    """Equal scores everywhere: 0 % where a tie is wrong, 50 % where it is half."""
    model = RewardModel.from_pretrained(reward_folder)
    with torch.no_grad():
        model.head.score[2].weight.zero_()
    model.save_pretrained(tmp_path / "constant")
    summary = run(tmp_path / "constant", tmp_path / "run", pairs=12, sigmas=[0.25])
    assert summary["accuracy"] == 0
    assert summary["protocols"]["ties-half"] == 50
    assert summary["n_predicted_ties"] == summary["n_pairs"]


def test_interrupted_goes_on(reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"pairs": 30, "sigmas": [0.25, 0.75], "batch_size": 8}
    whole = run(reward_folder, tmp_path / "whole", **flags)
    enter, scored = Interruptions.__enter__, []
    score = bench.PairScorer.score

    def asked(self: Interruptions) -> Interruptions:
        self.asked = True
        return enter(self)

    def counted(self, model, index, *args, **kwargs):
        scored.extend(index.tolist())
        return score(self, model, index, *args, **kwargs)

    monkeypatch.setattr(bench.PairScorer, "score", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Interruptions, "__enter__", asked)
        for _ in range(2):
            with pytest.raises(Interrupted):
                run(reward_folder, tmp_path / "parts", **flags)
    parts = run(reward_folder, tmp_path / "parts", **flags)
    assert sorted(scored) == list(range(whole["n_images_scored"])), "nothing twice, nothing left out"
    assert parts["accuracy"] == whole["accuracy"]
    a, b = read(tmp_path / "whole" / "scores.parquet"), read(tmp_path / "parts" / "scores.parquet")
    assert a.equals(b)
    assert not (tmp_path / "parts" / "partial").exists()


def test_a_damaged_image_leaves_every_denominator(reward_folder: Path, tmp_path: Path) -> None:
    """One of four pictures under three prompts is broken: each prompt keeps 3 of 6 pairs."""
    file = ranking(tmp_path / "data", [[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4]])
    (file.parent / "0-b.png").write_bytes(b"nonsense")
    summary = run(reward_folder, tmp_path / "run", dataset=str(file), sigmas=[0.25], max_bad=30.0)
    assert (summary["n_pairs"], summary["n_skipped"]) == (9, 9)
    assert len(summary["bad_images"]) == 1
    assert summary["bad_images"][0].startswith("0-b.png: ")


@pytest.mark.skipif(not (REAL / "ocean_1.webp").exists(), reason="the real pictures are not there")
def test_real_pictures(tmp_path: Path, drm) -> None:
    """A real ranking of four real pictures runs from end to end; the tiny model's accuracy there means nothing."""
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    names = [f"ocean_{i}.webp" for i in (1, 2, 3, 4)]
    for name in names:
        shutil.copy(REAL / name, tmp_path / name)
    file = tmp_path / "ocean.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "images": names, "ranking": [1, 2, 3, 4]}) + "\n")
    result = drm("bench", "--dataset", file, "--json", "--sigma", "0.25")
    assert result.code == 0, result.err
    assert (result.json["n_pairs"], result.json["n_prompts"]) == (6, 1)
    assert "longer than the text encoders read" in result.err
    scored = drm("score", *(tmp_path / name for name in names), "--prompt", prompt, "--json", "--sigmas", "0,0.5")
    assert len(scored.json["scores"]) == 8


def test_score_command(reward_folder: Path, tmp_path: Path, drm) -> None:
    """A picture and its own clean latents are one at level 0; noisy latents are scored at their own level."""
    file = write_pairs(tmp_path / "data", 1)
    picture, prompt = file.parent / "0-a.png", json.loads(file.read_text())["prompt"]
    model = RewardModel.from_pretrained(reward_folder)
    from PIL import Image

    latents = model.generator().encode_images([Image.open(picture).convert("RGB")])
    save_file({"latents": latents[0].contiguous()}, tmp_path / "clean.safetensors")
    save_file({"latents": latents[0].contiguous()}, tmp_path / "noisy.safetensors", metadata={"sigma": "0.5"})
    paths = [picture, tmp_path / "clean.safetensors", tmp_path / "noisy.safetensors"]
    result = drm("score", *paths, "--prompt", prompt, "--reward", reward_folder, "--sigmas", "0,0.25", "--json")
    assert result.code == 0, result.err
    rows = result.json["scores"]
    assert [row["sigma"] for row in rows] == [0, 0.25, 0, 0.25, 0.5]
    assert rows[0]["score"] == pytest.approx(rows[2]["score"], abs=1e-5)
    cond = model.generator().encode_prompts([prompt])
    assert rows[4]["score"] == pytest.approx(model.score(latents, 0.5, cond).item(), abs=1e-5)


def test_show_reports_any_run(reward_folder: Path, tmp_path: Path, drm) -> None:
    run(reward_folder, tmp_path / "run", pairs=12, sigmas=[0.25, 0.75])
    result = drm("show", tmp_path / "run")
    assert result.code == 0, result.err
    assert "strict" in result.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy_by_noise.png" in page
    assert "<script" not in page


def test_demo_tells_the_whole_story(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps a model, in seconds; the second time it is already told."""
    from drmcli.recipes import demo as recipe

    original = recipe.resolve

    less = {
        "train-reward": {"shapes_prompts": 16, "shapes_generated": 0.0, "eval_pairs": 12},
        "bench": {"shapes_prompts": 16, "shapes_generated": 0.0, "pairs": 12},
        "sample": {"steps": 2},
        "grpo": {
            "steps": 2,
            "prompts_per_update": 2,
            "group_size": 2,
            "eval_prompts": 2,
            "eval_every": 2,
            "min_std": 0.0,
        },
    }

    def small(command: str, flags: dict) -> object:
        fewer = {"prompts": flags["prompts"][:6]} if command == "sample" else {}
        return original(command, flags=flags | less[command] | fewer)

    monkeypatch.setattr(recipe, "resolve", small)
    result = drm("demo", "--steps", "2", "--updates", "2", "--out", tmp_path / "demo", "--json")
    assert result.code == 0, result.err
    page = Path(result.json["report"]).read_text()
    assert page.count("<img") == 3 + 3 * recipe.SHOWN + 4 * recipe.EXAMPLES
    assert np.isfinite(result.json["bench"]["accuracy"])
    again = drm("demo", "--steps", "2", "--updates", "2", "--out", tmp_path / "demo", "--json")
    assert again.json == result.json


def redness(images: list, prompts: list[str]) -> list[float]:
    """A scorer of pictures, named as test_bench:redness."""
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def test_scorers_beside_on_the_same_pairs(reward_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    flags = {"pairs": 40, "sigmas": [0.25], "scorers": ["shapes", "test_bench:redness"], "against": "shapes"}
    summary = run(reward_folder, tmp_path / "run", **flags)
    ours, judge, red = summary["scorers"]
    assert ours["difference"] == 0
    assert judge["accuracy"] == 100  # the judge labelled the held-out pairs, without noise
    assert judge["difference"] == pytest.approx(100 - summary["accuracy"])
    assert summary["against"] == judge
    table = read(tmp_path / "run" / "scorers.parquet")
    each = table[table["scorer"] == "test_bench:redness"].set_index(["image", "prompt_id"])["score"]
    pairs = read(tmp_path / "run" / "pairs.parquet")
    right = [each[(row.chosen, row.prompt_id)] > each[(row.rejected, row.prompt_id)] for row in pairs.itertuples()]
    assert red["accuracy"] == pytest.approx(100 * np.mean(right))


def test_scorers_by_datasets(reward_folder: Path, tmp_path: Path, drm) -> None:
    """Two datasets in one command: a run each, and a table of scorers by datasets."""
    file = ranking(tmp_path / "data", [[1, 2, 3, 4], [4, 3, 2, 1]])
    flags = [
        "bench",
        "--reward",
        reward_folder,
        "--scorer",
        "shapes",
        "--dataset",
        f"shapes,{file}",
        "--pairs",
        "20",
        "--sigma",
        "0.25",
    ]
    result = drm(*flags, "--set", "shapes_generated=0", "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    alone = run(reward_folder, tmp_path / "alone", pairs=20, sigmas=[0.25], scorers=["shapes"])
    assert result.json["datasets"][0]["accuracy"] == alone["accuracy"]
    assert [set(row) - {"scorer"} for row in result.json["table"]] == [{"shapes", str(file)}] * 2
    assert result.json["accuracy"] == min(d["accuracy"] for d in result.json["datasets"])
    assert (tmp_path / "run" / "ranking" / "pairs.parquet").exists()
    assert "100.00 %" in drm(*flags, "--set", "shapes_generated=0", "--out", tmp_path / "run").out


def test_scorers_alone(tmp_path: Path) -> None:
    summary = run(Path("none"), tmp_path / "run", pairs=20, scorers=["shapes"])
    assert summary["reward"] == "shapes"
    assert summary["accuracy"] == 100
    assert len(read(tmp_path / "run" / "pairs.parquet")) == summary["n_pairs"]


def test_a_damaged_picture_leaves_every_scorer(reward_folder: Path, tmp_path: Path) -> None:
    """It is named and counted, and its pairs leave the denominators of all."""
    file = ranking(tmp_path / "data", [[1, 2, 3, 4], [4, 3, 2, 1]])
    (file.parent / "1-a.png").write_bytes(b"")
    flags = {"dataset": str(file), "scorers": ["shapes"], "max_bad": 30, "sigmas": [0.25]}
    summary = run(reward_folder, tmp_path / "run", **flags)
    assert [row["n_skipped"] for row in summary["scorers"]] == [6, 6]
    assert summary["n_pairs"] == 6
    assert "1-a.png" in summary["bad_images"][0]
    alone = run(Path("none"), tmp_path / "alone", **flags)
    assert (alone["n_pairs"], alone["n_skipped"], len(alone["bad_images"])) == (6, 6, 1)
    assert summary["scorers"][1]["accuracy"] == alone["accuracy"]
    with pytest.raises(RunError, match="1 of 4 images cannot be read"):
        run(Path("none"), tmp_path / "strict", **flags | {"max_bad": 1})


def test_scoring_pictures_goes_on_after_an_interruption(tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C while the third batch is scored; no picture is scored twice."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_bench

    batches: list[int] = []
    plainly = test_bench.redness

    def counted(images: list, prompts: list[str]) -> list[float]:
        batches.append(len(images))
        if len(batches) == 3:
            signal.raise_signal(signal.SIGINT)
        return plainly(images, prompts)

    flags = {"pairs": 40, "batch_size": 8, "scorers": ["test_bench:redness"]}
    plain = run(Path("none"), tmp_path / "plain", **flags)
    monkeypatch.setattr(test_bench, "redness", counted)
    with pytest.raises(Interrupted):
        run(Path("none"), tmp_path / "run", **flags)
    summary = run(Path("none"), tmp_path / "run", **flags)
    assert sum(batches) == summary["n_images_scored"]
    assert summary["accuracy"] == plain["accuracy"]


def test_breakdown_and_calibration() -> None:
    """Two styles with hand-counted accuracies; a pair counts for both models that drew it."""
    data = Preferences(
        name="x", split="test", protocol="strict", images=[], prompts=["a"], prompt_ids=["a"],
        pairs=pd.DataFrame(
            {
                "pair_id": list("abcd"), "prompt": 0, "chosen": 0, "rejected": 1, "label": 1.0, "weight": 1.0,
                "chosen_first": True, "category": ["photo", "photo", "photo", "anime"],
                "source_chosen": ["m", "m", "n", "n"], "source_rejected": ["n", "o", "o", "m"],
            }
        ),
    )  # fmt: skip
    table = Pairs(
        prompt=np.zeros(4), label=np.ones(4), score_chosen=np.array([1.0, 0.0, 1.0, 0.0]),
        score_rejected=np.array([0.0, 1.0, 0.0, 1.0]), chosen_first=np.ones(4, bool),
    )  # fmt: skip
    found = bench_tables.breakdown(data, table, "strict")
    assert [(r["name"], r["n_pairs"], round(r["accuracy"], 1)) for r in found["category"]] == [
        ("photo", 3, 66.7), ("anime", 1, 0.0),
    ]  # fmt: skip
    assert {r["name"]: (r["n_pairs"], round(r["accuracy"], 1)) for r in found["model"]} == {
        "m": (3, 33.3), "n": (3, 66.7), "o": (2, 50.0),
    }  # fmt: skip
    assert "source" not in found
