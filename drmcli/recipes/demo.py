"""`drm demo`: the whole story on the embedded world.

Does pre-training matter? Two reward models are trained at the same budget, one on the pre-trained transformer, one on the same
architecture with random weights; both are measured at every sigma; pictures are scored; the better one steers the
sampler, step by step, against plain sampling and best-of-N; the reward model that ships aligns the generator; a report tells it
on one page.
Each step is a run of its own inside the demo's folder, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drmcli.config import Demo, resolve
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.plots import accuracy_by_noise
from drmcli.recipes import bench, grpo, sample, train_reward
from drmcli.report import Report
from drmcli.reward import RewardModel
from drmcli.run import SILENT, Reporter, Run, guarded, open_run, write_text
from drmcli.sheets import note_of
from drmcli.tiny import world
from drmcli.tiny.judge import judge

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "best of 3": {"mode": "best-of-n", "starts": 3, "step_rule": "cps"},
    "step-wise": {"mode": "stepwise", "beams": 4},
}
"""How pictures are drawn; the last two cost about the same."""
DRAWN, SHOWN = 24, 5
"""Captions that are drawn from, and that are shown."""
EXAMPLES = 6
"""Captions with scored pictures in the report."""


@dataclass
class Titled:
    """A reporter that names the part of the story in front of each task."""

    inner: Reporter
    title: str

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        self.inner.progress(f"{self.title}: {task}", done, total, **fields)

    def note(self, text: str) -> None:
        self.inner.note(f"{self.title}: {text}")

    def warn(self, text: str) -> None:
        self.inner.warn(f"{self.title}: {text}")


def run(config: Demo, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Tell the story. Returns what summary.json holds."""
    with open_run("demo", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite tells the story again")
            return folder.finished
        common = {"seed": config.seed, "device": config.device}
        trained = {}
        for init, title in (("pretrained", "pre-trained"), ("random", "random start")):
            flags = common | {"out": str(folder.folder / f"train-{init}"), "init": init, "steps": config.steps}
            trained[init] = train_reward.run(resolve("train-reward", flags=flags), Titled(reporter, title))
        reward = trained["pretrained"]["reward"]
        flags = common | {
            "out": str(folder.folder / "bench"),
            "reward": reward,
            "pairs": 600,
            "sigmas": [0.25],
            "noise_samples": 4,
        }
        measured = bench.run(resolve("bench", flags=flags), Titled(reporter, "bench"))
        drawn = {}
        for title, options in WAYS.items():
            flags = (
                common | options | {"out": str(folder.folder / f"sample-{title.replace(' ', '-')}"), "reward": reward}
            )
            flags |= {"prompts": list(world.captions("test"))[:DRAWN], "num_images": 2, "batch_size": 16}
            drawn[title] = sample.run(resolve("sample", flags=flags), Titled(reporter, title))
            drawn[title]["judge"] = judged(drawn[title]["images"])
        flags = common | {"out": str(folder.folder / "grpo"), "updates": config.updates, "eval_every": 5}
        aligned = grpo.run(resolve("grpo", flags=flags), Titled(reporter, "align"))
        examples = scored_examples(reward, config)
        report = write_report(folder, config, trained, measured, drawn, aligned, examples)
        device = pick_device(config.device)
        return folder.finish(
            {
                "seed": config.seed,
                "device": str(device),
                "dtype": {v: k for k, v in DTYPES.items()}[pick_dtype("auto", device)],
                "seconds": round(time.monotonic() - folder.started, 2),
                "report": str(report),
                "pretrained": trained["pretrained"],
                "random": trained["random"],
                "bench": measured,
                "grpo": aligned,
                "sample": {mode: {k: v for k, v in s.items() if k != "images"} for mode, s in drawn.items()},
            }
        )


def judged(images: list[dict[str, Any]]) -> float:
    """Mean score of the judge for drawn pictures."""
    pixels = np.stack([np.asarray(Image.open(row["path"]).convert("RGB")) for row in images])
    return float(judge(pixels, [row["prompt"] for row in images]).score.mean())


@dataclass
class Example:
    """A caption and four pictures, best score first."""

    caption: str
    pictures: list[Image.Image]
    scores: list[float]
    judged: list[float]


def scored_examples(reward: str, config: Demo) -> list[Example]:
    """Held-out captions, each with one clean and three flawed pictures, scored by the reward model and by the judge."""
    rng = np.random.default_rng(config.seed)
    captions = list(world.captions("test"))[:EXAMPLES]
    clean = world.draw(captions, rng)
    flawed = world.draw([c for c in captions for _ in range(3)], rng, flawed=1.0)
    model = RewardModel.from_pretrained(reward, device=pick_device(config.device))
    out = []
    for i, caption in enumerate(captions):
        pixels = np.concatenate([clean[i : i + 1], flawed[3 * i : 3 * i + 3]])
        pictures = [Image.fromarray(p) for p in pixels]
        scores = model.score_images(pictures, [caption] * 4, sigmas=[0.25], noise_samples=4, seed=config.seed)[
            :, 0
        ].tolist()
        judged = judge(pixels, [caption] * 4).score.tolist()
        order = sorted(range(4), key=lambda j: -scores[j])
        out.append(
            Example(caption, [pictures[j] for j in order], [scores[j] for j in order], [judged[j] for j in order])
        )
    return out


def write_report(
    folder: Run,
    config: Demo,
    trained: dict[str, Any],
    measured: dict[str, Any],
    drawn: dict[str, Any],
    aligned: dict[str, Any],
    examples: list[Example],
) -> Path:
    """report.html and its plot."""
    a, b = trained["pretrained"], trained["random"]
    plot = folder.folder / "accuracy_by_noise.png"
    with guarded(plot):
        accuracy_by_noise(
            plot,
            {"pre-trained": a["eval_by_sigma"], "random start": b["eval_by_sigma"]},
            title=f"held-out pairs after {config.steps} steps",
        )
    page = Report("A diffusion model as a reward model")
    page.text(
        "A text-to-image transformer, cut short and given a small head, learns from preference pairs which of two pictures people "
        "like better, and can say so at any sigma, the share of noise in a latent. Everything here was made by `drm demo` on the "
        "embedded world: pictures of coloured shapes, and a judge that plays the human.",
    )
    page.heading("Pre-training matters")
    page.text(f"The same {config.steps} steps, the same pairs; only the start of the transformer's weights differs.")
    page.picture(
        plot, "Accuracy on held-out pairs by sigma; 50 % is chance. It falls where little of the picture is left."
    )
    page.table(
        ["sigma", "pre-trained", "random start"],
        [
            [f"{x['sigma']:g}", f"{x['accuracy']:.1f} %", f"{y['accuracy']:.1f} %"]
            for x, y in zip(a["eval_by_sigma"], b["eval_by_sigma"])
        ],
    )
    lo, hi = measured["ci95"]
    page.text(
        f"drm bench on {measured['n_pairs']} pairs of held-out captions, four noise draws at sigma {measured['sigma']:g}: "
        f"{measured['accuracy']:.1f} % (95 % interval {lo:.1f} to {hi:.1f})."
    )
    page.heading("Step-wise Sampling")
    k = drawn["step-wise"]["beams"]
    page.text(
        f"Plain sampling, drawing several pictures and keeping the best, and keeping the best of {k} candidates at every step, from the "
        "same seeds and with the same number of steps. The judge, whom no model was trained on, has the last word."
    )
    page.table(
        ["", "judge, 0 to 1", "reward model's score", "cost, forward passes a picture"],
        [[mode, f"{s['judge']:.3f}", f"{s['mean_score']:+.2f}", f"{s['cost']:.1f}"] for mode, s in drawn.items()],
    )
    for i in range(0, 2 * SHOWN, 2):
        rows = [s["images"][i] for s in drawn.values()]
        page.text(rows[0]["prompt"])
        captions = [f"{mode}: {note_of(row['seed'], row['score'])}" for mode, row in zip(drawn, rows)]
        page.row([Image.open(row["path"]) for row in rows], captions)
    page.heading("Step-wise GRPO")
    (lo, hi), (low, high) = aligned["judge_gain_ci95"], aligned["reward_gain_ci95"]
    page.text(
        f"{aligned['updates']} updates of a LoRA by the reward model that ships, rewarded at every noisy step. Pictures are drawn plainly, "
        f"without the reward model. On captions that chose nothing the judge goes from {aligned['judge_before']:.3f} to "
        f"{aligned['judge_after']:.3f} (95 % interval of the gain {lo:+.3f} to {hi:+.3f}), the reward from "
        f"{aligned['reward_before']:.2f} to {aligned['reward_after']:.2f} ({low:+.2f} to {high:+.2f})."
    )
    page.picture(folder.folder / "grpo" / "curve.png", "Reward and judge on validation captions, update by update.")
    page.picture(folder.folder / "grpo" / "before_after.png", "The same captions and seeds before and after.")
    show_examples(page, examples)
    page.heading("What was run")
    page.text(
        f"Seed {config.seed}. Each part is a run folder with its config, metrics and tables in {folder.folder}.",
        soft=True,
    )
    path = folder.folder / "report.html"
    write_text(path, page.render())
    return path


def show_examples(page: Report, examples: list[Example]) -> None:
    """Captions with their pictures, each with the reward model's score and the judge's."""
    page.heading("Pictures, best score first")
    page.text(
        "One clean and three flawed pictures a caption. The score is the reward model's, the judge's is from 0 to 1.",
        soft=True,
    )
    for example in examples:
        page.text(example.caption)
        page.row(example.pictures, [f"{s:+.2f} · judge {j:.2f}" for s, j in zip(example.scores, example.judged)])


def plan(config: Demo) -> dict[str, Any]:
    """What `--dry-run` prints."""
    return {
        "train-reward": f"twice {config.steps} steps, from the pre-trained transformer and from random weights",
        "bench": "600 pairs at sigma 0.25, four noise draws a picture",
        "sample": f"{DRAWN} captions, two pictures each: {', '.join(WAYS)}",
        "grpo": f"{config.updates} updates",
        "report": str(Path(config.out or "runs/demo") / "report.html"),
        "download": "nothing",
    }
