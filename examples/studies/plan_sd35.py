"""Memory plans of Stable Diffusion 3.5 Medium, from its published configs: no weights, no download, no GPU.

    python examples/studies/plan_sd35.py

Builds a folder that holds only the configs, and asks every preset of that model for its plan, in bf16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from drmcli.config import preset_names, resolve
from drmcli.recipes import bench, grpo, sample, score, train_reward
from drmcli.recipes.plan import as_set, published_configs
from drmcli.reward_config import RewardConfig

MODEL = "stabilityai/stable-diffusion-3.5-medium"


def write_configs(folder: Path) -> None:
    """A pipeline folder without weights, and a reward model cut from it."""
    published = published_configs(MODEL)
    assert published is not None
    shutil.copytree(published, folder / "sd35")
    transformer = json.loads((folder / "sd35" / "transformer" / "config.json").read_text())
    config = RewardConfig(
        base_model=str(folder / "sd35"),
        transformer={k: v for k, v in transformer.items() if not k.startswith("_")},
        drop_layers=3,
        backbone="lora",
    )
    (folder / "reward").mkdir()
    (folder / "reward" / "config.json").write_text(json.dumps(asdict(config)))


def training(folder: Path, flags: dict[str, Any]) -> Table:
    """Commands that learn."""
    table = titled(
        "GiB", "policy or model", "gradients, AdamW", "activations", "checkpointed", "beside", "drawing", "as set"
    )
    for preset in sorted(preset_names()):
        if resolve("train-reward", preset=preset).generator != MODEL:
            continue
        for command, module in (("train-reward", train_reward), ("grpo", grpo)):
            more = {"reward": str(folder / "reward"), "prompts": "shapes"} if command == "grpo" else {}
            config = resolve(command, preset=preset, flags=flags | more)
            memory = module.plan(config)["memory"]
            beside = sum(memory.get("beside", {}).values())
            drawing = memory.get("total_drawing", 0)
            total = as_set(config, memory)
            cells = (memory["weights"], memory["gradients"] + memory["optimizer"] + memory["ema"], memory["activations"],
                     memory["activations_checkpointed"], beside, drawing, total)  # fmt: skip
            table.add_row(f"{command} --preset {preset}", *(f"{cell / 2**30:.1f}" if cell else "" for cell in cells))
    return table


def using(folder: Path, flags: dict[str, Any]) -> Table:
    """Commands that score and draw, with the preset for 24 GB."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    pictures = {"images": [str(folder / "a.png")] * 16, "prompts": ["a prompt"]}
    steps = {"prompts": ["a prompt"], "step_rule": "cps"} | flags
    ways: list[tuple[str, Any, dict[str, Any]]] = [
        ("score, 16 pictures", score, pictures | {"dtype": "bf16"}),
        ("bench", bench, flags),
        ("sample", sample, steps | {"reward": "none"}),
        ("sample --stepwise --beams 6", sample, steps | {"mode": "stepwise", "beams": 6}),
    ]
    table = titled("GiB", "weights", "largest pass", "total")
    for name, module, more in ways:
        command = name.split()[0].rstrip(",")
        config = resolve(command, preset="sd35-medium", flags={"reward": str(folder / "reward")} | more)
        memory = module.plan(config)["memory"]
        cells = sum(memory["models"].values()), max(memory["passes"].values()), memory["total"]
        table.add_row(name, *(f"{cell / 2**30:.1f}" for cell in cells))
    return table


def titled(*names: str) -> Table:
    made = Table(header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(names):
        made.add_column(name, justify="left" if i == 0 else "right")
    return made


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        write_configs(Path(name))
        flags = {"generator": str(Path(name) / "sd35"), "dtype": "bf16"}
        console = Console(width=140)
        console.print(training(Path(name), flags))
        console.print(using(Path(name), flags))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
