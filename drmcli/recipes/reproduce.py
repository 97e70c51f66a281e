"""`drm reproduce`: the paper's experiments, from training to tables, or their miniature on the embedded world.

Every experiment is a run of another command in a folder of its own inside this run, so whatever stops it, the same command goes on
where it was. A part that lacks its data, a model or an access is named with what it lacks and left out; its figures stay empty.

Three parts, each the tables of the paper that it makes:
- reward: pre-trained, random and frozen starts, a smaller resolution, and accuracy by sigma;
- rl: Flow-GRPO by two scorers and by the reward model, Step-GRPO by the reward model, and GenEval before and after;
- sampling: Step-wise Sampling for k candidates a step, with seconds, scores and diversity.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from drmcli import results
from drmcli.config import Reproduce, resolve, spoken
from drmcli.data.prompts import read_prompts
from drmcli.errors import MissingError
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.measure import paper
from drmcli.measure.intervals import mean_ci
from drmcli.recipes import reproduce_plan
from drmcli.recipes.generated import Part
from drmcli.report import Report
from drmcli.run import SILENT, Reporter, Run, open_run, write_text
from drmcli.scorers import load_scorer
from drmcli.tiny import world

MINIATURE = "a miniature on other data and another model: not comparable"
STARTS: dict[str, dict[str, Any]] = {
    "pretrained": {"init": "pretrained"},
    "random": {"init": "random"},
    "frozen": {"init": "pretrained", "backbone": "frozen"},
}
"""Reward models that differ in their start and in what of them learns."""


@dataclass
class Stage:
    """Where the experiments are run, and what came of them."""

    config: Reproduce
    folder: Run
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Cells of the tables, see `cell`."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Experiments that could not be run, and why."""

    @property
    def miniature(self) -> bool:
        return self.config.preset == "tiny"

    def run(self, name: str, command: str, **flags: Any) -> dict[str, Any] | None:
        """Run one command in folder `name`. Returns its summary; None where something is missing, which is then on record."""
        c = self.config
        shared = {"seed": c.seed, "device": c.device, "dtype": c.dtype, "out": str(self.folder.folder / name)}
        settings = resolve(command, preset=c.preset, flags=shared | flags)
        recipe = import_module("drmcli.recipes." + command.replace("-", "_"))
        try:
            return recipe.run(settings, Part(self.folder.reporter, name))
        except MissingError as error:
            self.lacks(name, f"{error.message} ({error.hint})")
            return None

    def lacks(self, name: str, why: str) -> None:
        self.left_out.append({"experiment": name, "why": why})
        self.folder.warn(f"{name} is left out: {why}")

    def cell(
        self, table: str, row: str, column: str, published: float | None, ours: float | None,
        ci95: tuple[float, float] | list[float] | None = None, protocol: str = "", beware: str = "",
    ) -> None:  # fmt: skip
        """One figure of a table: the published one, ours with its interval, how it was counted, and what keeps them from being compared."""
        low, high = (float(x) if np.isfinite(x) else None for x in ci95) if ci95 else (None, None)
        self.rows.append(
            {
                "table": table, "row": row, "column": column, "published": published,
                "ours": float(ours) if ours is not None and np.isfinite(ours) else None, "low": low, "high": high, "protocol": protocol,
                "beware": MINIATURE if self.miniature else beware,
            }
        )  # fmt: skip


