"""Ways to sample: a config's settings as a `Search`, and what each way costs and gives.

The latter is the table behind `drm sample --mode auto --budget N`. A preset ships its table in `drmcli/config/presets/methods/`;
`drm sample --tune PROMPTS` measures one for a generator and a reward of one's own, in the same form: YAML with `steps`,
`guidance_scale`, what measured it, and a row a method with its cost, judge and settings.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import ValidationError

from drmcli.config import Sample
from drmcli.data.prompts import read_prompts
from drmcli.errors import InputError
from drmcli.generator import DTYPES
from drmcli.kernels import Kernels
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.run import Interruptions, Run, write_text
from drmcli.sampling import Search
from drmcli.scorers import SCORER_HINT, Scorer, load_scorer

if TYPE_CHECKING:
    from drmcli.recipes.sample import Studio

CPS = {"step_rule": "cps", "noise_level": 1.0}
BEAM = CPS | {"mode": "beam", "keep": 2, "beams": 2, "first_cut": 0.8, "branch_sigmas": [0.7, 0.8], "share_first": True}
MANY = CPS | {"mode": "best-of-n", "share_first": True}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain", "step_rule": "ode"},
    "plain, CPS": CPS | {"mode": "plain"},
    "step-wise, 4 beams": {"mode": "stepwise", "beams": 4},
    **{f"best of {n}": MANY | {"starts": n} for n in (2, 3, 4, 6)},
    "best of 2, refined twice": MANY | {"starts": 2, "refine": 2},
    "halving of 4": CPS | {"mode": "halving", "starts": 4, "share_first": True},
    "beam of 2": BEAM | {"starts": 2},
    "beam of 3": BEAM | {"starts": 3},
    "beam of 4": BEAM | {"starts": 4},
    "beam of 4, refined with 2 beams": BEAM | {"starts": 4, "refine": 1, "refine_beams": 2},
}
"""What `--tune` measures, by name."""
RIVALS = ("plain, CPS", "best of 2", "best of 3", "best of 4", "best of 6")
"""Drawing several and keeping the best: what a method must beat at its cost."""
KEYS = ("name", "cost", "judge", "settings")


def check_search(search: Search) -> None:
    """Raises InputError for settings that contradict each other."""
    hint = "use cps, flow-sde or dance-sde"
    if search.rule() == "ode":
        if search.mode in ("stepwise", "beam") and search.beams > 1:
            raise InputError("--step-rule ode: its candidates would all be the same", hint=hint)
        if search.refine_beams > 1:
            raise InputError("--refine-beams: candidates of the ODE would all be the same", hint=f"--step-rule: {hint}")
        if search.share_first and search.trajectories() > 1:
            raise InputError(
                "--share-first: trajectories of the ODE would all be the same", hint=f"--step-rule: {hint}"
            )
    if search.refine and search.num_inference_steps < 2:
        raise InputError("--refine: one step leaves nothing to sample again", hint="use more --steps")
    if search.mode == "beam" and search.trajectories() < search.keep:
        raise InputError(
            f"--starts {search.starts}: fewer than the {search.keep} that beam keeps", hint="raise it, or lower --keep"
        )


def search_of(config: Sample) -> Search:
    """A config's way to sample."""
    return Search(
        mode=config.mode,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        step_rule=config.step_rule,
        noise_level=config.noise_level,
        beams=config.beams or 4,
        starts=config.starts,
        keep=config.keep,
        first_cut=config.first_cut,
        halving_sigmas=tuple(config.halving_sigmas),
        share_first=config.share_first,
        branch_sigmas=(config.branch_sigmas[0], config.branch_sigmas[1]),
        branch_steps=None if config.branch_steps is None else (config.branch_steps[0], config.branch_steps[-1]),
        score_at=config.score_at,
        correct_noise=config.correct_noise,
        temperature=config.temperature,
        refine=config.refine,
        refine_sigma=config.refine_sigma,
        refine_beams=config.refine_beams,
        combine=config.combine,
        max_batch=config.max_batch,
        share=config.share_score,
    )


