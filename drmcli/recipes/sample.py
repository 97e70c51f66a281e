"""`drm sample`: prompts -> latents by plain sampling or search -> pictures, tables, a grid.

Pictures are drawn in batches; each batch's pictures and rows are written before the next is begun, so an interrupted run goes
on and makes no picture twice.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from drmcli import results
from drmcli.calls import Calls, States
from drmcli.config import Sample
from drmcli.data.preferences import text_id
from drmcli.errors import InputError
from drmcli.expected import expected_calls
from drmcli.families.base import check_negative
from drmcli.files import read_object
from drmcli.generator import DTYPES, Generator, PromptEmbeds, pick_device, pick_dtype
from drmcli.kernels import Kernels
from drmcli.recipes import methods
from drmcli.recipes.chooser import load_scorers, share_blocks
from drmcli.recipes.plan import Known, describe_generator
from drmcli.recipes.sheets import branch_tree
from drmcli.run import SILENT, Interruptions, Reporter, Run, guarded, open_run
from drmcli.sampling import Candidates, Samples, Search, sample
from drmcli.scorers import StateScorer
from drmcli.scorers.combine import Combined, Term
from drmcli.scorers.drm import RewardScorer
from drmcli.sheets import by_prompt, note_of, sheet

MOST = 1_000_000
"""Pictures of a run."""
IN_GRID = 64
"""Pictures of grid.png, the first."""


@dataclass
class Job:
    """One picture to draw."""

    number: int
    prompt: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.number:06d}"


def run(config: Sample, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Draw what is asked. Returns what summary.json holds."""
    asked = config
    config = methods.settled(config, reporter.note)
    jobs = [
        Job(p * config.num_images + i, prompt, config.seed + i)
        for p, prompt in enumerate([] if config.tune else checked_prompts(config))
        for i in range(config.num_images)
    ]
    with open_run("sample", asked, reporter) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite draws again")
            return folder.finished
        studio = Studio.open(config, folder)
        if config.tune:
            return folder.finish(methods.tune(config, folder, studio))
        images = results.Parts(folder.folder / "partial" / "images", "images", folder.id)
        candidates = results.Parts(folder.folder / "partial" / "candidates", "candidates", folder.id)
        counts = Counts.load(folder)
        done = finished_batches(images, candidates, folder) * config.batch_size
        with Interruptions() as interruptions:
            for start in range(min(done, len(jobs)), len(jobs), config.batch_size):
                some = jobs[start : start + config.batch_size]
                began = time.monotonic()
                samples = studio.draw(some, lambda step, total, at=start, n=len(some): folder.reporter.progress(
                    "sample", at * total + step * n, len(jobs) * total
                ))  # fmt: skip
                paths = studio.save(some, samples)
                counts.add(samples, time.monotonic() - began)
                for job, path, score in zip(some, paths, samples.score.tolist()):
                    images.add(
                        image_id=job.id, prompt_id=text_id(job.prompt), prompt=job.prompt, seed=job.seed, path=path,
                        score=score, mode=config.mode,
                    )  # fmt: skip
                _add_candidates(candidates, some, samples.candidates)
                number = start // config.batch_size
                candidates.flush(number)
                counts.save(folder)
                images.flush(number)  # last: its presence says that the batch is done
                if interruptions.asked and start + len(some) < len(jobs):
                    raise interruptions.stop(f"{start + len(some)} of {len(jobs)} pictures are in {folder.folder}")
        return finish(config, folder, studio, counts)


def finished_batches(images: results.Parts, candidates: results.Parts, folder: Run) -> int:
    """How many batches an interrupted run has left whole: rows, candidates and pictures. What comes after is drawn again."""
    rows, scored = images.whole(folder.warn), {number for number, _ in candidates.whole(folder.warn)}
    searched = bool(scored) or folder.path("partial", "candidates").is_dir()
    done = 0
    for number, table in rows:
        damaged = next((path for path in table["path"] if not _opens(folder.folder / path)), None)
        if damaged:
            folder.warn(f"{folder.folder / damaged}: a damaged or missing picture, which is drawn again")
        if number != done or damaged or (searched and number not in scored):
            break
        done += 1
    images.drop_after(done - 1)
    candidates.drop_after(done - 1)
    return done


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a PNG with a broken chunk
        return False
    return True


