"""Every algorithm of `drm grpo`, each at its own best learning rate, on the embedded world.

    python examples/studies/compare_alignment.py [FOLDER] [--minutes 3] [--seeds 3] [--jobs 1] [--ways step-grpo direct ...] [--rates
    1e-3 ...] [--captions 96] [--updates N] [--set KEY=VALUE ...]

Step-wise GRPO, TempFlow-GRPO and Flow-GRPO, DiffusionNFT with terminal and with step-wise rewards, and direct gradients
of the reward; two of them also without the KL, to see what it costs.

Every algorithm is run with seed 0 at the same learning rates for the same training time; the best rate by the judge on
validation prompts is then run with the other seeds. Printed: the judge on test prompts, which chose nothing, before and
after; the best level on validation prompts and when it was reached; the seconds until the level that Flow-GRPO has
after half of its time. Training seconds are those of drawing and learning alone. Diversity is the mean distance of two
pictures of a test prompt, as a share of the start's, of all pictures and of those that the judge finds flawless (0.9
and above). The default, step-grpo, and the best of the others then draw 96 test captions x 4 pictures with all their seeds, and
the difference in the judge is printed with its interval, paired by caption and picture. Runs are kept in the folder and go on
where they stopped. Writes alignment.parquet and curves.png. Small and quick: --minutes 0.2 --seeds 1 --rates 2e-3
--captions 4 --set eval_prompts=4.
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
from PIL import Image
from rich.console import Console
from rich.table import Table

from drmcli.config import resolve
from drmcli.measure.intervals import paired_ci
from drmcli.recipes import sample
from drmcli.run import Silent
from drmcli.scorers.plain import shapes
from drmcli.tiny import world

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
    "nft": ["--algorithm", "nft", "--set", "eval_every=2", "--set", "nft_levels=2"],
    "nft-step": ["--algorithm", "nft-step", "--set", "eval_every=2", "--set", "nft_levels=2"],
    "direct": ["--algorithm", "direct", "--set", "direct_steps=2"],
    "direct, refl": ["--algorithm", "direct", "--set", "direct_form=refl"],
    "step-grpo, no KL": ["--kl-beta", "0"],
    "direct, no KL": ["--algorithm", "direct", "--set", "direct_steps=2", "--kl-beta", "0"],
}
DEFAULT = "step-grpo"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FOREVER = 100_000


def place(folder: Path, way: str, rate: float, seed: int) -> Path:
    """A run's folder."""
    return folder / f"{way.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"


def judged(run_folder: Path, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """The judge [N] of what the best policy of a run draws for test captions, four pictures each, and each picture's caption [N]."""
    prompts = list(world.captions("test"))[:captions]
    flags = {"prompts": prompts, "num_images": 4, "reward": "none", "lora": str(run_folder / "lora"), "batch_size": 64,
             "out": str(run_folder) + "-drawn"}  # fmt: skip
    drawn = sample.run(resolve("sample", flags=flags), Silent())["images"]
    judge = shapes([Image.open(row["path"]) for row in drawn], [row["prompt"] for row in drawn])
    return np.asarray(judge), np.repeat(np.arange(len(prompts)), 4)


def run(folder: Path, way: str, options: list[str], rate: float, seed: int, args: argparse.Namespace) -> dict:
    """One run of `drm grpo`, or what it left when it was run before."""
    out = place(folder, way, rate, seed)
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "drmcli", "grpo", "--out", str(out), "--seed", str(seed), "--lr", str(rate), "--quiet",
                   "--updates", str(args.updates), "--max-time", str(args.minutes), "--on-hacking", "warn", *options]  # fmt: skip
        for item in args.set:
            command += ["--set", item]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
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


def ratio(summary: dict, name: str) -> float:
    """A figure after training as a share of the one before; NaN where one of them could not be had."""
    before, after = summary[f"{name}_before"], summary[f"{name}_after"]
    return float("nan") if before is None or after is None else after / before


def row_of(way: str, rate: float, seed: int, summary: dict) -> dict:
    """One run as a row of alignment.parquet."""
    seconds, judge = curve(summary)
    top, history = int(judge.argmax()), summary["history"]
    return {
        "way": way, "lr": rate, "seed": seed, "updates": summary["updates"], "start": judge[0], "best": judge[top],
        "best_seconds": seconds[top], "last": judge[-1], "reward_start": history[0]["reward"],
        "reward_last": history[-1]["reward"], "test_before": summary["judge_before"], "test_after": summary["judge_after"],
        "diversity": ratio(summary, "diversity"), "diversity_flawless": ratio(summary, "diversity_flawless"),
        "seconds": seconds[-1],
    }  # fmt: skip