def settled(config: Sample, note: Callable[[str], None]) -> Sample:
    """The config with its mode decided: `auto` by budget, and names of earlier versions by the new ones.

    note: told what was decided. Raises InputError where a budget buys nothing.
    """
    if config.mode in ("best-of-n", "halving", "smc") and config.starts is None and config.beams is not None:
        note(
            f"--mode {config.mode} --beams {config.beams}: trajectories are --starts now; --beams are candidates a step"
        )
        config = replace(config, starts=config.beams)
    if config.reward in ("", "none"):
        if config.chooses:
            raise InputError(f"{config.chooses}: needs a scorer", hint=SCORER_HINT)
        config = replace(config, reward="none")  # plain sampling does without, where the preset has none
    if config.mode != "auto":
        return config
    table, where = read_table(config)
    for key in ("steps", "guidance_scale"):
        if table[key] != getattr(config, key):
            raise InputError(
                f"--mode auto: {where} was measured with {key} {table[key]:g}, not {getattr(config, key):g}",
                hint=f"leave --{key.replace('_', '-')} as it was, or measure with `drm sample --tune PROMPTS`",
            )
    rows = sorted(table["methods"], key=lambda row: row["cost"])
    if config.budget is None:
        raise InputError(
            "--mode auto: no budget is given",
            hint=f"--budget {rows[-1]['cost']:g}, for example: forward passes a picture; {where} has {rows[0]['cost']:g} and up",
        )
    within = [row for row in rows if row["cost"] <= config.budget]
    if not within:
        raise InputError(
            f"--budget {config.budget:g}: too little for any method of {where}",
            hint=f"give {rows[0]['cost']:g} or more",
        )
    row = max(within, key=lambda row: row["judge"])
    note(f"--budget {config.budget:g}: {row['name']}, {row['cost']:g} forward passes a picture")
    try:
        return replace(config, **row["settings"])
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{where}: {row['name']}: {first['loc'][0]}: {first['msg']}", hint="give methods.yaml as --tune wrote it"
        ) from None


def read_table(config: Sample) -> tuple[dict[str, Any], str]:
    """The table of `--methods`, or of the preset, and what to call it. Raises InputError where there is none or it is damaged."""
    if config.methods is None:
        where = f"the table of preset {config.preset}"
        file = resources.files("drmcli.config.presets") / "methods" / f"{config.preset}.yaml"
        if not file.is_file():
            raise InputError(
                f"--mode auto: nothing was measured for preset {config.preset}",
                hint="measure it with `drm sample --tune PROMPTS --judge SCORER`, then give --methods RUN/methods.yaml",
            )
        text = file.read_text(encoding="utf-8")
    else:
        where = f"--methods {config.methods}"
        try:
            text = Path(config.methods).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: cannot be read: {error}", hint="give methods.yaml of a --tune run") from None
    try:
        table = yaml.safe_load(text)
        whole = all(
            isinstance(row["name"], str)
            and all(math.isfinite(row[key]) for key in ("cost", "judge"))
            and not row["settings"].keys() - SETTINGS
            for row in table["methods"]
        )
        whole = whole and bool(table["methods"]) and all(table[key] > 0 for key in ("steps", "guidance_scale"))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{where}: no table of methods", hint="give methods.yaml of a --tune run")
    return table, where


SETTINGS = {key for settings in METHODS.values() for key in settings} | {"refine_sigma", "branch_steps", "temperature"}
"""What a row of a table may set."""


