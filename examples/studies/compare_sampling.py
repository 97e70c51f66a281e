"""Is search with scores of noisy states better than drawing several pictures and keeping the best? Measured at equal cost.

    python examples/studies/compare_sampling.py [FOLDER] [--prompts 96] [--seeds 4] [--guidance 1] [--only TEXT...]
    python examples/studies/compare_sampling.py [FOLDER] --bed two-objects --split test --skip 0 --prompts 200 --seeds 2

Captions that nothing was trained on. For every way to sample: the judge (a pixel-space score that no model was trained on), the share of
very good pictures (judge above 0.9), the reward, diversity over seeds, cost in generator-equivalents and seconds. Differences are paired by
prompt and seed, with 95 % intervals clustered by prompt.

The bed `all` has captions of all kinds and names two rivals of about one cost, best-of-3 (with guidance best-of-2) by the ODE and by
CPS. The beds `two-objects` (ten steps) and `two-objects-6-steps` have room at the top; there every way is compared with best-of-N
*at its own cost*: where that lies between N and N + 1, their mixture. All starts share the first forward pass, the rivals' too.
Every picture there has noise of its own: captions that share it are not independent, and with two seeds for all of them best-of-3
came out above best-of-6. Oracle rows keep the best by the judge itself. Choose on `--split val`; `--split test`, which chose
nothing, confirms. Writes comparison-*.parquet and pareto-*.png.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from drmcli.config import package_path, resolve
from drmcli.generator import Generator
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.sampling import Search, sample
from drmcli.scorers import load_scorer
from drmcli.scorers.combine import COMBINE, Combined, Term
from drmcli.scorers.drm import RewardScorer
from drmcli.tiny import world
from drmcli.tiny.judge import judge

CPS = {"step_rule": "cps"}
WAYS: dict[str, dict] = {
    "plain ODE": {},
    "plain CPS a=0.9": CPS | {"noise_level": 0.9},
    "plain CPS a=1.0, 34 steps": CPS | {"noise_level": 1.0, "num_inference_steps": 34},
    "best-of-2 ODE": {"mode": "best-of-n", "starts": 2},
    "best-of-3 ODE": {"mode": "best-of-n", "starts": 3},
    "best-of-4 ODE": {"mode": "best-of-n", "starts": 4},
    "best-of-2 CPS a=1.0": CPS | {"mode": "best-of-n", "starts": 2, "noise_level": 1.0},
    "best-of-4 CPS a=1.0": CPS | {"mode": "best-of-n", "starts": 4, "noise_level": 1.0},
    "best-of-3 CPS a=0.9": CPS | {"mode": "best-of-n", "starts": 3, "noise_level": 0.9},
    "best-of-3 CPS a=1.0": CPS | {"mode": "best-of-n", "starts": 3, "noise_level": 1.0},
    "step-wise k=1 CPS a=0.9": {"mode": "stepwise", "beams": 1},
    "step-wise k=2 CPS a=0.9": {"mode": "stepwise", "beams": 2},
    "step-wise k=4 CPS a=0.9": {"mode": "stepwise", "beams": 4},
    "step-wise k=6 CPS a=0.9": {"mode": "stepwise", "beams": 6},
    "step-wise k=8 CPS a=0.9": {"mode": "stepwise", "beams": 8},
    "step-wise k=4 Flow-SDE a=0.7": {
        "mode": "stepwise",
        "beams": 4,
        "step_rule": "flow-sde",
        "noise_level": 0.7,
    },
    "step-wise k=4, sigma >= 0.3": {"mode": "stepwise", "beams": 4, "branch_sigmas": (0.3, 1.0)},
    "step-wise k=2 a=1.0, 18 steps, sigma >= 0.3": {
        "mode": "stepwise",
        "beams": 2,
        "noise_level": 1.0,
        "num_inference_steps": 18,
        "branch_sigmas": (0.3, 1.0),
    },
    "step-wise k=2 a=1.0, sigma >= 0.6": {
        "mode": "stepwise",
        "beams": 2,
        "noise_level": 1.0,
        "branch_sigmas": (0.6, 1.0),
    },
    "step-wise k=2 a=1.0, 26 steps, sigma >= 0.6": {
        "mode": "stepwise",
        "beams": 2,
        "noise_level": 1.0,
        "num_inference_steps": 26,
        "branch_sigmas": (0.6, 1.0),
    },
    "beam 2 x 2 CPS a=1.0, 14 steps, sigma >= 0.6": {
        "mode": "beam",
        "keep": 2,
        "beams": 2,
        "noise_level": 1.0,
        "num_inference_steps": 14,
        "branch_sigmas": (0.6, 1.0),
    },
    "beam 2 x 2 CPS a=1.0, sigma >= 0.87": {
        "mode": "beam",
        "keep": 2,
        "beams": 2,
        "noise_level": 1.0,
        "branch_sigmas": (0.87, 1.0),
    },
    "beam 3 x 2 CPS a=1.0, sigma >= 0.87": {
        "mode": "beam",
        "keep": 3,
        "beams": 2,
        "noise_level": 1.0,
        "branch_sigmas": (0.87, 1.0),
    },
    "beam 2 x 2 CPS a=0.9": {"mode": "beam", "keep": 2, "beams": 2},
    "halving 8 > 4 > 2 > 1 ODE": {"mode": "halving", "starts": 8},
    "halving 8 > 4 > 2 > 1 CPS a=1.0": CPS | {"mode": "halving", "starts": 8, "noise_level": 1.0},
    "halving 4 > 2 > 1 CPS a=1.0, 18 steps": CPS
    | {"mode": "halving", "starts": 4, "noise_level": 1.0, "num_inference_steps": 18},
    "SMC 4 CPS a=0.9": {"mode": "smc", "starts": 4},
}
MANY = CPS | {"mode": "best-of-n", "noise_level": 1.0, "share_first": True}
BEAM = CPS | {"mode": "beam", "noise_level": 1.0, "share_first": True, "keep": 2, "beams": 2}
HALVING = MANY | {"mode": "halving"}
FRONTIER = {f"best-of-{n}": MANY | {"starts": n} for n in range(1, 7)}
"""Best-of-N by CPS, the rival at every cost; one start is plain sampling."""
SEARCHES: dict[str, dict] = FRONTIER | {
    "oracle best-of-3": MANY | {"starts": 3},
    "oracle best-of-6": MANY | {"starts": 6},
    "step-wise k=4": {"mode": "stepwise", "beams": 4, "noise_level": 1.0},
    "step-wise k=4, sigma .28 to .86": {
        "mode": "stepwise",
        "beams": 4,
        "noise_level": 1.0,
        "branch_sigmas": (0.28, 0.86),
    },
    "halving 4 > 2 > 1 at .9, .75": HALVING | {"starts": 4},
    "halving 3 > 1 at .6": HALVING | {"starts": 3, "halving_sigmas": (0.61,)},
    "halving 4 > 2 at .6": HALVING | {"starts": 4, "halving_sigmas": (0.61,)},
    "halving 4 > 2 > 1 at .8, .3": HALVING | {"starts": 4, "halving_sigmas": (0.8, 0.3)},
    "halving 5 > 2 > 1 at .8, .3": HALVING | {"starts": 5, "halving_sigmas": (0.8, 0.3)},
    "halving 8 > 4 > 2 at .8, .7": HALVING | {"starts": 8, "halving_sigmas": (0.8, 0.71)},
    "halving 6 > 3 > 1 at .8, .5": HALVING | {"starts": 6, "halving_sigmas": (0.8, 0.5)},
    "best-of-2, refined": MANY | {"starts": 2, "refine": 1},
    "best-of-2, refined twice": MANY | {"starts": 2, "refine": 2},
    "best-of-2, refined by k=2": MANY | {"starts": 2, "refine": 1, "refine_beams": 2},
    "best-of-2, refined by k=2 twice": MANY | {"starts": 2, "refine": 2, "refine_beams": 2},
    "beam of 2": BEAM | {"starts": 2, "first_cut": 0.8, "branch_sigmas": (0.7, 0.8)},
    "beam of 3": BEAM | {"starts": 3, "first_cut": 0.8, "branch_sigmas": (0.7, 0.8)},
    "beam of 4": BEAM | {"starts": 4, "first_cut": 0.8, "branch_sigmas": (0.7, 0.8)},
    "beam of 4, refined by k=2": BEAM
    | {"starts": 4, "first_cut": 0.8, "branch_sigmas": (0.7, 0.8), "refine": 1, "refine_beams": 2},
}
"""Ways of the beds with room at the top; noise levels are those of `first_cut` and `branch_sigmas` at ten steps."""
BEDS = {
    "all": {"steps": 10, "ways": WAYS, "two": False},
    "two-objects": {"steps": 10, "ways": SEARCHES, "two": True},
    "two-objects-6-steps": {"steps": 6, "ways": SEARCHES, "two": True},
}
PAPER = {1: (2.88, 1.01, 16.76, 8.95, 0.650), 2: (5.63, 1.08, 16.84, 9.02, 0.661), 4: (7.75, 1.14, 16.81, 9.32, 0.663),
         6: (9.83, 1.15, 16.93, 9.49, 0.662)}  # fmt: skip
"""The paper's table on SD3.5-Medium: k, and seconds a picture, ImageReward, PickScore, HPSv3, LPIPS diversity."""
RIVALS = ("best-of-3 ODE", "best-of-3 CPS a=1.0")
GUIDED_RIVALS = ("best-of-2 ODE", "best-of-2 CPS a=1.0")
"""At about the cost of step-wise search with 4 candidates: guidance doubles the cost of a picture, and not of a reward call."""


