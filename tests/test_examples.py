"""The examples and the README's Python run, small."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_pairs
from PIL import Image

from drmcli.config import resolve
from drmcli.data.datasets import read
from drmcli.recipes import grpo
from drmcli.run import Silent

ROOT = Path(__file__).parents[1]


def run(name: str, *args: object, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_scores_from_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pictures for one caption; what was asked for comes first at the clean level."""
    run("score_in_python.py", monkeypatch=monkeypatch)
    clean = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(clean) == 3
    assert max(clean) == clean[0]


def test_stepwise_in_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    run("stepwise_in_diffusers.py", monkeypatch=monkeypatch)
    with Image.open("stepwise.png") as picture:
        assert picture.size == (32, 32)


def test_readme_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder with a picture and twelve pairs under the names that the page uses."""
    write_pairs(tmp_path, 12)
    Image.open("0-a.png").save("picture.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    whole = [block for block in blocks if "import" in block]
    assert whole
    for block in whole:
        exec(compile(block, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
    assert Path("runs/python/reward/model.safetensors").is_file()


def test_comparison_of_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [tmp_path, "--prompts", 2, "--seeds", 2, "--only", "k=2 CPS a=0.9"]
    run("studies/compare_sampling.py", *args, monkeypatch=monkeypatch)
    rows = pd.read_parquet(tmp_path / "comparison-guidance-1.parquet").set_index("way")
    assert len(rows) == 3
    # 10 steps, 9 of them with 2 candidates for 2/3 of a generator's cost each, and the final score.
    assert rows.loc["step-wise k=2 CPS a=0.9", "cost"] == pytest.approx(10 + (18 + 1) * 2 / 3)
    assert "best-of-3 ODE" in capsys.readouterr().out


def test_comparison_at_equal_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best-of-N is always there; costs count the shared first forward; between N and N + 1 the rival is their mixture."""
    args = [
        tmp_path,
        "--prompts",
        1,
        "--seeds",
        1,
        "--bed",
        "two-objects-6-steps",
        "--split",
        "val",
        "--only",
        "oracle best-of-3",
        "beam of 2",
    ]
    made = run("studies/compare_sampling.py", *args, monkeypatch=monkeypatch)
    rows = pd.read_parquet(tmp_path / "comparison-guidance-1-two-objects-6-steps-val-0.parquet").set_index("way")
    assert set(rows.index) == {*(f"best-of-{n}" for n in range(1, 7)), "oracle best-of-3", "beam of 2"}
    for n in range(1, 7):
        assert rows.loc[f"best-of-{n}", "cost"] == pytest.approx(1 + 5 * n + n * 2 / 3)
    assert rows.loc["oracle best-of-3", "judge"] >= rows.loc["best-of-3", "judge"]
    assert "less best-of-N at equal cost" in capsys.readouterr().out
    low, high = ({"cost": c, "judge": np.array([j])} for c, j in ((10, 0.5), (20, 0.9)))
    assert made["at_equal_cost"]({"cost": 15}, [low, high], "judge") == pytest.approx([0.7])
    assert made["at_equal_cost"]({"cost": 25}, [low, high], "judge") is None


def test_times_of_the_comparison_of_alignment() -> None:
    """A judge of 0.5, 0.7, 0.6 at 0, 10 and 20 seconds: 0.6 is reached half-way to the second point, 0.8 never."""
    made = runpy.run_path(str(ROOT / "examples" / "studies" / "compare_alignment.py"), run_name="example")
    summary = {"history": [{"seconds": s, "judge": j} for s, j in ((0, 0.5), (10, 0.7), (20, 0.6))]}
    assert made["reached"](summary, 0.6) == pytest.approx(5)
    assert made["reached"](summary, 0.5) == 0
    assert made["reached"](summary, 0.8) == float("inf")
    assert made["at_time"](summary, 15) == pytest.approx(0.65)


