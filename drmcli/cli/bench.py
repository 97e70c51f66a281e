"""`drm bench`."""

from __future__ import annotations

from typing import Any

from drmcli.cli import options as o


@o.command(
    "bench",
    "dataset scorers against split data_dir calibration_split pairs sigmas noise_samples max_bad fail_under",
    **{"Benchmark of a generator": "lora prompts num_images steps guidance_scale images detector"},
)
def bench(**options: Any) -> None:
    """Measure the preference accuracy of scorers, at every sigma and by every protocol of counting; or what a generator draws.

    [bold]Examples[/]

      drm bench

      drm bench --reward runs/mine/reward --dataset pairs.jsonl --sigmas 0.25 --noise-samples 4

      drm bench --dataset shapes-prompts --lora runs/mine --scorer shapes

      drm bench --dataset hpdv2 --data-dir ~/HPDv2 --preset sd35-medium --reward runs/sd35/reward
    """
    o.execute("bench", options)
