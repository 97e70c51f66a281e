"""Pictures of results, drawn with matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

COLORS = ("#2f5d8a", "#c8553d", "#6a994e", "#8e6c8a", "#bc8034")


def accuracy_by_noise(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> None:
    """Accuracy (%) against sigma; each curve is a list of {sigma, accuracy} and perhaps ci95 = [lo, hi]."""
    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, rows), color in zip(curves.items(), COLORS):
        rows = sorted(rows, key=lambda row: row["sigma"])
        x, y = [r["sigma"] for r in rows], [r["accuracy"] for r in rows]
        axes.plot(x, y, "o-", color=color, label=name, lw=1.8, ms=5)
        if all("ci95" in r for r in rows):
            axes.fill_between(
                x, [r["ci95"][0] for r in rows], [r["ci95"][1] for r in rows], color=color, alpha=0.15, lw=0
            )
    axes.axhline(50, color="0.6", lw=1, ls=":")
    axes.set(xlabel="sigma (0 clean, 1 pure noise)", ylabel="pair accuracy, %", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    if len(curves) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": "drmcli"})


def calibration_plot(path: Path, calibration: Mapping[str, Any], *, title: str) -> None:
    """Does a score difference mean the probability it says? `bins` of {predicted, observed, sides} and `ece`."""
    figure = Figure(figsize=(4.4, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    bins = calibration["bins"]
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
    axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", color=COLORS[0], lw=1.8, ms=5)
    axes.set(
        xlabel="probability from the score difference", ylabel="share that people prefer",
        title=f"{title}: calibration error {100 * calibration['ece']:.1f} %", xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": "drmcli"})


def text_plot(rows: Sequence[Mapping[str, Any]], *, width: int = 40) -> str:
    """The same for a terminal: a bar a sigma, from 50 % (chance) to 100 %."""
    lines = []
    for row in sorted(rows, key=lambda row: row["sigma"]):
        filled = round(max(0.0, min(1.0, (row["accuracy"] - 50) / 50)) * width)
        lines.append(f"  {row['sigma']:<5g} {'█' * filled}{'·' * (width - filled)} {row['accuracy']:5.1f} %")
    return "\n".join(lines)


def training_curve(path: Path, metrics: pd.DataFrame, *, title: str) -> None:
    """Loss, and accuracy where there is one, against the step."""
    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    step = metrics["step"] if "step" in metrics else metrics["update"]
    axes.plot(step, metrics["loss"], color=COLORS[0], lw=1.6, label="loss")
    axes.set(xlabel=str(step.name), ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    if "accuracy" in metrics:
        right = axes.twinx()
        right.plot(step, metrics["accuracy"], color=COLORS[1], lw=1.6)
        right.set_ylabel("pair accuracy in training, %", color=COLORS[1])
        right.spines["top"].set_visible(False)
    figure.savefig(path, metadata={"Software": "drmcli"})


def reward_and_judge(path: Path, history: Sequence[Mapping[str, float]], *, title: str) -> None:
    """Reward and judge on validation prompts by update; the best point by the judge is marked."""
    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    x = [row["update"] for row in history]
    axes.plot(x, [row["reward"] for row in history], "o-", color=COLORS[0], lw=1.8, ms=4)
    axes.set(xlabel="update", title=title)
    axes.set_ylabel("reward", color=COLORS[0])
    axes.spines[["top", "right"]].set_visible(False)
    judged = [row["judge"] for row in history]
    if all(value == value for value in judged):
        right = axes.twinx()
        right.plot(x, judged, "o-", color=COLORS[1], lw=1.8, ms=4)
        best = max(range(len(judged)), key=judged.__getitem__)
        right.plot(x[best], judged[best], "o", ms=10, mfc="none", color=COLORS[1])
        right.set_ylabel("judge", color=COLORS[1])
        right.spines["top"].set_visible(False)
    figure.savefig(path, metadata={"Software": "drmcli"})