def tune(config: Sample, folder: Run, studio: Studio) -> dict[str, Any]:
    """Measure METHODS on the prompts of `--tune`. Writes methods.yaml; returns what summary.json holds.

    Interrupted between two methods, it goes on.
    """
    prompts = read_prompts(str(config.tune), flag="--tune")
    judge = None
    if config.judge == "none":
        folder.warn(
            "no --judge is named: methods are ranked by the reward that they maximise, and one that fools it looks good"
        )
    else:
        judge = load_scorer(
            config.judge, device=studio.device, dtype=studio.dtype, flag="--judge", kernels=Kernels.of(config, studio.device)
        )  # fmt: skip
        judge.check_prompts(prompts)
    found: dict[str, dict[str, Any]] = {}
    with Interruptions() as interruptions:
        for number, (name, settings) in enumerate(METHODS.items()):
            part = folder.path("partial", f"method-{number}.json")
            if not part.is_file():
                studio.search = search_of(replace(config, **settings))
                write_text(part, json.dumps(_measured(studio, config, prompts, judge, name)))
                if interruptions.asked and number + 1 < len(METHODS):
                    raise interruptions.stop(f"{number + 1} of {len(METHODS)} methods are measured in {folder.folder}")
            found[name] = json.loads(part.read_text(encoding="utf-8"))
    prompt = np.repeat(np.arange(len(prompts)), config.num_images)
    rows = [_row(name, found, prompt) for name in found]
    table = {
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "generator": config.generator,
        "reward": config.reward,
        "judge": config.judge,
        "prompts": len(prompts),
        "seeds": config.num_images,
        "methods": [{k: row[k] for k in KEYS} for row in sorted(rows, key=lambda r: r["cost"])],
    }
    file = folder.folder / "methods.yaml"
    plain = json.loads(json.dumps(table))  # nothing is shared between rows, so YAML needs no aliases
    write_text(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    return {
        "seed": config.seed,
        "device": str(studio.device),
        "dtype": {v: k for k, v in DTYPES.items()}[studio.dtype],
        "seconds": round(time.monotonic() - folder.started, 2),
        "mode": "tune",
        "beams": 1,
        "steps": config.steps,
        "images": [],
        "generator_calls": sum(x["generator_calls"] for x in found.values()),
        "reward_calls": sum(x["reward_calls"] for x in found.values()),
        "judge": config.judge,
        "methods": rows,
        "table": str(file),
    }


def _measured(studio: Studio, config: Sample, prompts: list[str], judge: Scorer | None, name: str) -> dict[str, Any]:
    """One method's pictures, judged: a value a picture, and its calls."""
    from drmcli.recipes.sample import Job

    # Every picture has noise of its own: captions that share it would not be independent.
    texts = [prompt for prompt in prompts for _ in range(config.num_images)]
    jobs = [Job(i, text, config.seed + i) for i, text in enumerate(texts)]
    judged: list[float] = []
    cost, generator_calls, reward_calls = 0.0, 0, 0
    for start in range(0, len(jobs), config.batch_size):
        some = jobs[start : start + config.batch_size]
        samples = studio.draw(some, lambda step, total: None)
        if judge is None:
            judged += samples.score.tolist()
        else:
            pictures = studio.generator.decode(samples.latents)
            judged += judge.score_images(pictures, [job.prompt for job in some]).tolist()
        cost += samples.calls.cost(studio.reward_cost)
        generator_calls += samples.calls.generator
        reward_calls += samples.calls.reward
        studio.folder.reporter.progress(f"tune: {name}", min(start + config.batch_size, len(jobs)), len(jobs))
    return {
        "judge": judged,
        "cost": cost / len(jobs),
        "generator_calls": generator_calls,
        "reward_calls": reward_calls,
    }


def _row(name: str, found: dict[str, dict[str, Any]], prompt: np.ndarray) -> dict[str, Any]:
    """A method's figures, and its difference from the dearest rival that costs no more."""
    mine = np.array(found[name]["judge"])
    mean = mean_ci(mine, prompt)
    row: dict[str, Any] = {
        "name": name,
        "cost": round(found[name]["cost"], 2),
        "judge": round(mean.value, 5),
        "judge_ci95": _interval(mean.ci95),
        "settings": METHODS[name],
    }
    cheaper = [r for r in RIVALS if r != name and found[r]["cost"] <= found[name]["cost"] + 1e-6]
    if cheaper:
        rival = max(cheaper, key=lambda r: found[r]["cost"])
        gap = paired_ci(mine, np.array(found[rival]["judge"]), prompt)
        row |= {"rival": rival, "difference": round(gap.value, 5), "difference_ci95": _interval(gap.ci95)}
    return row


def _interval(ends: tuple[float, float]) -> list[float] | None:
    """None where one prompt gives no interval."""
    return None if math.isnan(ends[0]) else [round(end, 5) for end in ends]
