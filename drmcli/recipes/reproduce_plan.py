"""What `drm reproduce --dry-run` prints: the experiments of every part, with gigabytes and hours of each kind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from drmcli.cards import spoken
from drmcli.config import Reproduce, resolve
from drmcli.errors import InputError, MissingError
from drmcli.recipes.plan import as_set, describe_generator
from drmcli.recipes.reward_plan import planned_reward


def plan(config: Reproduce, starts: int) -> dict[str, Any]:
    """The experiments in words, what they would download and where they look for data; `experiments`: a row a kind, see `rows`.

    starts: reward models that are trained beside those of `resolutions`.
    """
    settings = resolve("train-reward", preset=config.preset, flags={"steps": config.train_steps})
    pictures = config.num_prompts * config.num_images
    parts: dict[str, Callable[[], str]] = {
        "reward": lambda: (
            f"{starts + len(config.resolutions)} reward models of {settings.steps} steps of {settings.batch_size} pairs, each "
            f"measured on {', '.join(config.datasets)}"
        ),
        "rl": lambda: (
            f"{len(config.rewards) + 2} alignments of {config.updates or resolve('grpo', preset=config.preset).updates} updates, "
            f"{(len(config.rewards) + 3) * pictures} pictures scored by {', '.join(map(spoken, config.scorers))}, GenEval twice"
        ),
        "sampling": lambda: f"{len(config.beams) * pictures} pictures for k = {', '.join(map(str, config.beams))}",
    }
    with tempfile.TemporaryDirectory() as folder:
        experiments = list(rows(config, starts, Path(folder)))
    files = {"rl": (config.prompts, config.eval_prompts), "sampling": (config.eval_prompts,)}
    lacking = [
        part for part, needed in files.items() if part in config.only and config.preset != "tiny" and None in needed
    ]
    hours = [row["hours"] for row in experiments if row["hours"] is not None]
    return {
        "download": describe_generator(settings).download,
        "data": ", ".join(settings.data) + (f" in {config.data_dir}" if config.data_dir else ""),
        **{part: tell() for part, tell in parts.items() if part in config.only},
        **({"left out without --prompts FILE and --eval-prompts FILE": ", ".join(lacking)} if lacking else {}),
        "experiments": experiments,
        "hours": f"{sum(hours):.3g} with what was timed" if hours else "not timed (ask with --set timing=on)",
    }


def rows(config: Reproduce, starts: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Each kind of experiment: what, how many times, bytes of GPU memory as the preset is set, hours of all (None where they were not
    timed), or why it cannot be planned.

    folder: an empty one, for the config of the reward model that the experiments train. What is not in the hours: benchmarks of pairs,
    scorers of what is drawn, GenEval.
    """
    shared = {"seed": config.seed, "device": config.device, "dtype": config.dtype, "timing": config.timing}
    learner = resolve(
        "train-reward", preset=config.preset, flags=shared | {"steps": config.train_steps, "data_dir": config.data_dir}
    )
    reward = planned_reward(learner, describe_generator(learner), folder)

    def row(what: str, times: int, command: str, **flags: Any) -> dict[str, Any]:
        settings = resolve(command, preset=config.preset, flags=shared | flags)
        found: dict[str, Any] = {"experiment": what, "times": times, "memory": None, "hours": None}
        try:
            told = import_module("drmcli.recipes." + command.replace("-", "_")).plan(settings)
        except (MissingError, InputError) as error:
            return found | {"lacks": f"{error.message} ({error.hint})"}
        hours = told.get("hours")
        return found | {
            "memory": as_set(settings, told["memory"]),
            "hours": times * hours["total"] if isinstance(hours, dict) else None,
        }

    count = starts + len(config.resolutions) if "reward" in config.only else 1  # what the other parts steer with
    yield row("train-reward", count, "train-reward", steps=config.train_steps, data_dir=config.data_dir)
    if "rl" in config.only:
        aligning = {"reward": reward, "updates": config.updates, "prompts": config.prompts}
        yield row("grpo, flow-grpo", len(config.rewards) + 1, "grpo", algorithm="flow-grpo", **aligning)
        yield row("grpo, step-grpo", 1, "grpo", algorithm="step-grpo", **aligning)
    drawing = {"prompts": ["a prompt"] * config.num_prompts, "num_images": config.num_images}
    if "rl" in config.only:
        yield row("sample, of each generator", len(config.rewards) + 3, "sample", reward="none", **drawing)
    for k in config.beams if "sampling" in config.only else ():
        yield row(f"sample --stepwise --beams {k}", 1, "sample", reward=reward, mode="stepwise", beams=k, **drawing)