def checked_prompts(config: Sample) -> list[str]:
    """The prompts, none empty; a default one in the words of the embedded world is not guessed for other models."""
    if not config.prompts:
        raise InputError(
            "PROMPT: none is given", hint='for example drm sample "a large red circle above a small blue square"'
        )
    if any(not prompt.strip() for prompt in config.prompts):
        raise InputError("PROMPT: a prompt is empty", hint="say what to draw")
    if (count := len(config.prompts) * config.num_images) > MOST:
        raise InputError(
            f"--num-images {config.num_images}: of {len(config.prompts):,} prompts are {count:,} pictures, above {MOST:,}",
            hint="draw fewer of each, or the prompts in several runs",
        )
    methods.check_search(methods.search_of(config))
    return list(config.prompts)


@dataclass
class Studio:
    """Models and settings that draw a batch."""

    config: Sample
    folder: Run
    generator: Generator
    scorers: list[Term]
    """What chooses; none draws without choosing."""
    search: Search
    shape: tuple[int, int, int]
    negative: PromptEmbeds | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, config: Sample, folder: Run) -> Studio:
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        generator = Generator.load(
            config.generator,
            revision=config.revision,
            device=device,
            dtype=dtype,
            text_encoder_3=config.text_encoder_3,
            max_sequence_length=config.max_sequence_length,
            kernels=Kernels.of(config, device),
            vae_tiling=config.vae_tiling,
        )
        if config.true_cfg_scale > 1:
            generator.family = generator.family.with_true_cfg(config.true_cfg_scale)
        check_negative(generator.family, generator.model_config, config.negative_prompt, config.guidance_scale)
        shape = latent_shape(config, generator)
        scorers = load_scorers(config, device, dtype, generator)
        for term in scorers:
            term.scorer.check_prompts(config.prompts)
            if isinstance(term.scorer, RewardScorer) and (warning := term.scorer.share_encoders(generator)):
                folder.warn(warning)
        if config.lora:
            generator.load_lora(config.lora)
        if config.share_score:
            share_blocks(config, generator, scorers)
        cut = [p for p in config.prompts if generator.truncated(p)]
        if cut:
            folder.warn(f"{len(cut)} prompts are longer than the text encoders read; their ends are cut: {cut[0]!r}")
        negative = generator.encode_negative(config.negative_prompt, config.guidance_scale)
        return cls(config, folder, generator, scorers, methods.search_of(config), shape, negative, device, dtype)

    @property
    def reward_cost(self) -> float:
        """Of one call of all reward models, in forward passes of the generator; scorers of pictures are not counted."""
        return sum(term.scorer.cost for term in self.scorers if isinstance(term.scorer, RewardScorer))

    def reward(self, unique: list[str], cond: PromptEmbeds) -> tuple[States | None, Any, bool]:
        """What chooses, what it is told of the prompts, and whether it looks at pictures. cond: the generator's encodings."""

        def own(scorer: StateScorer) -> PromptEmbeds | None:
            shared = isinstance(scorer, RewardScorer) and scorer.model.generator() is self.generator
            return cond if shared else None

        if not self.scorers:
            return None, None, False
        first = self.scorers[0]
        if len(self.scorers) == 1 and first.weight == 1.0 and isinstance(first.scorer, RewardScorer):
            known = own(first.scorer)
            return first.scorer.model, first.scorer.encode(unique) if known is None else known, False
        combined = Combined(self.scorers, self.generator.decode)
        return combined, combined.encode(unique, own), combined.pictures

    def draw(self, jobs: list[Job], on_step: Any) -> Samples:
        """Latents of a batch; each distinct prompt is encoded once."""
        unique = list(dict.fromkeys(job.prompt for job in jobs))
        where = torch.tensor([unique.index(job.prompt) for job in jobs], device=self.device)
        cond = self.generator.encode_prompts(unique)
        reward, told, self.search.pictures = self.reward(unique, cond)
        return sample(
            self.generator,
            reward,
            cond[where],
            None if told is None else told[where],
            [job.seed for job in jobs],
            self.search,
            negative=self.negative,
            shape=self.shape,
            trace=self.config.trace,
            on_step=on_step,
        )

    def save(self, jobs: list[Job], samples: Samples) -> list[str]:
        """Decode and write a batch's pictures; the paths are relative to the run folder."""
        paths = []
        settings = {
            k: getattr(self.config, k)
            for k in (
                "mode",
                "beams",
                "starts",
                "refine",
                "steps",
                "guidance_scale",
                "true_cfg_scale",
                "noise_level",
                "generator",
                "reward",
                "lora",
            )
        } | {"step_rule": self.search.rule()}
        for job, picture, score in zip(jobs, self.generator.decode(samples.latents), samples.score.tolist()):
            text = PngInfo()
            text.add_itxt("prompt", job.prompt)
            text.add_text("seed", str(job.seed))
            text.add_text("score", f"{score:.6f}")
            text.add_itxt("settings", json.dumps(settings))
            path = self.folder.path("images", f"{job.id}.png")
            with guarded(path):
                part = path.with_name(f".{path.name}.part")
                picture.save(part, "PNG", pnginfo=text)
                part.replace(path)
            paths.append(f"images/{job.id}.png")
        if self.config.trace and samples.candidates:
            for i, job in enumerate(jobs):
                tree = branch_tree(self.generator, samples.candidates, i, f"{job.prompt}, seed {job.seed}")
                with guarded(self.folder.folder):
                    tree.save(self.folder.path("traces", f"{job.id}.png"))
        return paths


