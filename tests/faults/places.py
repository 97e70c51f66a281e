"""Paths, places and what the environment says: told with the flag, the file or the variable, before a run begins."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import fault

SMALL = "--set shapes_prompts=4 --set shapes_generated=0 --set eval_pairs=4 --batch-size 4"
TRAIN = f"train-reward --steps 1 {SMALL}"
HOME = {"HOME": "/proc/of-drm"}
"""A home folder that cannot be: what is told with it was looked for there."""


def picture(*names: str) -> Callable[[Path], None]:
    """Writes pictures."""

    def make(folder: Path) -> None:
        from PIL import Image

        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), "red").save(folder / name)

    return make


def parquet(name: str) -> Callable[[Path], None]:
    """Writes a Parquet file of pairs."""

    def make(folder: Path) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        cells: dict[str, list[Any]] = {"prompt": ["a red circle"], "chosen": [], "rejected": []}
        for side, color in (("chosen", "red"), ("rejected", "blue")):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), color).save(buffer, "PNG")
            cells[side].append(buffer.getvalue())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            pq.write_table(pa.table(cells), file)

    return make


def aligned(folder: Path) -> None:
    """Writes r, what a finished run of grpo leaves."""
    import json

    import torch
    from safetensors.torch import save_file

    from drmcli import config as configs

    (folder / "r" / "lora").mkdir(parents=True)
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, folder / "r" / "lora" / "pytorch_lora_weights.safetensors")
    (folder / "r" / "config.yaml").write_text(configs.to_yaml(configs.resolve("grpo"), "grpo"))
    figures = {"reward_before": 1.0, "reward_after": 2.0, "reward_gain_ci95": [0.5, 1.5], "judge_before": None}
    summary = {"command": "grpo", "updates": 9, "best_update": 7} | figures
    (folder / "r" / "summary.json").write_text(json.dumps(summary))


HOMES = [
    fault(
        "cache below ~ of a variable",
        TRAIN,
        2,
        "DRM_CACHE /proc/of-drm/zz: ",
        env=HOME | {"DRM_CACHE": "~/zz"},
        never="gone",
    ),
    fault(
        "cache below ~ of a config",
        f"{TRAIN} --config c.yaml --dry-run",
        0,
        "cache_dir: /proc/of-drm/zz",
        {"c.yaml": "cache_dir: ~/zz\n"},
        env=HOME,
    ),
    fault(
        "cache below ~ of a flag", f"{TRAIN} --cache-dir '~/zz' --dry-run", 0, "cache_dir: /proc/of-drm/zz", env=HOME
    ),
    fault("cache below ~ of nobody", f"{TRAIN} --cache-dir '~nobody-of-drm/zz'", 2, "--cache-dir ~nobody-of-drm/zz: "),
    fault("run below ~", "bench --out '~/o' --dry-run", 0, "out: /proc/of-drm/o", env=HOME),
    fault("data below ~", "bench --dataset '~/p.parquet,~/q.parquet' --dry-run", 2, "/proc/of-drm/p.parquet", env=HOME),
    fault(
        "data with a ratio below ~",
        "train-reward --data '~/p.parquet=0.3' --dry-run",
        2,
        "/proc/of-drm/p.parquet",
        env=HOME,
    ),
    fault("reward below ~", "bench --reward '~/r' --dry-run", 3, "--reward /proc/of-drm/r: ", env=HOME),
    fault("picture below ~", "score '~/a.png' --prompt x", 2, "/proc/of-drm/a.png: missing", env=HOME),
    fault(
        "a prompt keeps its ~", "score a.png --prompt '~/x' --dry-run", 0, "- ~/x\n", make=picture("a.png"), env=HOME
    ),
    fault("a folder that is named ~", "data check ./~/p.parquet", 0, "fine", make=parquet("~/p.parquet"), env=HOME),
    fault(
        "a folder that is named s3:",
        "bench --reward shapes --dataset s3:/x/p.parquet --out file:/o",
        0,
        "100",
        make=parquet("s3:/x/p.parquet"),
    ),
]

CONFIGS = [
    *(
        fault(f"section {text!r}", "bench --dry-run --config c.yaml", 2, f"--config c.yaml: {text.split(':')[0]} is .*, not a section", {"c.yaml": text})
        for text in ("common: 3", "common: [1]", "common: 0", "common: []", "common: ''", "bench: [1, 2]", "bench: x", "score: 3\ncommon:\n")
    ),
    fault("empty sections", "bench --dry-run --config c.yaml", 0, "command: bench", {"c.yaml": "common:\nbench:\n"}),
    fault("common key of nothing", "bench --dry-run --config c.yaml", 2, r"--config c.yaml: common: there is no key 'sede'\n.*did you mean seed", {"c.yaml": "common: {sede: 7}"}),
    fault("common key that is no text", "bench --dry-run --config c.yaml", 2, "--config c.yaml: common: there is no key 1", {"c.yaml": "common: {1: 2}"}),
    fault("key of nothing of another section", "bench --dry-run --config c.yaml", 2, "--config c.yaml: score: there is no key 'sede'", {"c.yaml": "score: {sede: 7}"}),
    fault("common key of another command", "bench --dry-run --config c.yaml", 0, "command: bench", {"c.yaml": "common: {lora_rank: 8}"}),
    fault("preset of a file", "bench --dry-run --config c.yaml", 2, "--config c.yaml: there is no preset 'papr'\n.*did you mean paper", {"c.yaml": "preset: papr"}, never="--preset:"),
    fault("preset of --set", "bench --dry-run --set preset=papr", 2, "--set preset: there is no preset 'papr'", never="--preset:"),
    fault("preset of --set before that of a file", "bench --dry-run --set preset=papr --config c.yaml", 2, "--set preset: there is no preset 'papr'", {"c.yaml": "preset: tiny"}),
    fault("command null", "bench --dry-run --config c.yaml", 2, "--config c.yaml: there is no command None", {"c.yaml": "command: null"}),
    fault("command of nobody", "bench --dry-run --config c.yaml", 2, "--config c.yaml: there is no command 'banch'\n.*did you mean bench", {"c.yaml": "command: banch"}),
    fault("command that is a list", "bench --dry-run --config c.yaml", 2, r"--config c.yaml: there is no command \['bench'\]", {"c.yaml": "command: [bench]"}),
    fault("command of two words", "bench --dry-run --config c.yaml", 2, "written for `drm data make`\n.*run `drm data make --config c.yaml`", {"c.yaml": "command: data-make"}),
]  # fmt: skip

SCORE = "score a.png --prompt x"
NUMBERS = [
    *(
        fault(f"{name} that is empty", SCORE, 0, "a.png", make=picture("a.png"), env={name: ""})
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "PMI_RANK")
    ),
    *(
        fault(
            f"{name} that is no number",
            SCORE,
            2,
            f"{name}: 'x' is no number",
            make=picture("a.png"),
            env={name: "x"},
            never="drm score on",
        )
        for name in (
            "WORLD_SIZE",
            "RANK",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_PORT",
            "OMPI_COMM_WORLD_SIZE",
            "HF_HUB_DOWNLOAD_TIMEOUT",
        )
    ),
    fault("training where a rank is empty", TRAIN, 0, "reward", env={"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": " "}),
    fault("a rank of no world", SCORE, 0, "a.png", make=picture("a.png"), env={"RANK": "3"}),
]

FOLDERS = [
    fault("cache in /proc", "bench --pairs 4 --cache-dir /proc/x", 2, "--cache-dir /proc/x: cannot be written.*\n.*choose another --cache-dir", never="gone"),
    fault("cache of a variable in /proc", TRAIN, 2, "DRM_CACHE /proc/x: cannot be written.*\n.*choose another DRM_CACHE", env={"DRM_CACHE": "/proc/x"}, never="gone"),
    fault("cache in /proc of own data", "bench --dataset p.parquet --cache-dir /proc/x", 2, "--cache-dir /proc/x: cannot be written", make=parquet("p.parquet")),
    fault("export to /proc", "export r --to /proc/x", 2, "--to /proc/x: cannot be written.*\n.*choose another --to", make=aligned, never="gone|--out"),
    fault("export of a damaged run", "export r --to x", 2, "RUN r: its config.yaml is damaged\n.*run the command that made it again", {"r/config.yaml": "preset: [ti"}, never="--out"),
]  # fmt: skip

FAULTS = [*HOMES, *CONFIGS, *NUMBERS, *FOLDERS]
