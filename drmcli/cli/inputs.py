"""Everything that a command's config names is looked at before torch is imported: seconds for a typo are seconds too many.

What needs the libraries (is it a picture, does the model fit) is looked at by the recipes, which also stand without this.
"""

from __future__ import annotations

import os
from typing import Any

from drmcli.config import dataset_names, flag_of, local_or_hub, package_path, split_ratio
from drmcli.errors import DrmError, InputError, MissingError

SCORERS = {"reward": "--reward", "refresh_by": "--refresh-by", "against": "--against", "judge": "--judge"}
"""Config keys that name one scorer."""
LISTS = {"scorers": "--scorer", "add_rewards": "--add-reward"}
"""Config keys that name several, the second with weights."""
NO_FILES = {"shapes", "geneval", "shapes-prompts"}
"""Names of data that is made."""


def check(command: str, config: Any) -> None:
    """Raises InputError (2) or MissingError (3) for what is not there, each naming the flag."""
    generator = getattr(config, "generator", "")
    if generator or command in ("train-reward", "grpo", "sample"):
        local_or_hub(generator, "--generator")
    weighed = hasattr(config, "add_rewards")  # there `--reward` is repeated, with weights
    for key, flag in SCORERS.items():
        if (ref := getattr(config, key, None)) and ref != "none":
            _scorer(ref, flag, weighed=weighed and key == "reward")
    for key, flag in LISTS.items():
        for item in getattr(config, key, []):
            _scorer(item, flag, weighed=key == "add_rewards")
    if lora := getattr(config, "lora", None):
        _path(lora, "--lora")
    _has_scorer(command, config)
    {"score": _score, "sample": _sample, "bench": _bench, "train-reward": _train, "grpo": _grpo}.get(
        command, lambda config: None
    )(config)


def given(flags: dict[str, Any], sets: list[str] | None) -> set[str]:
    """Keys that the command line names, by flag or by --set."""
    named = {key for key, value in flags.items() if value is not None and value != []}
    return named | {text.partition("=")[0].strip().replace("-", "_") for text in sets or []}


OF_MODES = {
    "beams": ("stepwise", "beam", "best-of-n", "halving", "smc"),
    "starts": ("best-of-n", "halving", "smc", "beam"),
    "keep": ("beam",),
    "first_cut": ("beam",),
    "halving_sigmas": ("halving",),
    "branch_sigmas": ("stepwise", "beam"),
    "branch_steps": ("stepwise", "beam"),
    "temperature": ("smc",),
    "budget": ("auto",),
    "methods": ("auto",),
}
"""Keys of drm sample that some modes alone read."""
DRAWN = ("prompts", "geneval")
OF_DATASETS = {
    **dict.fromkeys(("split", "calibration_split", "pairs", "shared_noise"), ("pairs",)),
    **dict.fromkeys(("lora", "prompts", "num_images", "steps", "guidance_scale"), DRAWN),
    **dict.fromkeys(("images", "detector", "color_model"), ("geneval",)),
}
"""Keys of drm bench that some kinds of dataset alone read."""


def refuse_unread(command: str, config: Any, named: set[str]) -> None:
    """Raises InputError for what the command line names and nothing would read: it would look as if it had been obeyed."""
    if command == "sample" and not config.tune:
        for key, modes in OF_MODES.items():
            if key in named and config.mode not in modes and getattr(config, key) != 1:  # one trajectory is plain
                raise InputError(
                    f"{flag_of(command, key)}: is not read by --mode {config.mode}",
                    hint=f"use --mode {' or '.join(modes)}",
                )
    if command == "bench":
        from drmcli.data.prompts import of_generators

        dataset = config.dataset
        kind = "geneval" if dataset == "geneval" else "prompts" if of_generators(dataset) else "pairs"
        for key, kinds in OF_DATASETS.items():
            if key in named and kind not in kinds:
                raise InputError(
                    f"{flag_of(command, key)}: is not read, {dataset} is of {'generators' if kind in DRAWN else 'pairs'}",
                    hint=f"leave it out, or bench {' or '.join(kinds)}",
                )
        if "split" in named and dataset not in NO_FILES and os.path.exists(package_path(dataset)):
            from drmcli.data.datasets import DATASETS

            if dataset not in DATASETS:
                raise InputError(f"--split {config.split}: {dataset} is a file, and has no splits", hint="leave it out")


def _has_scorer(command: str, config: Any) -> None:
    """Raises InputError where something must be scored and neither the command nor the preset names what scores."""
    from drmcli.scorers import SCORER_HINT

    ref = getattr(config, "reward", "none")
    if command == "sample" and config.chooses and ref in ("", "none"):
        raise InputError(f"{config.chooses}: needs a scorer", hint=SCORER_HINT)
    measured = command == "bench" and (config.scorers or config.against or config.dataset == "geneval")
    if not ref and command in ("score", "grpo", "bench", "serve") and not measured:
        raise InputError(f"--reward: preset {config.preset} has none, and none is named", hint=SCORER_HINT)


def _sample(config: Any) -> None:
    if config.tune:
        from drmcli.data.prompts import read_prompts

        read_prompts(package_path(config.tune), flag="--tune")


def _score(config: Any) -> None:
    for name in config.images:
        if "\0" not in name and not os.path.lexists(name):
            raise InputError(f"{name}: missing", hint="check the path")


def _bench(config: Any) -> None:
    several = dataset_names(config.dataset)
    for name in several:
        inner = os.path.join(config.data_dir or "", name)
        folder = inner if len(several) > 1 and config.data_dir and os.path.isdir(inner) else config.data_dir
        _data(name, folder, "--dataset")
    if config.images and not os.path.isdir(config.images):
        raise InputError(f"--images {config.images}: there is no such folder", hint="give a folder in GenEval's layout")
    if config.dataset == "geneval" and config.data_dir and not os.path.exists(config.data_dir):
        raise MissingError(
            f"--data-dir {config.data_dir}: there is no such file or folder",
            hint="give GenEval's evaluation_metadata.jsonl or its folder",
        )


def _train(config: Any) -> None:
    for flag, items in (("--data", config.data), ("--eval-data", config.eval_data)):
        for item in items:
            _data(split_ratio(item)[0], config.data_dir, flag)


def _grpo(config: Any) -> None:
    from drmcli.data.prompts import PROMPT_SETS, read_prompts

    if config.prompts not in PROMPT_SETS:
        read_prompts(package_path(config.prompts))


def _data(name: str, data_dir: str | None, flag: str) -> None:
    """A dataset's name whose folder is there, or a file."""
    if name in NO_FILES or os.path.exists(package_path(name)):
        return
    from drmcli.data.datasets import DATASETS, read

    if name not in DATASETS or data_dir is None or not os.path.exists(data_dir):
        try:
            read(name, data_dir=data_dir)
        except DrmError as error:
            error.message = f"{flag} {error.message}"
            raise


def _scorer(ref: str, flag: str, *, weighed: bool) -> None:
    from drmcli.scorers import parse_term, read_reference

    read_reference(parse_term(ref, flag)[0] if weighed else ref, flag)


def _path(ref: str, flag: str) -> None:
    """A file or folder that looks like one is there; what looks like a hub id may be one."""
    path = package_path(ref)
    local = path.startswith((".", "/", "~")) or path.endswith(".safetensors") or path.count("/") != 1
    if local and not os.path.exists(path):
        raise MissingError(f"{flag} {ref}: there is no such file or folder", hint="check the path, or give a hub id")
