"""Step-wise GRPO against its baselines, each at its own best learning rate, on the embedded world.

    python examples/studies/compare_alignment.py [FOLDER] [--minutes 3] [--seeds 3] [--jobs 1]

Every algorithm is run with seed 0 at the same learning rates for the same training time; the best rate by the judge on validation
prompts is then run with the other seeds. Printed: the judge on test prompts, which chose nothing, before and after; the best level
on validation prompts and when it was reached; the seconds until the level that Flow-GRPO has after half of its time. Training
seconds are those of rollouts and updates alone. Runs are kept in the folder and go on where they stopped. Writes alignment.parquet
and curves.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

WAYS: dict[str, list[str]] = {
    "step-grpo": [],
    "flow-grpo": ["--algorithm", "flow-grpo", "--set", "eval_every=2"],
    "flow-grpo, its own settings": [
        "--algorithm",
        "flow-grpo",
        "--set",
        "eval_every=2",
        "--step-rule",
        "flow-sde",
        "--kl-beta",
        "0.04",
        "--set",
        "kl_form=no-dt",
        "--set",
        "window=[0.0,1.0]",
        "--set",
        "noise_weight=false",
    ],
    "tempflow": ["--algorithm", "tempflow", "--set", "eval_every=2"],
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FOREVER = 100_000


def run(folder: Path, way: str, options: list[str], rate: float, seed: int, minutes: float) -> dict:
    """One run of `drm grpo`, or what it left when it was run before."""
    out = folder / f"{way.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "drmcli", "grpo", "--out", str(out), "--seed", str(seed), "--lr", str(rate), "--quiet",
                   "--updates", str(FOREVER), "--max-time", str(minutes), "--on-hacking", "warn", *options]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text())


def curve(summary: dict) -> tuple[np.ndarray, np.ndarray]:
    """Training seconds and the judge on validation prompts."""
    return tuple(np.array([row[key] for row in summary["history"]]) for key in ("seconds", "judge"))  # type: ignore[return-value]


def reached(summary: dict, level: float) -> float:
    """Training seconds until the judge is at a level, between the two evaluations around it; inf if never."""
    seconds, judge = curve(summary)
    above = np.flatnonzero(judge >= level)
    if not len(above):
        return float("inf")
    i = above[0]
    if i == 0:
        return 0.0
    return float(np.interp(level, judge[i - 1 : i + 1], seconds[i - 1 : i + 1]))


def at_time(summary: dict, seconds: float) -> float:
    """The judge at a time."""
    return float(np.interp(seconds, *curve(summary)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/compare-alignment"))
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of a run, evaluations included")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    ways = {name: WAYS[name] for name in args.ways}

    def one(job: tuple[str, float, int]) -> dict:
        way, rate, seed = job
        return run(args.folder, way, ways[way], rate, seed, args.minutes)

    with ThreadPoolExecutor(args.jobs) as pool:
        sweep = [(way, rate, 0) for way in ways for rate in args.rates]
        found = dict(zip(sweep, pool.map(one, sweep)))
        best = {way: max(args.rates, key=lambda r: curve(found[way, r, 0])[1].max()) for way in ways}
        rest = [(way, best[way], seed) for way in ways for seed in range(1, args.seeds)]
        found |= dict(zip(rest, pool.map(one, rest)))

    console = Console(width=150)
    table = Table(title="learning rates, seed 0", box=None, header_style="bold", pad_edge=False, title_justify="left")
    for i, name in enumerate(
        ("", "lr", "updates", "judge at the start", "best", "at s", "last", "reward, start", "last")
    ):
        table.add_column(name, justify="left" if i == 0 else "right")
    rows = []
    for (way, rate, seed), summary in found.items():
        seconds, judge = curve(summary)
        top, history = int(judge.argmax()), summary["history"]
        rows.append(
            {"way": way, "lr": rate, "seed": seed, "updates": summary["updates"], "start": judge[0], "best": judge[top],
             "best_seconds": seconds[top], "last": judge[-1], "reward_start": history[0]["reward"],
             "reward_last": history[-1]["reward"], "test_before": summary["judge_before"], "test_after": summary["judge_after"],
             "diversity": summary["diversity_after"] / summary["diversity_before"], "seconds": seconds[-1]}
        )  # fmt: skip
        if seed == 0:
            r = rows[-1]
            table.add_row(
                way, f"{rate:g}", str(r["updates"]), f"{r['start']:.3f}", f"{r['best']:.3f}", f"{r['best_seconds']:.0f}",
                f"{r['last']:.3f}", f"{r['reward_start']:+.2f}", f"{r['reward_last']:+.2f}",
            )  # fmt: skip
    console.print(table)
    frame = pd.DataFrame(rows)
    frame.to_parquet(args.folder / "alignment.parquet")

    seeds = range(args.seeds)
    level = half = None
    if "flow-grpo" in ways:
        rival = max((w for w in ways if w.startswith("flow-grpo")), key=lambda w: curve(found[w, best[w], 0])[1].max())
        flows = [found[rival, best[rival], s] for s in seeds]
        half = float(np.mean([curve(f)[0][-1] / 2 for f in flows]))
        level = float(np.mean([at_time(f, half) for f in flows]))
        console.print(f"\n{rival} at half of its time ({half:.0f} s): judge {level:.3f}, mean of {len(seeds)} seeds")
    table = Table(title=f"best learning rate, {len(seeds)} seeds: mean (each)", box=None, header_style="bold",
                  pad_edge=False, title_justify="left")  # fmt: skip
    for i, name in enumerate(
        ("", "lr", "best judge, val", "judge, test before", "test after", "diversity", "seconds to that level")
    ):
        table.add_column(name, justify="left" if i == 0 else "right")
    for way in ways:
        some = frame[(frame["way"] == way) & (frame["lr"] == best[way])]
        cells = [way, f"{best[way]:g}"]
        for key, form in (("best", ".3f"), ("test_before", ".3f"), ("test_after", ".3f"), ("diversity", ".2f")):
            each = ", ".join(format(v, form) for v in some[key])
            cells.append(f"{some[key].mean():{form}} ({each})")
        times = [reached(found[way, best[way], s], level) for s in seeds] if level is not None else []
        cells.append(", ".join(f"{t:.0f}" for t in times))
        table.add_row(*cells)
    console.print(table)

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for way, color in zip(ways, ("#c8553d", "#2f5d8a", "#7fb0dd", "#5a8f5a")):
        for seed in seeds:
            seconds, judge = curve(found[way, best[way], seed])
            label = f"{way}, lr {best[way]:g}" if seed == 0 else None
            axes.plot(seconds, judge, color=color, lw=1.5, alpha=0.8, label=label)
    axes.set(xlabel="training seconds", ylabel="judge, validation prompts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(args.folder / "curves.png")
    console.print(f"{args.folder}")


if __name__ == "__main__":
    main()
