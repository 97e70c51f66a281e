"""`drm reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def reproduce(
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="reward, rl or sampling; may be repeated (default: all).")
    ] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Prompts to align with.")] = None,
    eval_prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts whose pictures are compared.")
    ] = None,
    data_dir: o.DataDir = None,
    preset: o.Preset = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
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
    """The paper's tables, each figure beside the published one; on the embedded world in miniature.

    Every experiment is a run in a folder of its own. What lacks its data, a model or an access is named and left out.

    [bold]Examples[/]

      drm reproduce --only sampling

      drm reproduce --preset paper --data-dir ~/data --prompts train.txt --eval-prompts test.txt --dry-run
    """
    o.execute("reproduce", locals())
