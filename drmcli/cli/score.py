"""`drm score`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drmcli.cli import options as o


@o.command("score", "sigmas noise_samples batch_size")
def score(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Pictures, or latents as .safetensors; - reads paths from stdin."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="The prompt of every picture, or repeated, one a picture.")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="A file with a prompt a line, one a picture.")
    ] = None,
    **options: Any,
) -> None:
    """Score pictures, or saved latents, for a prompt.

    [bold]Examples[/]

      drm score picture.png --prompt "a large red circle on the left"

      drm score a.png b.png --prompt "a small blue square in the center" --sigmas 0,0.25,0.5

      ls *.png | drm score - --prompts prompts.txt --json
    """
    options["images"] = _paths(images)
    options["prompts"] = _prompts(prompt, prompts_file)
    o.execute("score", options)


def _paths(images: list[str] | None) -> list[str] | None:
    if images and "-" in images:
        from drmcli.data.text import lines, read_stdin

        piped = [line for line in lines(read_stdin("IMAGE -")) if line.strip()]
        return [path for name in images for path in (piped if name == "-" else [name])]
    return images or None


def _prompts(prompts: list[str] | None, file: str | None) -> list[str] | None:
    from drmcli.data.prompts import read_prompts
    from drmcli.errors import InputError

    if prompts and file is not None:
        raise InputError("--prompts: given together with --prompt", hint="use one of them")
    if file is None:
        return prompts or None
    return read_prompts(file, every=True)
