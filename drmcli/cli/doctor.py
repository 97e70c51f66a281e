"""`drm doctor`."""

from __future__ import annotations

from drmcli.cli import options as o


def doctor(device: o.Device = None, preset: o.Preset = None, as_json: o.Json = False, debug: o.Debug = False) -> None:
    """Show versions, devices, memory and access, and try a forward pass.

    [bold]Examples[/]

      drm doctor

      drm doctor --device cuda --json
    """
    from drmcli.cli.output import show_json, stdout
    from drmcli.cli.render import table
    from drmcli.recipes import doctor as recipe

    findings = recipe.examine(device=device or "auto", preset=preset or "tiny")
    if as_json:
        show_json(findings)
        return
    made = table("drm doctor", "what", "found")
    for key, value in findings.items():
        made.add_row(key, value if isinstance(value, str) else ", ".join(f"{k} {v}" for k, v in value.items()))
    stdout().print(made)
