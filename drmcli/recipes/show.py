"""`drm show`: what a finished or running run has so far, as tables and a one-page report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from drmcli import results
from drmcli.config import spoken
from drmcli.errors import InputError
from drmcli.files import begun_runs, read_object
from drmcli.plots import training_curve
from drmcli.report import Report
from drmcli.run import guarded, write_text

TABLES = ("metrics", "evals", "pairs.parquet", "scores.parquet", "images.parquet", "candidates.parquet", "rollouts")
CAPTIONS = {
    "grid.png": "What was drawn, with seed and score.",
    "before_after.png": "The same prompts and seeds before and after.",
    "curve.png": "Reward and judge on validation prompts, by update.",
    "training.png": "Loss, and the accuracy in training where there is one.",
    "accuracy_by_noise.png": "Pair accuracy by sigma; 50 % is chance.",
    "calibration.png": "Does a score difference mean the probability that it says?",
}
"""What the pictures of a run folder show."""


@dataclass
class Found:
    """What a run folder holds, as far as it can be read."""

    folder: Path
    command: str
    config: dict[str, Any]
    summary: dict[str, Any] | None
    """None while the run is not finished, and when its summary cannot be read."""
    tables: dict[str, pd.DataFrame]
    problems: list[str]
    """What is damaged, each with its file."""

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


def gather(run: str) -> Found:
    """Config, summary and tables of a run folder. Raises InputError where there is none; damaged files are problems of what is found."""
    folder, name = Path(run).expanduser(), f"RUN {run}"
    if not (folder / "config.yaml").exists() and not (folder / "summary.json").exists():
        raise InputError(f"{name}: holds no config.yaml", hint="give a run folder, such as runs/demo")
    problems: list[str] = []
    config = _object(folder / "config.yaml", name, problems)
    summary = _object(folder / "summary.json", name, problems)
    if config is None and not problems:
        problems.append(f"{name}: its config.yaml is missing")
    tables: dict[str, pd.DataFrame] = {}
    for table in TABLES:
        path = folder / table
        if path.is_file() or (path.is_dir() and results.parts_of(path)):
            try:
                tables[table.removesuffix(".parquet")] = results.read(path)
            except InputError as error:
                problems.append(f"{name}: {error.message}")
        elif table.endswith(".parquet") and path.exists():
            problems.append(f"{name}: its {table} is damaged")
    command = str((config or summary or {}).get("command", "run"))
    return Found(folder, command, config or {}, summary, tables, problems)


def _object(path: Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        found = read_object(path, name)
        if found is not None and "command" not in found:
            raise InputError(f"{name}: its {path.name} is damaged", hint="")
        return found
    except InputError as error:
        problems.append(error.message)
        return None


def newest() -> str:
    """The run that was begun last under runs/. Raises InputError when there is none."""
    found = begun_runs()
    if not found:
        raise InputError("RUN: there is none in runs/", hint="give a run folder, or make one: drm demo")
    return str(found[0])


def write_report(found: Found) -> Path:
    """report.html of any run. A demo's own report is left as it is."""
    folder, command = found.folder, found.command
    path = folder / "report.html"
    if command == "demo" and path.is_file():
        return path
    page = Report(f"drm {command}: {folder.name}")
    page.text("finished" if found.finished else "not finished yet: run the same command again to go on", soft=True)
    for problem in found.problems:
        page.text(problem)
    if found.summary:
        page.heading("Result")
        rows = [[key, _short(value)] for key, value in found.summary.items() if not isinstance(value, (list, dict))]
        page.table(["key", "value"], rows)
        for key, value in found.summary.items():
            if isinstance(value, list) and value and len(value) <= 40 and all(isinstance(row, dict) for row in value):
                page.heading(key)
                page.table(list(value[0]), [[_short(row.get(column)) for column in value[0]] for row in value])
    metrics = found.tables.get("metrics")
    if metrics is not None and {"loss"} < set(metrics.columns) and {"step", "update"} & set(metrics.columns):
        plot = folder / "training.png"
        with guarded(plot):
            training_curve(plot, metrics, title=folder.name)
    for picture in sorted(folder.glob("*.png")):
        if picture.is_file():
            about = CAPTIONS.get(picture.name)
            page.picture(picture, f"{picture.name}: {about}" if about else picture.name)
    page.heading("Tables")
    page.table(["table", "rows"], [[name, str(len(table))] for name, table in found.tables.items()])
    page.heading("Config")
    page.table(["key", "value"], [[k, _short(v)] for k, v in found.config.items()])
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
