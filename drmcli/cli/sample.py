"""`drm sample`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from drmcli.cli import options as o

SEARCH = "Search"


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; - reads prompts from stdin.")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A file of prompts: text, JSONL or JSON.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Pictures a prompt (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to picture.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is without.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="DIR", help="LoRA of the transformer, as diffusers saves it.")
    ] = None,
    stepwise: Annotated[
        bool,
        typer.Option("--stepwise", help="Keep the best of --beams candidates at every step.", rich_help_panel=SEARCH),
    ] = False,
    beams: Annotated[
        int | None, typer.Option(help="Candidates a step, or trajectories (default: 4).", rich_help_panel=SEARCH)
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="plain, best-of-n, stepwise, beam, halving or smc.", rich_help_panel=SEARCH)
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Particles that beam keeps (default: 2).", rich_help_panel=SEARCH)
    ] = None,
    step_rule: Annotated[
        str | None, typer.Option(help="ode, flow-sde, dance-sde or cps.", rich_help_panel=SEARCH)
    ] = None,
    noise_level: Annotated[float | None, typer.Option(help="Noise of the step rule.", rich_help_panel=SEARCH)] = None,
    branch_sigmas: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Branch only at these noise levels.", rich_help_panel=SEARCH)
    ] = None,
    branch_steps: Annotated[
        str | None,
        typer.Option(metavar="FIRST,LAST", help="Branch only at these steps, from 0.", rich_help_panel=SEARCH),
    ] = None,
    score_at: Annotated[str | None, typer.Option(help="noisy or clean.", rich_help_panel=SEARCH)] = None,
    share_score: Annotated[
        bool | None,
        typer.Option(
            "--share-score",
            help="Compute blocks that a frozen reward model shares with the generator once.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    trace: Annotated[
        bool | None, typer.Option("--trace", help="Draw the tree of candidates.", rich_help_panel=SEARCH)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn at once.")] = None,
    preset: o.Preset = None,
    generator: o.GeneratorRef = None,
    reward: o.RewardRef = None,
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
    """Draw pictures; with --stepwise the reward model steers every step.

    [bold]Examples[/]

      drm sample "a large red circle above a small blue square" --stepwise --beams 4

      drm sample "a small green triangle on the left" --num-images 4 --guidance-scale 4 --mode best-of-n

      drm sample --preset sd35-medium --reward runs/sd35/reward "an ocean at dawn" --stepwise --beams 4 --trace
    """
    options = {k: v for k, v in locals().items() if k not in ("prompts", "prompts_file", "stepwise")}
    options["prompts"] = _prompts(prompts, prompts_file)
    options["branch_sigmas"] = _pair(branch_sigmas, "--branch-sigmas", float)
    options["branch_steps"] = _pair(branch_steps, "--branch-steps", int)
    if stepwise:
        if mode not in (None, "stepwise"):
            from drmcli.errors import InputError

            raise InputError(f"--stepwise: given together with --mode {mode}", hint="use one of them")
        options["mode"] = "stepwise"
    o.execute("sample", options)


def _prompts(prompts: list[str] | None, file: str | None) -> list[str] | None:
    from drmcli.data.prompts import read_prompts

    given = [
        text
        for prompt in prompts or []
        for text in ([line.strip() for line in sys.stdin if line.strip()] if prompt == "-" else [prompt])
    ]
    if file is not None:
        given += read_prompts(file)
    return given or None


def _pair(text: str | None, flag: str, kind: type) -> list | None:
    from drmcli.errors import InputError

    if text is None:
        return None
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 2 or values[0] > values[1]:
        raise InputError(f"{flag} {text}: not two rising numbers with a comma between", hint=f"for example {flag} 0,1")
    return values