def draw(
    generator: Generator,
    terms: list[Term],
    way: dict,
    captions: list[str],
    seeds: int,
    guidance: float,
    combine: str,
    own_noise: bool,
) -> dict:
    """All pictures of one way, [prompts * seeds] values each. own_noise: no two captions share the noise of their pictures."""
    reward = Combined(terms, generator.decode)
    defaults = {"num_inference_steps": 10, "guidance_scale": guidance, "max_batch": 128, "combine": combine}
    search = Search(**(defaults | way), pictures=reward.pictures)
    negative = generator.encode_negative("", guidance)
    ratio = sum(term.scorer.cost for term in terms if isinstance(term.scorer, RewardScorer))
    latents, scores, cost, started = [], [], 0.0, time.perf_counter()
    for i in range(0, len(captions), 16):
        some = [c for c in captions[i : i + 16] for _ in range(seeds)]
        cond = generator.encode_prompts(captions[i : i + 16])[torch.arange(len(some)) // seeds]
        out = sample(
            generator,
            reward,
            cond,
            reward.encode(some, lambda scorer, cond=cond: cond),
            [i * seeds + j if own_noise else j % seeds for j in range(len(some))],
            search,
            negative=negative,
            shape=(4, 16, 16),
        )
        latents.append(out.latents)
        scores.append(out.score)
        cost += out.calls.cost(ratio)
    seconds = time.perf_counter() - started
    x = torch.cat(latents)
    pixels = np.stack([np.asarray(p) for p in generator.decode(x)])
    texts = [c for c in captions for _ in range(seeds)]
    flat = pixels.astype(np.float32).reshape(len(captions), seeds, -1) / 255
    apart = np.sqrt(np.square(flat[:, :, None] - flat[:, None]).mean(-1)).sum((1, 2)) / max(1, seeds * (seeds - 1))
    return {
        "judge": judge(pixels, texts).score,
        "reward": torch.cat(scores).numpy(),
        "diversity": np.repeat(apart, seeds),
        "cost": cost / len(texts),
        "seconds": seconds / len(texts),
    }


def in_the_papers_form(results: dict[str, dict]) -> Table:
    """k against time, scores and diversity, beside the published table. Only the shapes of the two may be compared."""
    table = Table(title="\nin the paper's form", box=None, header_style="bold", pad_edge=False, title_justify="left")
    ours, theirs = (
        ("k", "ms", "time", "reward", "judge", "diversity"),
        ("paper: time", "ImageReward", "PickScore", "HPSv3", "LPIPS"),
    )
    for column in ours + theirs:
        table.add_column(column, justify="right")
    first = results["step-wise k=1 CPS a=0.9"]
    for k in (1, 2, 4, 6, 8):
        r = results[f"step-wise k={k} CPS a=0.9"]
        seconds, *scores = PAPER.get(k, (None,))
        published = [""] * 5 if seconds is None else [f"{seconds / PAPER[1][0]:.2f}", *(f"{x:g}" for x in scores)]
        table.add_row(
            str(k), f"{1000 * r['seconds']:.0f}", f"{r['seconds'] / first['seconds']:.2f}", f"{r['reward'].mean():+.2f}",
            f"{r['judge'].mean():.3f}", f"{r['diversity'].mean():.3f}", *published,
        )  # fmt: skip
    return table


def at_equal_cost(mine: dict, frontier: list[dict], value: str) -> np.ndarray | None:
    """Best-of-N's values a picture at the cost of a way; between N and N + 1 their mixture. None beyond the frontier's ends."""
    for low, high in pairwise(frontier):
        if low["cost"] - 0.01 <= mine["cost"] <= high["cost"] + 0.01:
            share = (mine["cost"] - low["cost"]) / (high["cost"] - low["cost"])
            return (1 - share) * low[value] + share * high[value]
    return None


def against_best_of_n(results: dict[str, dict], prompt: np.ndarray) -> Table:
    """Every search less best-of-N at its own cost, in the judge and in the share of very good pictures."""
    table = Table(
        title="\nless best-of-N at equal cost", box=None, header_style="bold", pad_edge=False, title_justify="left"
    )
    for i, column in enumerate(("", "cost", "judge", "95 %", "above 0.9", "95 %")):
        table.add_column(column, justify="left" if i == 0 else "right")
    frontier = [results[name] for name in FRONTIER]
    for r in results.values():
        r["good"] = (r["judge"] > 0.9).astype(float)
    for name, r in results.items():
        if name in FRONTIER or "oracle" in name:
            continue
        cells = []
        for value in ("judge", "good"):
            rival = at_equal_cost(r, frontier, value)
            if rival is None:
                cells += ["", "beyond best-of-N's costs"]
                continue
            d = paired_ci(r[value], rival, prompt)
            cells += [f"{d.value:+.4f}", f"{d.ci95[0]:+.4f} to {d.ci95[1]:+.4f}"]
        table.add_row(name, f"{r['cost']:.1f}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/compare-sampling"))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="only ways whose names hold one of these texts, and the rivals"
    )
    parser.add_argument("--bed", choices=BEDS, default="all", help="captions and steps")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val chooses, test confirms")
    parser.add_argument("--skip", type=int, default=0, help="captions left out at the beginning of the split")
    parser.add_argument("--reward", nargs="*", default=None, help="scorers that choose, in place of the preset's")
    parser.add_argument("--combine", choices=COMBINE, default="sum", help="several of them as one")
    args = parser.parse_args()
    bed = BEDS[args.bed]
    args.folder.mkdir(parents=True, exist_ok=True)
    config = resolve("sample")
    generator = Generator.load(config.generator, max_sequence_length=config.max_sequence_length)
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    terms = [Term(load_scorer(package_path(ref), **cpu), 1.0) for ref in args.reward or [config.reward]]
    oracle = [Term(load_scorer("shapes", **cpu), 1.0)]
    known = [c for c in world.captions(args.split) if not bed["two"] or len(world.parse(c).things) == 2]
    captions = known[args.skip : args.skip + args.prompts]
    prompt = np.repeat(np.arange(len(captions)), args.seeds)
    rivals = () if bed["two"] else RIVALS if args.guidance == 1 else GUIDED_RIVALS
    always = FRONTIER if bed["two"] else rivals
    ways = {name: way for name, way in bed["ways"].items() if name in always or any(text in name for text in args.only)}
    results = {}
    for name, way in ways.items():
        chosen = oracle if "oracle" in name else terms
        way = {"num_inference_steps": bed["steps"]} | way
        r = results[name] = draw(generator, chosen, way, captions, args.seeds, args.guidance, args.combine, bed["two"])
        print(
            f"{name}: judge {r['judge'].mean():.4f}, above 0.9 {(r['judge'] > 0.9).mean():.3f}, cost {r['cost']:.1f}",
            flush=True,
        )

    rows, console = [], Console(width=170)
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("", "judge", "+-", "above 0.9", "reward", "diversity", "cost", "ms", *(f"judge - {r}" for r in rivals))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, r in results.items():
        m = mean_ci(r["judge"], prompt)
        half = (m.ci95[1] - m.ci95[0]) / 2
        cells, gaps = [], {}
        for rival in rivals:
            d = paired_ci(r["judge"], results[rival]["judge"], prompt)
            gaps[rival] = d
            cells.append("" if rival == name else f"{d.value:+.3f} ({d.ci95[0]:+.3f} to {d.ci95[1]:+.3f})")
        good = float((r["judge"] > 0.9).mean())
        table.add_row(
            name, f"{m.value:.3f}", f"{half:.3f}", f"{good:.2f}", f"{r['reward'].mean():+.2f}", f"{r['diversity'].mean():.3f}",
            f"{r['cost']:.1f}", f"{1000 * r['seconds']:.0f}", *cells,
        )  # fmt: skip
        rows.append(
            {"way": name, "guidance": args.guidance, "judge": m.value, "judge_lo": m.ci95[0], "judge_hi": m.ci95[1],
             "good": good, "reward": float(r["reward"].mean()), "diversity": float(r["diversity"].mean()), "cost": r["cost"],
             "seconds": r["seconds"]}
        )  # fmt: skip
    console.print(
        f"bed {args.bed}, {len(captions)} {args.split} captions from {args.skip} on, {args.seeds} seeds, guidance {args.guidance:g},"
        f" {bed['steps']} steps unless said"
    )
    console.print(table)
    if bed["two"]:
        console.print(against_best_of_n(results, prompt))
    elif "" in args.only:
        console.print(in_the_papers_form(results))
    frame = pd.DataFrame(rows)
    name = f"guidance-{args.guidance:g}" + ("" if args.bed == "all" else f"-{args.bed}-{args.split}-{args.skip}")
    frame.to_parquet(args.folder / f"comparison-{name}.parquet")
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        color = "#c8553d" if row["way"].startswith("step-wise") else "#2f5d8a"
        axes.errorbar(
            row["cost"], row["judge"], yerr=(row["judge_hi"] - row["judge_lo"]) / 2, fmt="o", color=color, ms=4, lw=1
        )
        axes.annotate(row["way"], (row["cost"], row["judge"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="cost, generator-equivalents a picture", ylabel="judge", title=f"guidance {args.guidance:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.folder / f"pareto-{name}.png")
    console.print(f"{args.folder}")


if __name__ == "__main__":
    main()
