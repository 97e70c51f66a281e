"""`drm train-reward`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def train_reward(
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH[=RATIO]",
            help="Preference pairs: shapes, a published dataset, or a file; may be repeated.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(metavar="NAME|PATH", help="Held-out pairs (default: the data's own test part).")
    ] = None,
    data_dir: o.DataDir = None,
    max_bad: o.MaxBad = None,
    allow_outside: o.AllowOutside = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs a step, over all processes.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Pairs a forward pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the backbone.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of the head.")] = None,
    loss: Annotated[str | None, typer.Option(help="bradley-terry or thurstone.")] = None,
    backbone: Annotated[str | None, typer.Option(help="What is trained: full, lora, or head alone.")] = None,
    init: Annotated[
        str | None, typer.Option(metavar="REF", help="A saved reward model to go on from; or pretrained, random.")
    ] = None,
    drop_layers: Annotated[int | None, typer.Option(help="Blocks cut off at the end.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; 0 only at the end.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    track: Annotated[list[str] | None, typer.Option(help="Tracker: tensorboard, wandb, ...; may be repeated.")] = None,
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
    cache_dir: o.CacheDir = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train a reward model on preference pairs.

    A diffusion transformer without its last blocks, with a small head, learns which of two noisy latents people prefer.
    Interrupted runs go on when the same command is run again.

    [bold]Examples[/]

      drm train-reward

      drm train-reward --data pairs.jsonl --steps 200 --out runs/mine

      drm train-reward --init runs/mine/reward --backbone head --data votes --steps 100

      drm train-reward --preset sd35-medium --data-dir ~/HPDv3 --dry-run
    """
    o.execute("train-reward", locals())