def test_the_comparison_of_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Tables from runs that are there already: a run that has its summary is not run again."""
    for way, after in (("flow-grpo", 0.6), ("nft-step", 0.8)):
        history = [{"seconds": s, "judge": j, "reward": s} for s, j in ((0.0, 0.5), (10.0, after))]
        summary = {"history": history, "updates": 1, "judge_before": 0.5, "judge_after": after, "diversity_before": 0.4}
        summary |= {"diversity_after": 0.3, "diversity_flawless_before": None, "diversity_flawless_after": 0.2}
        (tmp_path / f"{way}-0.001-0").mkdir()
        (tmp_path / f"{way}-0.001-0" / "summary.json").write_text(json.dumps(summary))
    run("studies/compare_alignment.py", tmp_path, "--seeds", 1, "--rates", "1e-3", "--ways", "flow-grpo", "nft-step",
        monkeypatch=monkeypatch)  # fmt: skip
    shown = capsys.readouterr().out
    assert "flow-grpo at half of its time (5 s): judge 0.550" in shown
    rows = pd.read_parquet(tmp_path / "alignment.parquet").set_index("way")
    assert rows.loc["nft-step", "diversity"] == pytest.approx(0.75)
    assert rows.loc["nft-step", "best"] == 0.8
    assert (tmp_path / "curves.png").exists()


def test_the_default_against_the_best_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The same run under two names: they draw the same, so the difference is 0."""
    flags = {"out": str(tmp_path / "step-grpo-0.001-0"), "updates": 1, "prompts_per_update": 2, "group_size": 2, "steps": 3,
             "lora_rank": 2, "eval_prompts": 2, "eval_seeds": 2, "on_hacking": "ignore", "min_std": 0.0}  # fmt: skip
    grpo.run(resolve("grpo", flags=flags), Silent())
    shutil.copytree(tmp_path / "step-grpo-0.001-0", tmp_path / "nft-0.001-0")
    run("studies/compare_alignment.py", tmp_path, "--seeds", 1, "--rates", "1e-3", "--ways", "step-grpo", "nft", "--captions", 2,
        monkeypatch=monkeypatch)  # fmt: skip
    shown = capsys.readouterr().out
    assert "step-grpo less nft, judge of 8 pictures of 2 test captions" in shown
    assert "= +0.0000 (+0.0000 to +0.0000)" in shown


def test_every_study_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share code with each other and use the package's; most are too long to run here."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    for path in sorted((ROOT / "examples" / "studies").glob("*.py")):
        assert (runpy.run_path(str(path), run_name="example")["__doc__"] or "").strip(), path


def test_the_dataset_of_the_overhead_is_in_the_published_layout(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "examples" / "studies" / "overhead.py"), run_name="example")
    made["write_hpdv2"](tmp_path / "hpdv2", prompts=3)
    data = read("hpdv2", data_dir=tmp_path / "hpdv2")
    assert (len(data.prompts), len(data.images), len(data)) == (3, 27, 3 * 36)


def test_every_ratio_of_the_overhead_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runpy.run_path(str(ROOT / "examples" / "studies" / "overhead.py"), run_name="example")
    made["step_ratio"](tmp_path, steps=7)
    made["sampling_ratio"](pictures=2, repeats=1)
    made["update_ratio"](tmp_path, repeats=1)
    ratios = [float(text) for text in re.findall(r"ratio ([0-9.]+) ", capsys.readouterr().out)]
    assert len(ratios) == 4 and all(0 < ratio < 100 for ratio in ratios), ratios


