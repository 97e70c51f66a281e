"""`drm show`: what a finished or running run has so far, as tables and a one-page report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from drmcli import results
from drmcli.config import spoken
from drmcli.errors import InputError
from drmcli.plots import training_curve
from drmcli.report import Report
from drmcli.run import guarded, write_text

TABLES = ("metrics", "evals", "pairs.parquet", "scores.parquet", "images.parquet", "candidates.parquet", "rollouts")


def gather(run: str) -> dict[str, Any]:
    """Config, summary (None while unfinished), tables and pictures of a run folder."""
    folder = Path(run)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError:
        raise InputError(f"RUN {run}: holds no config.yaml", hint="give a run folder, such as runs/demo") from None
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"RUN {run}: cannot be read: {error}", hint="give a run folder, such as runs/demo") from None
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.is_file() else None
    tables: dict[str, pd.DataFrame] = {}
    for name in TABLES:
        path = folder / name
        if path.is_file() or (path.is_dir() and any(path.glob("part-*.parquet"))):
            tables[name.removesuffix(".parquet")] = results.read(path)
    return {"folder": folder, "config": config, "summary": summary, "tables": tables}


def write_report(found: dict[str, Any]) -> Path:
    """report.html of any run. A demo's own report is left as it is."""
    folder: Path = found["folder"]
    command = found["config"].get("command", "run")
    path = folder / "report.html"
    if command == "demo" and path.is_file():
        return path
    page = Report(f"drm {command}: {folder.name}")
    page.text("finished" if found["summary"] else "not finished yet: run the same command again to go on", soft=True)
    if found["summary"]:
        page.heading("Result")
        rows = [[key, _short(value)] for key, value in found["summary"].items() if not isinstance(value, (list, dict))]
        page.table(["key", "value"], rows)
        for key, value in found["summary"].items():
            if isinstance(value, list) and value and isinstance(value[0], dict) and len(value) <= 40:
                page.heading(key)
                page.table(list(value[0]), [[_short(v) for v in row.values()] for row in value])
    if "metrics" in found["tables"]:
        plot = folder / "training.png"
        with guarded(plot):
            training_curve(plot, found["tables"]["metrics"], title=folder.name)
    for picture in sorted(folder.glob("*.png")):
        page.picture(picture, picture.name)
    page.heading("Tables")
    page.table(["table", "rows"], [[name, str(len(table))] for name, table in found["tables"].items()])
    page.heading("Config")
    page.table(["key", "value"], [[k, _short(v)] for k, v in found["config"].items()])
    write_text(path, page.render())
    return path


def _short(value: Any) -> str:
    text = (
        f"{value:.4g}"
        if isinstance(value, float)
        else spoken(value)
        if isinstance(value, str) and value
        else str(value)
    )
    return text if len(text) <= 160 else text[:157] + "..."
