"""`drm serve`."""

from __future__ import annotations

import sys
from typing import Any

from drmcli.cli import options as o


@o.command(
    "serve", "scorers host port sigma noise_samples", Limits="max_batch max_wait_ms max_queue max_items max_body_mib"
)
def serve(**options: Any) -> None:
    """Keep a reward model warm and score over HTTP, till Ctrl-C.

    `http://HOST:PORT` is its client wherever the other commands take a scorer: `--reward`, `--scorer`, `--judge` and so on.

    [bold]Examples[/]

      drm serve --port 8000

      drm serve --reward runs/reward/reward --scorer pickscore --scorer shapes --port 8000

      drm serve --reward none --scorer hpsv3 --max-batch 8 --max-queue 256
    """
    if options["dry_run"]:
        o.execute("serve", options)
        return

    from drmcli import config as configs
    from drmcli.cli.output import Screen

    flags = {k: v for k, v in options.items() if k not in o.NOT_CONFIG}
    resolved = configs.resolve(
        "serve", preset=options["preset"], file=options["config"], sets=options["sets"], flags=flags
    )
    from drmcli.recipes import serve as recipe

    result = sys.stdout  # while the screen is open, stdout is stderr

    def ready(said: dict) -> None:
        import json

        if options["as_json"]:
            print(json.dumps(said), file=result, flush=True)
        elif options["quiet"]:
            print(said["url"], file=result, flush=True)
        else:
            print(f"serving {', '.join(said['scorers'])} at {said['url']}  (Ctrl-C ends it)", file=result, flush=True)

    with Screen(quiet=options["quiet"] or options["as_json"]) as screen:
        recipe.run(resolved, screen, ready)