def latent_shape(config: Sample, generator: Generator | Known) -> tuple[int, int, int]:
    """C, H, W of the latents for the asked size. Raises InputError for a size that cannot be."""
    height = config.height or config.resolution or generator.image_size
    width = config.width or config.resolution or generator.image_size
    if height * width > config.max_pixels:
        raise InputError(
            f"--height {height} --width {width}: too many pixels", hint="raise --set max_pixels if you mean it"
        )
    return generator.latent_shape(height, width)


@dataclass
class Counts:
    """Sums over all batches of a run, kept beside the part files."""

    generator_calls: int = 0
    reward_calls: int = 0
    shared_calls: int = 0
    seconds: float = 0.0

    def add(self, samples: Samples, seconds: float) -> None:
        self.generator_calls += samples.calls.generator
        self.reward_calls += samples.calls.reward
        self.shared_calls += samples.calls.shared
        self.seconds += seconds

    def save(self, folder: Run) -> None:
        from drmcli.run import write_text

        write_text(folder.path("partial", "counts.json"), json.dumps(vars(self)))

    @classmethod
    def load(cls, folder: Run) -> Counts:
        try:
            found = read_object(folder.folder / "partial" / "counts.json", f"--out {folder.folder}") or {}
            return cls(**found)
        except (InputError, TypeError):
            folder.warn(
                f"{folder.folder}: its counts are damaged: calls and seconds of earlier batches are not counted"
            )
            return cls()


def _add_candidates(parts: results.Parts, jobs: list[Job], steps: list[Candidates]) -> None:
    for c in steps:
        for i, job in enumerate(jobs):
            for j, (score, kept) in enumerate(zip(c.score[i].tolist(), c.kept[i].tolist())):
                parts.add(
                    prompt_id=text_id(job.prompt), image_id=job.id, prompt=job.prompt, seed=job.seed, step=c.step, sigma=c.sigma,
                    sigma_next=c.sigma_next, candidate=j, score=score, kept=kept,
                )  # fmt: skip


