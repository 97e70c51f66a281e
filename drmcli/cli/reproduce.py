"""`drm reproduce`."""

from __future__ import annotations

from typing import Any

from drmcli.cli import options as o


@o.command("reproduce", "only prompts eval_prompts data_dir")
def reproduce(**options: Any) -> None:
    """The paper's tables, each figure beside the published one; on the embedded world in miniature.

    Every experiment is a run in a folder of its own. What lacks its data, a model or an access is named and left out.

    [bold]Examples[/]

      drm reproduce --only sampling

      drm reproduce --preset paper --data-dir ~/data --prompts train.txt --eval-prompts test.txt --dry-run
    """
    o.execute("reproduce", options)
