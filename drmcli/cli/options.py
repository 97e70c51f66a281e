"""Options that commands share, and the one way from a command's options to its recipe."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer

MODEL, RUN, OUTPUT = "Models", "Run", "Output"

Preset = Annotated[str | None, typer.Option(help="Preset: tiny (default), sd35-medium, paper.", rich_help_panel=MODEL)]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML with config keys, such as a run's config.yaml.", rich_help_panel=RUN
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any config key; may be repeated.", rich_help_panel=RUN),
]
GeneratorRef = Annotated[
    str | None,
    typer.Option("--generator", metavar="REF", help="Text-to-image pipeline: folder or hub id.", rich_help_panel=MODEL),
]
RewardRef = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="REF",
        help="Scorer: a reward model's folder or hub id, a name (pickscore, ...), NAME=FOLDER or module:function.",
        rich_help_panel=MODEL,
    ),
]
Out = Annotated[
    str | None, typer.Option(metavar="DIR", help="Run folder (default: runs/COMMAND-TIME).", rich_help_panel=RUN)
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (default: 0).", rich_help_panel=RUN)]
Device = Annotated[str | None, typer.Option(help="auto, cuda, cuda:1 or cpu.", rich_help_panel=MODEL)]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=MODEL)]
Attention = Annotated[str | None, typer.Option(help="sdpa or xformers.", rich_help_panel=MODEL)]
Resolution = Annotated[int | None, typer.Option(help="Side of the images in pixels.", rich_help_panel=MODEL)]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder with a published dataset in its own layout.")]
CacheDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Cache of encoded images and prompts.", rich_help_panel=RUN)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the config and the plan; write nothing.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool | None,
    typer.Option("--resume/--no-resume", help="Go on with an unfinished run (default).", rich_help_panel=RUN),
]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Empty the run folder first.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only the run folder's path on stdout.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]
MaxBad = Annotated[
    float | None, typer.Option(help="Percent of unreadable images above which the run stops (default: 1).")
]
AllowOutside = Annotated[
    bool | None, typer.Option("--allow-outside", help="Let a data file name images outside its folder.")
]

NOT_CONFIG = {"preset", "config", "sets", "dry_run", "as_json", "quiet", "debug"}


def execute(command: str, options: dict[str, Any]) -> None:
    """Resolve the config from a command's options, then plan or run its recipe and draw the result.

    `options` are the command's locals: the config's fields, and the names of NOT_CONFIG.
    """
    from importlib import import_module

    from drmcli import config as configs
    from drmcli.cli import inputs, render
    from drmcli.cli.output import Screen, show_json

    flags = {k: v for k, v in options.items() if k not in NOT_CONFIG}
    config = configs.resolve(
        command, preset=options.get("preset"), file=options.get("config"), sets=options.get("sets"), flags=flags
    )
    inputs.check(command, config)
    module = "drmcli.recipes." + command.replace("-", "_")
    if options.get("dry_run"):
        plan = import_module(module).plan(config)
        if options["as_json"]:
            show_json({"command": command, "config": configs.to_dict(config), "plan": plan})
        else:
            render.plan(command, configs.to_yaml(config, command), plan)
        return
    with Screen(quiet=options["quiet"] or options["as_json"]) as screen:
        screen.note(what_happens(command, config))
        screen.busy("load")
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result: whatever a library prints is none
            summary = import_module(module).run(config, screen)
    if not _is_main():
        return
    if options["as_json"]:
        show_json(summary)
    elif options["quiet"]:
        print(summary["run"])
    else:
        render.SUMMARIES[command](summary)
    limit = getattr(config, "fail_under", None)
    if limit is not None and summary["accuracy"] < limit:
        from drmcli.errors import RunError

        raise RunError(
            f"--fail-under {limit:g}: the accuracy is {summary['accuracy']:.2f} %",
            hint="see the run folder for the pairs",
        )


def what_happens(command: str, config: Any) -> str:
    """The first line of a run, before seconds of imports: command, device and number format, seed, run folder."""
    from drmcli.run import planned_folder

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # then the processes choose the folder together
    where = "a folder in runs/" if config.out is None and several else planned_folder(command, config)
    device = config.device if config.device != "auto" else "cuda" if has_gpu() else "cpu"
    dtype = getattr(config, "dtype", "auto")
    dtype = dtype if dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    return f"drm {command} on {device} in {dtype}, seed {config.seed}, into {where}"


def has_gpu() -> bool:
    """Is there an NVIDIA GPU, as far as can be told without importing torch?"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible not in ("", "-1") and os.path.exists("/dev/nvidiactl")


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
