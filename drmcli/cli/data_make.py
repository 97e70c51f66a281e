"""`drm data make`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o

LABELS = "Labels"


def make(
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPTS", help="A file of prompts: text, JSONL or JSON; or shapes (default)."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORER[=WEIGHT]|people|none",
            help="What judges: a scorer, a reward model, a server, module:function; may be repeated.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="soft (default), drawn or hard.", rich_help_panel=LABELS)] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Score gap, in spreads, that means 73 to 27 (default: 1).", rich_help_panel=LABELS),
    ] = None,
    tie_gap: Annotated[
        float | None, typer.Option(help="Score gap, in spreads, under which it is a tie.", rich_help_panel=LABELS)
    ] = None,
    weight_by_gap: Annotated[
        bool | None,
        typer.Option("--weight-by-gap", help="Decided pairs count more.", rich_help_panel=LABELS),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Noise level at which a reward model judges.", rich_help_panel=LABELS)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts to draw, the first of the file (default: all).")] = None,
    num_images: Annotated[int | None, typer.Option(help="Pictures a prompt (default: 4).")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to picture.")] = None,
    step_rule: Annotated[str | None, typer.Option(help="ode (default), flow-sde, dance-sde or cps.")] = None,
    noise_level: Annotated[float | None, typer.Option(help="Noise of a stochastic step rule (default: 1).")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is without.")] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="DIR", help="A LoRA of the generator, or the run that made it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn and judged at once.")] = None,
    preset: o.Preset = None,
    generator: o.GeneratorRef = None,
    resolution: o.Resolution = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attention: o.Attention = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    out: o.Out = None,
    seed: o.Seed = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make preferences from what a generator draws, judged by scorers or, with `drm data label` after it, by people.

    The folder is a dataset: `drm train-reward --data DIR=0.7 --data shapes=0.3`. Keep other data in the mixture: a generator's own
    samples show no gross failures, and a reward model that never saw one is fooled by it.

    [bold]Examples[/]

      drm data make --limit 20 --out mine

      drm data make prompts.txt --label hpsv3 --label clip=0.3 --preset sd35-medium --num-images 8 --out mine

      drm data make prompts.txt --label people --out mine && drm data label mine
    """
    o.execute("data-make", locals())
