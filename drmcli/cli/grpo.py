"""`drm grpo`."""

from __future__ import annotations

from typing import Any

from drmcli.cli import options as o


@o.command(
    "grpo",
    "algorithm prompts judge updates group_size lr train kl_beta on_hacking steps guidance_scale step_rule noise_level",
)
def grpo(**options: Any) -> None:
    """Align a generator with a reward model: Step-wise GRPO, its baselines, and an alarm against reward hacking.

    [bold]Examples[/]

      drm grpo

      drm grpo --algorithm flow-grpo --updates 20 --lr 1e-3 --out runs/flow

      drm grpo --preset sd35-medium --reward runs/sd35/reward --prompts prompts.txt --judge none --dry-run
    """
    o.execute("grpo", options)