def test_the_study_of_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four parts on a transformer of two narrow blocks: passes are counted, memory is about what was planned, tables are kept."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import random_pipeline

    parts = random_pipeline.published(random_pipeline.MODEL)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
    smaller = {
        "transformer": {"num_attention_heads": 2, "pos_embed_max_size": 16, "caption_projection_dim": 128, "joint_attention_dim": 96,
                        "pooled_projection_dim": 64},
        "text_encoder": narrow, "text_encoder_2": narrow, "vae": {"block_out_channels": [32, 32, 32, 32]},
    }  # fmt: skip
    monkeypatch.setattr(random_pipeline, "published", lambda ref: {n: p | smaller.get(n, {}) for n, p in parts.items()})
    args = ["--full-size", "--depth", 2, "--resolution", 64, "--out", tmp_path / "out"]
    run("studies/overhead.py", *args, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "CPU, reduced: 2 of 24 blocks, 64 px" in shown and "measured / counted" in shown
    found = json.loads((tmp_path / "out" / "full-size.json").read_text())
    # 4 steps with guidance are 8 passes; k candidates at three of them and the end are scored.
    passes = [(row["k"], row["generator_passes"], row["reward_passes"]) for row in found["sampling"]]
    assert passes == [(1, 8, 1), (2, 8, 7), (4, 8, 13), (6, 8, 19)]
    rows = pd.read_parquet(tmp_path / "out" / "full-size.parquet").set_index("what")
    assert len(rows) == 8 and (rows["seconds"] > 0).all() and (rows["flops"] > 0).all()
    for what in ("training step, 4 pairs", "encoding 2 pictures", "sampling, 4 steps, k = 6"):
        assert rows.loc[what, "bytes"] == pytest.approx(rows.loc[what, "planned_bytes"], rel=0.35), what


def test_configs_of_the_memory_plan(tmp_path: Path) -> None:
    """SD3.5-Medium: 2.24 billion parameters and a buffer of 0.23 billion positions, 2.5 in all; 2.0 in 21 of its 24 blocks."""
    from drmcli.config import resolve
    from drmcli.recipes import grpo, train_reward

    made = runpy.run_path(str(ROOT / "examples" / "studies" / "plan_sd35.py"), run_name="example")
    made["write_configs"](tmp_path)
    flags = {"generator": str(tmp_path / "sd35"), "dtype": "bf16"}
    memory = train_reward.plan(resolve("train-reward", preset="sd35-medium", flags=flags))["memory"]
    assert memory["parameters"] - memory["trained"] == pytest.approx(2.0e9, rel=0.02)
    aligned = resolve(
        "grpo", preset="sd35-medium", flags=flags | {"reward": str(tmp_path / "reward"), "prompts": "shapes"}
    )
    memory = grpo.plan(aligned)["memory"]
    assert memory["parameters"] - memory["trained"] == pytest.approx(2.243e9, rel=0.001)
    assert memory["total_checkpointed"] < 24 * 2**30
    assert "text_encoder_3" not in memory["beside"]


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered from outside; the search with it draws the very picture of the embedded pipeline, which it is but for a sign."""
    from drmcli.config import resolve
    from drmcli.recipes import sample
    from drmcli.run import Silent

    made = run("own_family.py", monkeypatch=monkeypatch)
    flags = {"prompts": ["a large red circle above a small blue square"], "mode": "stepwise", "out": "runs/embedded"}
    sample.run(resolve("sample", flags=flags), Silent())
    assert made["Turned"].name == "turned"
    with Image.open("runs/turned/images/000000.png") as a, Image.open("runs/embedded/images/000000.png") as b:
        assert a.tobytes() == b.tobytes()


def test_a_small_million_of_pairs(tmp_path: Path) -> None:
    """The stages of the study, but for the one of memory, in this process."""
    made = runpy.run_path(str(ROOT / "examples" / "studies" / "million_pairs.py"), run_name="example")
    made["make"](tmp_path, 300, 40, 60)
    assert made["stage_read"](tmp_path) == {"pairs": 300}
    first = made["stage_start"](tmp_path)
    assert first == {"pictures": 60, "prompts": 40}
    assert made["stage_restart"](tmp_path)["encoders loaded"] == 0
    assert made["stage_step"](tmp_path)["seconds"] < 60
