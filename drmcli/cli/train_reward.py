"""`drm train-reward`."""

from __future__ import annotations

from typing import Any

from drmcli.cli import options as o


@o.command(
    "train-reward",
    "data eval_data data_dir max_bad steps batch_size micro_batch_size lr head_lr loss backbone init drop_layers eval_every"
    " save_every track",
)
def train_reward(**options: Any) -> None:
    """Train a reward model on preference pairs.

    A diffusion transformer without its last blocks, with a small head, learns which of two noisy latents people prefer.
    Interrupted runs go on when the same command is run again.

    [bold]Examples[/]

      drm train-reward

      drm train-reward --data pairs.jsonl --steps 200 --out runs/mine

      drm train-reward --init runs/mine/reward --backbone head --data votes --steps 100

      drm train-reward --preset sd35-medium --data-dir ~/HPDv3 --dry-run
    """
    o.execute("train-reward", options)
