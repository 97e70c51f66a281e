"""Model cards: README.md of a saved reward model, LoRA or pipeline, made from the config and summary of the run that trained it.

A card names the base by its hub id, the data, the accuracy with its interval, and the command. A folder of this machine says nothing to a
reader elsewhere (and something about its owner), so that only its last name is written.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drmcli.config import package_path, split_ratio, spoken, to_command
from drmcli.data.datasets import DATASETS
from drmcli.data.text import dump_yaml, parse_yaml, read_text
from drmcli.errors import DrmError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
PAPER = "arXiv 2605.25661"
EMBEDDED = {"shapes": "shapes, of the embedded world"}
"""Data that is made, by name."""


def base_id(ref: str) -> str | None:
    """Hub id of a pipeline that is named by its id or by a folder, as far as the folder knows it; None for the embedded one.

    A folder of the hub's cache has the id in its path, a pipeline that diffusers saved in its model_index.json.
    """
    folder = Path(package_path(ref)).expanduser()
    if "{package}" in ref or folder.is_relative_to(package_path("{package}")):
        return None
    if not folder.is_dir():
        return ref if HUB_ID.fullmatch(ref) and ref[0] not in "./~" else None
    for part in folder.absolute().parts:
        if found := SNAPSHOT.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    index = folder / "model_index.json"
    try:
        values = parse_yaml(read_text(str(index), name=str(index), hint=""), str(index)) if index.is_file() else None
    except DrmError:  # whoever loads the pipeline will say so
        return None
    name = values.get("_name_or_path") if isinstance(values, dict) else None
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and name[0] not in "./~" else None


def is_embedded(ref: str) -> bool:
    """Is this a file of the package, which whoever has drm has too?"""
    return Path(package_path(ref)).is_relative_to(package_path("{package}"))


def portable(ref: str) -> str:
    """The reference as it holds on any machine, for files of the package and pipelines with a hub id; other folders as they are."""
    if is_embedded(ref):
        return "{package}/" + Path(package_path(ref)).relative_to(package_path("{package}")).as_posix()
    return base_id(ref) or ref


def shown(ref: str) -> str:
    """A reference for readers elsewhere: hub ids and the embedded models by their names, other folders by their last one."""
    if is_embedded(ref):
        return spoken(ref)
    return base_id(ref) or Path(ref).name


def reward_card(
    model: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    name: str = "FOLDER",
) -> str:
    """README.md of a reward model.

    model: its config.json. config, summary: of the `drm train-reward` run; without them the card says nothing of data and accuracy.
    name: what `from_pretrained` is to be given.
    """
    base = base_id(model["base_model"])
    taps, own = model.get("tap_layers"), "the base's own"
    tapped = f"blocks {', '.join(map(str, taps))}" if taps else "the last block that is kept"
    facts = [
        f"base: {_linked(model['base_model'])}, revision {model.get('base_revision') or 'main'}, without its last"
        f" {model.get('drop_layers', 3)} blocks",
        f"weights: {_BACKBONES[model.get('backbone', 'full')].format(rank=model.get('lora_rank'))};"
        f" the head reads the image tokens of {tapped}, has width {model.get('head_width')} and {model.get('head_pool')} pooling",
        f"resolution in training: {model.get('resolution') or own}; T5: {'yes' if model.get('text_encoder_3', True) else 'no'}",
    ]
    datasets: list[str] = []
    if config is not None:
        said, datasets = _data(config["data"])
        pairs = f", {summary['train_pairs']:,} pairs" if summary else ""
        facts.append(
            f"data: {said}{pairs}; {config['steps']:,} steps of {config['batch_size']} pairs, {config['loss']} loss"
        )
    head = _head("drmcli", ["reward-model", "text-to-image", "diffusion"], base, datasets)
    return _tidy(f"""{head}
# A diffusion-based reward model

Scores how well a picture, or a noisy latent at any step, serves a prompt. Higher is better; only differences for one prompt
mean something.

