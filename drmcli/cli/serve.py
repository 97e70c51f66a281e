"""`drm serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o

LIMITS = "Limits"


def serve(
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer", metavar="NAME", help="Serve this scorer too; may be repeated.", rich_help_panel=o.MODEL
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one (default: 8000).")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Noise level of pictures where a request names none (default: 0.25).")
    ] = None,
    noise_samples: Annotated[
        int | None, typer.Option(help="Noise draws a score, averaged, where a request names none (default: 4).")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Pictures scored at once (default: 32).", rich_help_panel=LIMITS)
    ] = None,
    max_wait_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds that a batch waits for company (default: 5).", rich_help_panel=LIMITS),
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Scores waiting, beyond which the answer is 503.", rich_help_panel=LIMITS)
    ] = None,
    max_items: Annotated[int | None, typer.Option(help="Pictures a request.", rich_help_panel=LIMITS)] = None,
    max_body_mib: Annotated[int | None, typer.Option(help="Size of a request, MiB.", rich_help_panel=LIMITS)] = None,
    preset: o.Preset = None,
    reward: o.RewardRef = None,
    resolution: o.Resolution = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attention: o.Attention = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    seed: o.Seed = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Keep a reward model warm and score over HTTP, till Ctrl-C.

    `--scorer http://HOST:PORT` of the other commands, and `--reward` of `drm score` and `drm grpo`, are its clients.

    [bold]Examples[/]

      drm serve --port 8000

      drm serve --reward runs/reward/reward --scorer pickscore --scorer shapes --port 8000

      drm serve --reward none --scorer hpsv3 --max-batch 8 --max-queue 256
    """
    options = {k: v for k, v in locals().items() if k != "scorer"} | {"scorers": scorer or None}
    if dry_run:
        o.execute("serve", options)
        return

    from drmcli import config as configs
    from drmcli.cli.output import Screen

    flags = {k: v for k, v in options.items() if k not in o.NOT_CONFIG}
    resolved = configs.resolve("serve", preset=preset, file=config, sets=sets, flags=flags)
    from drmcli.recipes import serve as recipe

    def ready(said: dict) -> None:
        import json

        if as_json:
            print(json.dumps(said), flush=True)
        elif quiet:
            print(said["url"], flush=True)
        else:
            print(f"serving {', '.join(said['scorers'])} at {said['url']}  (Ctrl-C ends it)", flush=True)

    with Screen(quiet=quiet or as_json) as screen:
        recipe.run(resolved, screen, ready)
