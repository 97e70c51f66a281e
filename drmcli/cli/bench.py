"""`drm bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o

GENERATOR = "Benchmark of a generator"


def bench(
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="shapes, hpdv2, hpdv3, pickapic, imagereward, or a file of pairs, several with commas between;"
            " for a generator geneval, shapes-prompts, or a file of prompts.",
        ),
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="NAME|NAME=FOLDER|REF|MODULE:FUNCTION",
            help="Another scorer of the same pairs: pickscore, clip, hpsv2, hpsv3, imagereward, aesthetic, shapes, a reward"
            " model, or your own function; may be repeated.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="REF", help="A second reward model or scorer, for a paired test.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset (default: test; test_unique of pickapic).")
    ] = None,
    data_dir: o.DataDir = None,
    calibration_split: Annotated[
        str | None, typer.Option(help="Split where PickScore's tie threshold is chosen: validation_unique of pickapic.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Pairs to evaluate (default: all).")] = None,
    sigmas: Annotated[
        list[float] | None,
        typer.Option("--sigma", help="Noise level to score at; may be repeated, the first is the headline."),
    ] = None,
    noise_samples: Annotated[int | None, typer.Option(help="Noise draws a picture, averaged (default: 1).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures scored at once.")] = None,
    fail_under: Annotated[float | None, typer.Option(help="Exit with 1 when the accuracy (%) is lower.")] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="RUN|FOLDER", help="A LoRA to compare with.", rich_help_panel=GENERATOR)
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts to draw (default: all).", rich_help_panel=GENERATOR)
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Pictures a prompt (default: 4).", rich_help_panel=GENERATOR)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a picture.", rich_help_panel=GENERATOR)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance.", rich_help_panel=GENERATOR)] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="geneval: evaluate these pictures, in its layout.", rich_help_panel=GENERATOR),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(metavar="REF|shapes", help="geneval: a Mask2Former, or shapes.", rich_help_panel=GENERATOR),
    ] = None,
    color_model: Annotated[
        str | None, typer.Option(metavar="REF", help="geneval: a CLIP that tells colours.", rich_help_panel=GENERATOR)
    ] = None,
    max_bad: o.MaxBad = None,
    allow_outside: o.AllowOutside = None,
    preset: o.Preset = None,
    reward: o.RewardRef = None,
    generator: o.GeneratorRef = None,
    resolution: o.Resolution = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attention: o.Attention = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    out: o.Out = None,
    seed: o.Seed = None,
    cache_dir: o.CacheDir = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure a reward model's preference accuracy, at every noise level and in every counting convention; or what a generator draws.

    [bold]Examples[/]

      drm bench

      drm bench --reward runs/mine/reward --dataset pairs.jsonl --sigma 0.25 --noise-samples 4

      drm bench --scorer shapes --against runs/mine/reward

      drm bench --dataset shapes-prompts --lora runs/mine --scorer shapes

      drm bench --dataset geneval

      drm bench --dataset hpdv2 --data-dir ~/HPDv2 --preset sd35-medium --reward runs/sd35/reward
    """
    o.execute("bench", locals())