def finish(config: Sample, folder: Run, studio: Studio, counts: Counts) -> dict[str, Any]:
    """Join the part files, draw the grid, sum up."""
    partial = folder.folder / "partial"
    images = results.read(partial / "images")
    results.write(folder.folder / "images.parquet", "images", images, folder.id)
    scored = any((partial / "candidates").glob("part-*.parquet"))
    candidates = (
        results.read(partial / "candidates")
        if scored
        else pd.DataFrame({n: [] for n in results.SCHEMAS["candidates"].names})
    )
    results.write(folder.folder / "candidates.parquet", "candidates", candidates, folder.id)
    with guarded(folder.folder):
        shown = images[:IN_GRID]
        pictures = [Image.open(folder.folder / path).convert("RGB") for path in shown["path"]]
        notes = [note_of(seed, score) for seed, score in zip(shown["seed"], shown["score"])]
        sheet(by_prompt(list(shown["prompt"]), pictures, notes)).save(folder.folder / "grid.png")
        shutil.rmtree(partial)
    listed = [
        {
            "path": str(folder.folder / row["path"]),
            **{key: row[key] for key in ("prompt", "seed")},
            "score": _number(row["score"]),
        }
        for row in images.to_dict("records")
    ]
    chosen = candidates[candidates["kept"]] if len(candidates) else candidates
    gain = candidates.groupby(["image_id", "step"])["score"].agg(["max", "mean", "std"]) if len(candidates) else None
    return folder.finish(
        {
            "seed": config.seed,
            "device": str(studio.device),
            "dtype": {v: k for k, v in DTYPES.items()}[studio.dtype],
            "seconds": round(time.monotonic() - folder.started, 2),
            "images": listed,
            "mode": config.mode,
            "beams": config.beams or (studio.search.beams if config.mode in ("stepwise", "beam") else 1),
            "starts": studio.search.trajectories(),
            "refine": config.refine,
            "steps": config.steps,
            "step_rule": studio.search.rule(),
            "generator_calls": counts.generator_calls,
            "reward_calls": counts.reward_calls,
            "shared_calls": counts.shared_calls,
            "cost": round(
                Calls(counts.generator_calls, counts.reward_calls, counts.shared_calls).cost(studio.reward_cost)
                / len(images),
                3,
            ),
            "images_per_second": round(len(images) / max(counts.seconds, 1e-9), 3),
            "mean_score": _number(images["score"].mean()),
            "candidates": len(candidates),
            "kept": len(chosen),
            "mean_spread": None if gain is None else _number(gain["std"].mean()),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if studio.device.type == "cuda"
            else None,
            "grid": str(folder.folder / "grid.png"),
        }
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def plan(config: Sample) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.flow import schedule
    from drmcli.recipes import hours
    from drmcli.recipes.footprints import of_sample

    decided: list[str] = []
    config = methods.settled(config, decided.append)
    prompts = [] if config.tune else checked_prompts(config)
    known = describe_generator(config)
    if config.true_cfg_scale > 1:
        known.family = known.family.with_true_cfg(config.true_cfg_scale)
    check_negative(known.family, known.transformer, config.negative_prompt, config.guidance_scale)
    guided = known.family.guides(known.transformer, config.guidance_scale)
    search = methods.search_of(config)
    calls = expected_calls(search, schedule(config.steps), trace=config.trace, guided=guided)
    pictures, size = len(prompts) * config.num_images, latent_shape(config, known)[1:]
    return {
        "pictures": pictures,
        "mode": config.mode,
        **({"decided": decided} if decided else {}),
        "generator calls a picture, about": calls.generator,
        "scores a picture, about": 0 if config.reward == "none" else calls.reward,
        "download": known.download,
        **of_sample(config, known, search, pictures, size),
        **hours.of_sample(config, known, search, pictures, size),
    }


def picture_text(path: Path) -> dict[str, str]:
    """What is written in a picture of `drm sample`: prompt, seed, score, settings."""
    with Image.open(path) as picture:
        return {str(k): str(v) for k, v in picture.info.items() if k in ("prompt", "seed", "score", "settings")}
