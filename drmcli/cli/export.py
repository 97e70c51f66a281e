"""`drm export`."""

from __future__ import annotations

from typing import Annotated, Any

from drmcli.cli import options as o


@o.command("export", "to push public base")
def export(
    run: Annotated[
        str | None,
        o.run_argument("the newest in runs/ that made a model"),
    ] = None,
    **options: Any,
) -> None:
    """Hand on the reward model or LoRA of a run, with its model card: as a folder, or to the hub, where it is private.

    [bold]Examples[/]

      drm export runs/mine --to mine-reward

      drm export runs/mine --push owner/mine-reward --dry-run

      drm export runs/aligned/lora-last --push owner/aligned --public
    """
    from drmcli import config as configs
    from drmcli.cli import onward, render
    from drmcli.cli.output import Screen, show_json

    flags = {k: v for k, v in options.items() if k not in o.NOT_CONFIG}
    resolved = configs.resolve("export", flags=flags | {"run": run})
    from drmcli.recipes import export as recipe

    if options["dry_run"]:
        plan = recipe.plan(resolved)
        show_json(plan) if options["as_json"] else render.export(plan, dry=True)
        return
    with Screen(quiet=options["quiet"] or options["as_json"]) as screen:
        screen.busy("export")
        summary = recipe.run(resolved, screen)
    if options["as_json"]:
        show_json(summary)
    elif options["quiet"]:
        print(summary.get("url") or summary["to"])
    else:
        render.export(summary)
        onward.say(onward.after("export", summary, {}))