{_list(facts)}
{_accuracy(summary) if summary else ""}
```python
from drmcli import RewardModel

model = RewardModel.from_pretrained("{name}")
print(model.score_images("picture.png", "a prompt"))
```
{_trained_by("train-reward", config)}
Method: DRM, {PAPER}. The licence of the base model applies to what was trained from it.
""")


_BACKBONES = {
    "full": "all were trained, and are here",
    "lora": "a LoRA of rank {rank} and the head were trained, and are here; the rest is the base's",
    "frozen": "the head alone was trained, and is here; the rest is the base's",
    "head": "the head alone was trained, and is here; the rest is the base's",
}


def policy_card(
    config: Mapping[str, Any],
    update: int,
    *,
    kind: str = "lora",
    summary: Mapping[str, Any] | None = None,
    name: str = "THIS_FOLDER",
) -> str:
    """README.md of a policy that `drm grpo` made.

    kind: lora; generator, a whole pipeline; or transformer, its denoiser alone. summary: of the run, where it measured this policy.
    """
    base, embedded = base_id(config["generator"]), is_embedded(config["generator"])
    where = f'package_path("{portable(config["generator"])}")' if embedded else f'"{base or "BASE"}"'
    load = f"pipe = DiffusionPipeline.from_pretrained({where})"
    use, what = {
        "lora": (
            f'{load}\npipe.load_lora_weights("{name}")',
            f"A LoRA of rank {config['lora_rank']}, alpha {config['lora_alpha']}",
        ),
        "generator": (f'pipe = DiffusionPipeline.from_pretrained("{name}")', "A whole pipeline"),
        "transformer": (f"{load}  # and its denoiser from this folder", "The denoiser of a pipeline"),
    }[kind]
    rewards = [config["reward"], *config.get("add_rewards", [])]
    prompts = config["prompts"]
    facts = [
        f"base: {_linked(config['generator'])}, revision {config.get('revision') or 'main'}",
        f"{what}: {config['algorithm']}, update {update}",
        f"reward: {', '.join(shown(r) for r in rewards)}; judge: {shown(config['judge'])}",
        f"prompts: {EMBEDDED.get(prompts) or shown(prompts)}",
    ]
    tags = ["lora", "text-to-image"] if kind == "lora" else ["text-to-image"]
    head = _head("diffusers", tags, base, [])
    return _tidy(f"""{head}
# Aligned by `drm grpo`

{_list(facts)}
{_gain(summary) if summary else ""}
```python
from diffusers import DiffusionPipeline
{"from drmcli.config import package_path" if embedded and kind != "generator" else ""}
{use}
```
{_trained_by("grpo", config)}
Method: DRM, {PAPER}. The licence of the base model applies.
""")


def _tidy(text: str) -> str:
    """The text without double blank lines, which parts that are left out leave."""
    return re.sub(r"\n{3,}", "\n\n", text)


def _head(library: str, tags: list[str], base: str | None, datasets: list[str]) -> str:
    """The metadata that the hub reads. What is no id of the hub is left out: it would be refused there."""
    values: dict[str, Any] = {"library_name": library, "tags": tags}
    if base:
        values["base_model"] = base
    if datasets:
        values["datasets"] = datasets
    return f"---\n{dump_yaml(values)}---\n"


def _list(facts: list[str]) -> str:
    return "".join(f"- {fact}\n" for fact in facts)


def _linked(ref: str) -> str:
    name = base_id(ref)
    return f"[{name}](https://huggingface.co/{name})" if name else shown(ref)


def _data(items: list[str]) -> tuple[str, list[str]]:
    """Data sets in words, with the ratios of a mixture, and the hub ids of those that are published."""
    said, ids = [], []
    for item in items:
        name, ratio = split_ratio(item)
        if name in DATASETS:
            ids.append(DATASETS[name].hub_id)
        what = EMBEDDED.get(name) or (name if name in DATASETS else Path(name).name)
        said.append(what + (f", ratio {ratio:g}" if ratio and len(items) > 1 else ""))
    return "; ".join(said), ids


def _accuracy(summary: Mapping[str, Any]) -> str:
    """Accuracy on held-out pairs by sigma, with its interval where the run has kept it."""
    rows = "".join(
        f"| {row['sigma']:g} | {_number(row['accuracy'], '.1f')} % | {_span(row.get('ci95'), '.1f')} |\n"
        for row in summary["eval_by_sigma"]
    )
    return f"""
Accuracy on {summary["eval_pairs"]:,} held-out pairs, with its 95 % interval over prompts (50 % is chance; equal scores count as wrong):

| sigma | accuracy | 95 % interval |
|---|---|---|
{rows}"""


def _gain(summary: Mapping[str, Any]) -> str:
    """Reward and judge on test prompts, before and after."""
    rows = ""
    for key in ("reward", "judge"):
        if summary.get(f"{key}_before") is not None:
            before, after = (_number(summary[f"{key}_{moment}"], ".3f") for moment in ("before", "after"))
            rows += f"| {key} | {before} | {after} | {_span(summary.get(f'{key}_gain_ci95'), '+.3f')} |\n"
    return f"""
On test prompts, which chose nothing, with plain sampling:

| | before | after | 95 % interval of the gain |
|---|---|---|---|
{rows}"""


def _number(value: float | None, form: str) -> str:
    """A number in words; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:{form}}"


def _span(ends: Any, form: str) -> str:
    """An interval in words; a dash where there is none."""
    return "-" if not ends or None in ends or ends[0] != ends[0] else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _trained_by(command: str, config: Mapping[str, Any] | None) -> str:
    """The command that repeats the run, its folders by their last names."""
    if config is None:
        return ""
    words = [_without_folders(word) for word in to_command(command, dict(config))]
    return f"\nMade by (folders of the machine are written by their last name):\n\n```bash\n{shlex.join(words)}\n```\n"


def _without_folders(word: str) -> str:
    return Path(word).name if word.startswith(("/", "~")) or os.path.isabs(word) else word