def table_of(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    """Names to the left, figures to the right."""
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def rates_table(frame: pd.DataFrame) -> Table:
    """Every way at every rate."""
    rows = [
        [
            r.way, f"{r.lr:g}", str(r.updates), f"{r.start:.3f}", f"{r.best:.3f}", f"{r.best_seconds:.0f}", f"{r.last:.3f}",
            f"{r.reward_start:+.2f}", f"{r.reward_last:+.2f}",
        ]
        for r in frame[frame["seed"] == 0].itertuples()
    ]  # fmt: skip
    columns = ("", "lr", "updates", "judge at the start", "best", "at s", "last", "reward, start", "last")
    return table_of("learning rates, seed 0", columns, rows)


def seeds_table(frame: pd.DataFrame, best: dict[str, float], times: dict[str, list[float]], seeds: int) -> Table:
    """Every way at its best rate, with all seeds."""
    rows = []
    for way, rate in best.items():
        some = frame[(frame["way"] == way) & (frame["lr"] == rate)]
        cells = [way, f"{rate:g}"]
        for key, form in (("best", ".3f"), ("test_before", ".3f"), ("test_after", ".3f"), ("diversity", ".2f"),
                          ("diversity_flawless", ".2f")):  # fmt: skip
            each = ", ".join(format(v, form) for v in some[key])
            cells.append(f"{some[key].mean():{form}} ({each})")
        rows.append([*cells, ", ".join(f"{t:.0f}" for t in times.get(way, []))])
    columns = (
        "",
        "lr",
        "best judge, val",
        "judge, test before",
        "test after",
        "diversity",
        "of the flawless",
        "s to that level",
    )
    return table_of(f"best learning rate, {seeds} seeds: mean (each)", columns, rows)


def plot(path: Path, curves: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    """The judge by training seconds; one colour a way, one line a seed."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, (label, lines) in enumerate(curves.items()):
        for j, (seconds, judge) in enumerate(lines):
            axes.plot(seconds, judge, color=f"C{i % 10}", lw=1.5, alpha=0.8, label=None if j else label)
    axes.set(xlabel="training seconds", ylabel="judge, validation prompts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/compare-alignment"))
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of a run, evaluations included")
    parser.add_argument("--updates", type=int, default=FOREVER, help="end a run after so many updates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--captions", type=int, default=96, help="test captions of the last comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, float, int]) -> dict:
        way, rate, seed = job
        return run(args.folder, way, WAYS[way], rate, seed, args)

    with ThreadPoolExecutor(args.jobs) as pool:
        sweep = [(way, rate, 0) for way in args.ways for rate in args.rates]
        found = dict(zip(sweep, pool.map(one, sweep)))
        best = {way: max(args.rates, key=lambda r: curve(found[way, r, 0])[1].max()) for way in args.ways}
        rest = [(way, best[way], seed) for way in args.ways for seed in range(1, args.seeds)]
        found |= dict(zip(rest, pool.map(one, rest)))

    console = Console(width=170)
    frame = pd.DataFrame([row_of(*job, summary) for job, summary in found.items()])
    frame.to_parquet(args.folder / "alignment.parquet")
    console.print(rates_table(frame))
    chosen = {way: [found[way, best[way], seed] for seed in range(args.seeds)] for way in args.ways}
    flows = [way for way in args.ways if way.startswith("flow-grpo")]
    times: dict[str, list[float]] = {}
    if flows:
        rival = max(flows, key=lambda way: curve(chosen[way][0])[1].max())
        half = float(np.mean([curve(s)[0][-1] / 2 for s in chosen[rival]]))
        level = float(np.mean([at_time(s, half) for s in chosen[rival]]))
        times = {way: [reached(s, level) for s in summaries] for way, summaries in chosen.items()}
        console.print(f"\n{rival} at half of its time ({half:.0f} s): judge {level:.3f}, mean of {args.seeds} seeds")
    console.print(seeds_table(frame, best, times, args.seeds))
    rivals = [way for way in args.ways if way != DEFAULT]
    if rivals and DEFAULT in args.ways:
        after = {way: float(np.mean([summary["judge_after"] for summary in chosen[way]])) for way in rivals}
        rival = max(rivals, key=lambda way: after[way])
        ours, theirs = (
            [judged(place(args.folder, way, best[way], seed), args.captions) for seed in range(args.seeds)]
            for way in (DEFAULT, rival)
        )
        gap = paired_ci(
            *(np.concatenate([judge for judge, _ in side]) for side in (ours, theirs)),
            np.concatenate([c for _, c in ours]),
        )
        console.print(
            f"\n{DEFAULT} less {rival}, judge of {gap.n} pictures of {gap.n_clusters} test captions: {gap.a:.3f} - {gap.b:.3f} ="
            f" {gap.value:+.4f} ({gap.ci95[0]:+.4f} to {gap.ci95[1]:+.4f})"
        )
    plot(
        args.folder / "curves.png",
        {f"{way}, lr {best[way]:g}": [curve(s) for s in some] for way, some in chosen.items()},
    )
    console.print(f"{args.folder}")


if __name__ == "__main__":
    main()
