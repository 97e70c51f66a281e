"""What a reward model gains from the generator's own samples: from a generator and 200 captions to a better search.

    python examples/studies/own_samples.py OUT

runs `drm data make`, `drm train-reward --init` from the first embedded reward model (own samples and shapes mixed), `drm bench` on own
samples of other captions, and `drm sample --stepwise`, on the embedded world with the settings of the flags below. Beside what was
trained it prints what the first embedded reward model gives (`shipped` in its tables): pair accuracy by sigma (against the judge's order,
and against its noisy votes), and the judge of what a search draws at the same cost, paired by prompt and seed with an interval clustered
by prompt. It prints the seconds of the last way's steps too.

    --ways shapes own-ode own-cps mix-ode mix-cps      the ablation: shapes alone, own samples by either step rule, mixtures
    --captions 20 --num-images 4 --steps 20 ...        smaller
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drmcli.config import package_path, resolve
from drmcli.measure.intervals import paired_ci
from drmcli.run import Silent
from drmcli.scorers.plain import shapes
from drmcli.tiny import world

SHIPPED = "{package}/tiny/weights/reward"
SIGMAS = [0.0, 0.25, 0.45, 0.6, 0.8]
CPS = {"step_rule": "cps", "noise_level": 1.0}
SEARCHES: dict[str, dict[str, Any]] = {
    "stepwise": {"mode": "stepwise", "beams": 4},
    "halving": CPS | {"mode": "halving", "starts": 4, "halving_sigmas": [0.61]},
    "best-of-n": CPS | {"mode": "best-of-n", "starts": 3},
}
"""Ways to search at about one cost: 34.7, 36.0 and 32.0 forward passes at ten steps."""


class Study:
    """Runs of the commands in one folder; each is done once, and its seconds are kept."""

    def __init__(self, out: Path):
        self.out = out
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        """Of all cores: what the wall clock would show on a machine with nothing else to do, at most."""

    def run(self, command: str, name: str, **flags: Any) -> dict[str, Any]:
        began, worked = time.monotonic(), time.process_time()
        recipe = import_module("drmcli.recipes." + command.replace("-", "_"))
        found = recipe.run(resolve(command, flags=flags | {"out": str(self.out / name)}), Silent())
        self.seconds[name], self.processor[name] = time.monotonic() - began, time.process_time() - worked
        return found


def sets_of(way: str, own: dict[str, str], share: float) -> list[str]:
    """The data of a way of training."""
    kind, _, rule = way.partition("-")
    if kind == "shapes":
        return ["shapes"]
    return [own[rule]] if kind == "own" else [f"{own[rule]}={share}", f"shapes={1 - share:g}"]


def search(
    study: Study, name: str, way: str, reward: str, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, float]:
    """Judge of each picture that a search draws, its prompt's number, and the cost of one."""
    prompts = list(world.captions("test"))[: args.prompts]
    found = study.run(
        "sample", name, prompts=prompts, num_images=args.seeds, reward=reward, batch_size=64, **SEARCHES[way]
    )
    pictures = [Image.open(row["path"]) for row in found["images"]]
    judge = shapes(pictures, [row["prompt"] for row in found["images"]])
    return judge, np.repeat(np.arange(len(prompts)), args.seeds), found["cost"]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", default=["mix-cps"])
    parser.add_argument("--captions", type=int, default=200, help="captions that own samples are drawn for")
    parser.add_argument("--num-images", type=int, default=24, help="own samples a caption")
    parser.add_argument("--labels", default="soft", help="soft, drawn or hard")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.85, help="of own samples in a mixture")
    parser.add_argument("--steps", type=int, default=1250, help="of training")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=2e-3)
    parser.add_argument(
        "--shared-noise", action="store_true", help="the pictures of a prompt share their noise in training"
    )
    parser.add_argument(
        "--held-rule", default="cps", help="how held-out own samples are drawn: cps as search does, or ode"
    )
    parser.add_argument("--backbone", default="full", help="full or head")
    parser.add_argument("--shapes-prompts", type=int, default=400, help="captions of the other data")
    parser.add_argument("--held", type=int, default=96, help="held-out captions, eight pictures each")
    parser.add_argument("--prompts", type=int, default=96, help="of step-wise sampling")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--searches", nargs="+", default=["stepwise"], choices=SEARCHES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    study = Study(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    held_file = args.out / "held.txt"
    held_file.write_text("\n".join(list(world.captions("val"))[: args.held]) + "\n")
    judged = {"labels": "hard", "num_images": 8, "prompts": str(held_file), "seed": 1000, "batch_size": 64,
              "step_rule": args.held_rule}  # fmt: skip
    held = {
        "order": study.run("data-make", "held", **judged)["data"],
        "votes": study.run("data-make", "held-votes", **judged | {"labels": "drawn", "temperature": args.temperature})[
            "data"
        ],
    }
    rules = sorted({way.partition("-")[2] for way in args.ways} - {""})
    own = {
        rule: study.run(
            "data-make", f"own-{rule}", limit=args.captions, num_images=args.num_images, step_rule=rule,
            labels=args.labels, temperature=args.temperature, batch_size=64, seed=args.seed,
        )["data"]
        for rule in rules
    }  # fmt: skip
    rewards = {"shipped": package_path(SHIPPED)}
    for way in args.ways:
        rewards[way] = study.run(
            "train-reward", f"reward-{way}", init=SHIPPED, data=sets_of(way, own, args.share), eval_data=[held["order"]],
            eval_pairs=200, steps=args.steps, batch_size=args.batch_size, lr=args.lr, head_lr=args.head_lr,
            lr_schedule="cosine", shared_noise=args.shared_noise, backbone=args.backbone,
            shapes_prompts=args.shapes_prompts, seed=args.seed,
        )["reward"]  # fmt: skip
    table: dict[str, dict[str, Any]] = {}
    shipped: dict[str, np.ndarray] = {}
    for name, reward in rewards.items():
        row: dict[str, Any] = {}
        for kind, data in held.items():
            found = study.run("bench", f"bench-{kind}-{name}", dataset=data, reward=reward, sigmas=SIGMAS)
            row[kind] = [at["accuracy"] for at in found["by_sigma"]]
        row["searches"] = {}
        for way in args.searches:
            judge, cluster, cost = search(study, f"{way}-{name}", way, reward, args)
            gap = paired_ci(judge, shipped.setdefault(way, judge), cluster)
            good = 100 * float((judge > 0.9).mean())
            row["searches"][way] = {
                "judge": float(judge.mean()), "good": good, "cost": cost, "gain": gap.value, "gain_ci95": list(gap.ci95)
            }  # fmt: skip
        table[name] = row
    show(table, study, args)
    return {"table": table, "seconds": study.seconds}


