"""`drm sample`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drmcli.cli import options as o

EXAMPLE = "a large red circle above a small blue square"
"""What is drawn where nothing at all is asked for, in the words of the embedded world."""


@o.command(
    "sample",
    "num_images steps guidance_scale negative_prompt height width lora",
    Search="mode budget beams starts refine step_rule noise_level combine trace tune",
)
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; - reads prompts from stdin.")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A file of prompts: text, JSONL, JSON, CSV or TSV.")
    ] = None,
    stepwise: Annotated[
        bool,
        typer.Option("--stepwise", help="Keep the best of --beams candidates a step.", rich_help_panel="Search"),
    ] = False,
    **options: Any,
) -> None:
    """Draw pictures; with --stepwise the reward model steers every step.

    [bold]Examples[/]

      drm sample "a large red circle above a small blue square" --stepwise --beams 4

      drm sample "a small green triangle on the left" --num-images 4 --mode auto --budget 31

      drm sample --preset sd35-medium --reward runs/sd35/reward "an ocean at dawn" --stepwise --beams 4 --trace
    """
    from drmcli.errors import InputError

    options["prompts"] = _prompts(prompts, prompts_file)
    if options["prompts"] is None and not any(options[k] for k in ("preset", "generator", "config", "sets")):
        options["prompts"] = [EXAMPLE]
    for key, flag in (("branch_sigmas", "--branch-sigmas"), ("branch_steps", "--branch-steps")):
        values = options[key]
        if values is not None and (len(values) != 2 or values[0] > values[1]):
            shown = ",".join(f"{v:g}" for v in values)
            raise InputError(
                f"{flag} {shown}: not two rising numbers with a comma between", hint=f"for example {flag} 0,1"
            )
    if stepwise:
        if options["mode"] not in (None, "stepwise"):
            raise InputError(f"--stepwise: given together with --mode {options['mode']}", hint="use one of them")
        options["mode"] = "stepwise"
    o.execute("sample", options)


def _prompts(prompts: list[str] | None, file: str | None) -> list[str] | None:
    from drmcli.data.prompts import read_prompts
    from drmcli.data.text import lines, read_stdin

    given: list[str] = []
    for prompt in prompts or []:
        given += [line.strip() for line in lines(read_stdin("PROMPT -")) if line.strip()] if prompt == "-" else [prompt]
    if file is not None:
        given += read_prompts(file)
    return given or None
