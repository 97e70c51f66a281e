"""Three seeds of `drm train-reward`, pre-trained and randomly initialised, on the embedded world.

    python examples/studies/reward_seeds.py [FOLDER]

Prints each run's wall time (a process of its own, cache building included), the accuracy by sigma, and whether averaging
four noise draws helps. Runs that are finished are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SEEDS = (0, 1, 2)


def drm(*args: str) -> dict:
    """One command in a process of its own, with its wall time."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "drmcli", *args, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout) | {"wall": time.perf_counter() - started}


def main(folder: Path) -> None:
    results: dict[str, list[dict]] = {"pretrained": [], "random": []}
    for seed in SEEDS:
        for init in results:
            place = folder / f"{init}-{seed}"
            cache = str(folder / f"cache-{init}-{seed}")  # of its own, so that building it is part of the time
            results[init].append(
                drm("train-reward", "--init", init, "--seed", str(seed), "--out", str(place), "--cache-dir", cache)
            )
    for init, runs in results.items():
        wall = ", ".join(f"{r['wall']:.0f} s" for r in runs)
        print(f"{init}: wall time {wall}")
        for i, row in enumerate(runs[0]["eval_by_sigma"]):
            values = [r["eval_by_sigma"][i]["accuracy"] for r in runs]
            each = ", ".join(f"{v:.1f}" for v in values)
            print(f"  noise level {row['sigma']:<5g} {statistics.mean(values):.1f} %   ({each})")
    for draws in (1, 4):
        values = []
        for seed in SEEDS:
            reward = results["pretrained"][seed]["reward"]
            out = str(folder / f"bench-{seed}-{draws}")
            args = [
                "--reward",
                reward,
                "--pairs",
                "1000",
                "--sigma",
                "0.25",
                "--noise-samples",
                str(draws),
                "--out",
                out,
            ]
            values.append(drm("bench", *args)["accuracy"])
        print(
            f"{draws} noise draw(s) at 0.25: {statistics.mean(values):.2f} %   ({', '.join(f'{v:.1f}' for v in values)})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/reward-seeds"))
    main(parser.parse_args().folder)