def show(table: dict[str, dict[str, Any]], study: Study, args: argparse.Namespace) -> None:
    for kind, title in (("order", "the judge's order"), ("votes", "its noisy votes")):
        print(f"pair accuracy on held-out own samples against {title}, percent, by noise level {SIGMAS}")
        for name, row in table.items():
            gain = row[kind][0] - table["shipped"][kind][0]
            print(f"  {name:10}" + "".join(f"{value:7.1f}" for value in row[kind]) + f"   at 0: {gain:+.1f}")
    for way in args.searches:
        print(f"{way}, {args.prompts} prompts x {args.seeds} seeds: judge, share above 0.9, cost")
        for name, row in table.items():
            found = row["searches"][way]
            low, high = found["gain_ci95"]
            print(
                f"  {name:10} {found['judge']:.4f}  {found['good']:.1f} %  {found['cost']:.1f}"
                f"   less shipped {found['gain']:+.4f} ({low:+.4f} to {high:+.4f})"
            )
    last = args.ways[-1]
    path = [p for p in (f"own-{last.partition('-')[2]}", f"reward-{last}", f"stepwise-{last}") if p in study.seconds]
    for kind, seconds in (("wall", study.seconds), ("processor", study.processor)):
        each = ", ".join(f"{p} {seconds[p]:.0f}" for p in path)
        print(f"{kind} seconds: {each}, together {sum(seconds[p] for p in path):.0f}")


if __name__ == "__main__":
    main()