def run(config: Reproduce, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Run the parts that are asked for. Returns what summary.json holds: `tables` (a row a figure), `left_out`, `report`."""
    with open_run("reproduce", config, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite starts again")
            return folder.finished
        stage = Stage(config, folder)
        reward = train_rewards(stage)
        if "reward" in config.only:
            measure_rewards(stage, reward)
        if "rl" in config.only:
            align(stage, reward.get("pretrained"))
        if "sampling" in config.only:
            sample_stepwise(stage, reward.get("pretrained"))
        results.write(folder.folder / "tables.parquet", "reproduce", stage.rows, folder.id)
        device = pick_device(config.device)
        return folder.finish(
            {
                "seed": config.seed,
                "device": str(device),
                "dtype": {v: k for k, v in DTYPES.items()}[pick_dtype(config.dtype, device)],
                "seconds": round(time.monotonic() - folder.started, 2),
                "preset": config.preset,
                "parts": list(config.only),
                "tables": stage.rows,
                "left_out": stage.left_out,
                "report": str(write_report(stage)),
            }
        )


# --- reward models ------------------------------------------------------------------------------------------------------


def train_rewards(stage: Stage) -> dict[str, str]:
    """Train the reward models. Returns the folder of each that could be trained; only the first where only it is used."""
    c = stage.config
    wanted = STARTS if "reward" in c.only else {"pretrained": STARTS["pretrained"]}
    flags = {"steps": c.train_steps, "data_dir": c.data_dir}
    made: dict[str, str] = {}
    for name, differs in wanted.items():
        summary = stage.run(f"train-{name}", "train-reward", **flags | differs)
        if summary is None and name == "pretrained":
            break  # the others would lack the same data
        made |= {name: summary["reward"]} if summary else {}
    if made and "reward" in c.only:
        for side in c.resolutions:
            summary = stage.run(f"train-{side}px", "train-reward", resolution=side, **flags)
            made |= {f"{side}px": summary["reward"]} if summary else {}
    return made


def measure_rewards(stage: Stage, rewards: dict[str, str]) -> None:
    """Accuracy of every reward model on every dataset, and by sigma."""
    c = stage.config
    for dataset in c.datasets:
        for name, reward in rewards.items():
            sigmas = [0.0, *(s for s in c.sigmas if s)] if name == "pretrained" else [0.0]
            inner = Path(c.data_dir) / dataset if c.data_dir else None
            where = str(inner) if inner is not None and inner.is_dir() else c.data_dir
            flags: dict[str, Any] = {"dataset": dataset, "reward": reward, "data_dir": where, "sigmas": sigmas}
            flags |= {"resolution": int(name[:-2])} if name.endswith("px") else {}
            summary = stage.run(f"bench-{dataset}-{name}", "bench", pairs=c.bench_pairs, **flags)
            if summary is None:
                break  # the next reward model would lack the same data
            known = {"pretrained": paper.ACCURACY, "random": paper.RANDOM_START}.get(name, {})
            count = summary["protocol"]
            stage.cell(
                "accuracy", name, dataset, known.get(dataset), summary["accuracy"], summary["ci95"], count,
                "the paper does not say how it counts ties",
            )  # fmt: skip
            for row in summary["by_sigma"] if len(sigmas) > 1 else []:
                published = paper.BY_SIGMA.get(row["sigma"]) if dataset == "hpdv3" or stage.miniature else None
                stage.cell(
                    "accuracy by sigma", dataset, f"{row['sigma']:g}", published, row["accuracy"], row["ci95"], count,
                    "each picture has noise of its own; the paper does not say",
                )  # fmt: skip


# --- alignment ----------------------------------------------------------------------------------------------------------


def prompts_of(config: Reproduce) -> list[str]:
    """Prompts whose pictures are compared; nothing is trained on them."""
    source = list(world.captions("test")) if config.preset == "tiny" else read_prompts(config.eval_prompts or "")
    return source[: config.num_prompts]


def align(stage: Stage, reward: str | None) -> None:
    """Flow-GRPO by scorers and by the reward model, Step-GRPO by the reward model; each against the generator as it was."""
    c = stage.config
    if c.prompts is None or (not stage.miniature and c.eval_prompts is None):
        return stage.lacks("rl", "no prompts to learn from and to draw: give --prompts FILE and --eval-prompts FILE")
    runs = [(name, ref, "flow-grpo") for name, ref in zip(("pickscore", "hpsv3"), c.rewards)]
    runs += [("drm", reward, "flow-grpo"), ("drm", reward, "step-grpo")] if reward else []
    if not reward:
        stage.lacks("rl by the reward model", "there is no trained reward model")
    known, prompts = paper.ALIGNED, prompts_of(c)
    drawn = stage.run("drawn-before", "sample", prompts=prompts, num_images=c.num_images, reward="none")
    if drawn is None:
        return None
    score(stage, "alignment", "before", drawn, known["before"])
    for name, ref, algorithm in runs:
        row = f"{name}, {algorithm}"
        aligned = stage.run(
            f"grpo-{name}-{algorithm}", "grpo", reward=ref, algorithm=algorithm, updates=c.updates, prompts=c.prompts,
            on_hacking="warn",
        )  # fmt: skip
        if aligned is None:
            continue
        drawn = stage.run(
            f"drawn-{name}-{algorithm}", "sample", prompts=prompts, num_images=c.num_images, reward="none",
            lora=aligned["lora_last"],
        )  # fmt: skip
        assert drawn is not None  # the same generator was drawn with before
        score(stage, "alignment", row, drawn, known[row])
        if algorithm == "step-grpo":
            geneval(stage, aligned["lora_last"])
    return None


def geneval(stage: Stage, lora: str) -> None:
    """GenEval overall of the generator as it was, and after Step-GRPO."""
    c = stage.config
    for when, ref, published in (("before", None, None), ("after", lora, paper.GENEVAL)):
        flags: dict[str, Any] = {
            "dataset": "geneval",
            "lora": ref,
            "num_images": c.num_images,
            "prompts": c.geneval_prompts,
        }
        inner = Path(c.data_dir) / "geneval" if c.data_dir else None
        summary = stage.run(f"geneval-{when}", "bench", data_dir=str(inner) if inner else None, **flags)
        if summary is None:
            return
        stage.cell(
            "GenEval", f"{when} Step-GRPO", "overall", published, summary["accuracy"], summary.get("ci95"), summary["detector"],
            "the reference's detector has other weights",
        )  # fmt: skip


# --- sampling -----------------------------------------------------------------------------------------------------------


def sample_stepwise(stage: Stage, reward: str | None) -> None:
    """Step-wise Sampling with k candidates a step: seconds a picture, scores, diversity."""
    c = stage.config
    if reward is None:
        return stage.lacks("sampling", "there is no trained reward model")
    if not stage.miniature and c.eval_prompts is None:
        return stage.lacks("sampling", "no prompts to draw: give --eval-prompts FILE")
    for k in c.beams:
        drawn = stage.run(
            f"sample-{k}", "sample", prompts=prompts_of(c), num_images=c.num_images, reward=reward, mode="stepwise", beams=k,
        )  # fmt: skip
        if drawn is None:
            return None
        seconds, *scores, lpips = paper.SAMPLING.get(k, (None,) * 5)
        count = len(drawn["images"])
        stage.cell(
            "step-wise sampling", f"k = {k}", "seconds a picture", seconds, drawn["seconds"] / count, None,
            f"wall time of {count} pictures, loading included", "another machine",
        )  # fmt: skip
        score(stage, "step-wise sampling", f"k = {k}", drawn, tuple(scores))
        stage.cell(
            "step-wise sampling", f"k = {k}", "diversity", lpips, diversity(drawn["images"]), None,
            "mean absolute pixel difference of a prompt's pictures", "the paper's is LPIPS: another measure",
        )  # fmt: skip
    return None


def score(stage: Stage, table: str, row: str, drawn: dict[str, Any], published: tuple[float | None, ...]) -> None:
    """Mean score of drawn pictures by each scorer, with an interval clustered by prompt."""
    c = stage.config
    device = pick_device(c.device)
    images = drawn["images"]
    prompts = [image["prompt"] for image in images]
    for ref, known in zip(c.scorers, published):
        path = stage.folder.path("scores", f"{Path(drawn['run']).name}-{c.scorers.index(ref)}.parquet")
        if not results.readable(path, stage.folder.warn):
            try:
                scorer = load_scorer(
                    ref, device=device, dtype=pick_dtype(c.dtype, device), kernels=Kernels.of(c, device)
                )
            except MissingError as error:
                stage.lacks(f"{table}: {spoken(ref)}", f"{error.message} ({error.hint})")
                continue
            values: list[float] = []
            for i in range(0, len(images), c.batch_size):
                some = [Image.open(image["path"]).convert("RGB") for image in images[i : i + c.batch_size]]
                values += scorer.score_images(some, prompts[i : i + c.batch_size]).tolist()
                stage.folder.reporter.progress(f"{row}: scored by {spoken(ref)}", len(values), len(images))
            rows = [
                {"dataset": table, "image": image["path"], "prompt_id": "", "prompt": image["prompt"], "sigma": 0.0, "score": value}
                for image, value in zip(images, values)
            ]  # fmt: skip
            results.write(path, "scores", rows, stage.folder.id)
            del scorer
        found = mean_ci(results.read(path)["score"].to_numpy(float), np.unique(prompts, return_inverse=True)[1])
        stage.cell(
            table,
            row,
            spoken(ref),
            known,
            found.value,
            found.ci95,
            "mean of pictures, clustered by prompt",
            "other prompts",
        )


def diversity(images: list[dict[str, Any]]) -> float | None:
    """Mean absolute difference, 0 to 1, between the pictures of a prompt; None with one picture a prompt."""
    apart = []
    for _, group in pd.DataFrame(images).groupby("prompt", sort=False):
        pixels = (
            torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))) for p in group["path"]]).float() / 255
        )
        n = len(pixels)
        apart += [(pixels[i] - pixels[j]).abs().mean().item() for i in range(n) for j in range(i)]
    return float(np.mean(apart)) if apart else None


# --- plan and report ----------------------------------------------------------------------------------------------------


def plan(config: Reproduce) -> dict[str, Any]:
    """What `--dry-run` prints."""
    return reproduce_plan.plan(config, len(STARTS))


def write_report(stage: Stage) -> Path:
    """report.html: every table with the published figure beside ours."""
    page = Report("The paper's tables, and ours")
    page.text(
        "DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026. A row a figure: what the paper published, what this run "
        "measured with its 95 % interval, how it was counted, and why the two may not be compared."
    )
    if stage.miniature:
        page.text(
            "This is the miniature on the embedded world, a tiny pipeline that draws coloured shapes. The published figures "
            "stand beside it to show what each cell is; they are not comparable."
        )
    for table in dict.fromkeys(row["table"] for row in stage.rows):
        page.heading(table)
        page.table(
            ["", "figure", "published", "ours", "95 % interval", "counted", "beware"],
            [cells(row) for row in stage.rows if row["table"] == table],
        )
    if stage.left_out:
        page.heading("Left out")
        page.table(["experiment", "why"], [[row["experiment"], row["why"]] for row in stage.left_out])
    page.text(
        f"Seed {stage.config.seed}. Each experiment is a run folder with its config, metrics and tables.", soft=True
    )
    path = stage.folder.folder / "report.html"
    write_text(path, page.render())
    return path


def cells(row: dict[str, Any]) -> list[str]:
    """A figure as the seven words of its table row; what is not known is a dash."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    interval = "-" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    return [
        row["row"],
        row["column"],
        number(row["published"]),
        number(row["ours"]),
        interval,
        row["protocol"],
        row["beware"],
    ]
