"""`drm data make`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drmcli.cli import options as o


@o.command(
    "data-make",
    "limit num_images steps step_rule guidance_scale lora",
    Labels="label labels temperature tie_gap weight_by_gap sigma",
)
def make(
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPTS", help="A file of prompts: text, JSONL or JSON; or shapes (default)."),
    ] = None,
    **options: Any,
) -> None:
    """Make preferences from what a generator draws, judged by scorers or, with `drm data label` after it, by people.

    The folder is a dataset: `drm train-reward --data DIR=0.7 --data shapes=0.3`. Keep other data in the mixture: a generator's own
    samples show no gross failures, and a reward model that never saw one is fooled by it.

    [bold]Examples[/]

      drm data make --limit 20 --out mine

      drm data make prompts.txt --label hpsv3 --label clip=0.3 --preset sd35-medium --num-images 8 --out mine

      drm data make prompts.txt --label people --out mine && drm data label mine
    """
    o.execute("data-make", {"prompts": prompts} | options)
