"""`drm export`: the reward model or LoRA of a run as a clean folder with its card, or as a repository on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from drmcli import cards, signals
from drmcli.config import Export
from drmcli.data.text import short
from drmcli.errors import InputError, MissingError
from drmcli.files import atomic_folder, begun_runs, damaged, guarded, read_object
from drmcli.hub import one_line, pushing
from drmcli.reward_config import read_config
from drmcli.run import SILENT, Reporter

PRODUCTS = {"train-reward": ("reward",), "grpo": ("lora", "generator")}
"""What a command makes, by the folder in its run: the first that is there is exported."""
KINDS = {
    "reward": "reward model",
    "lora": "LoRA",
    "lora-last": "LoRA",
    "generator": "pipeline",
    "generator-last": "pipeline",
}
WEIGHTS = {"reward": ("config.json", "model.safetensors"), "lora": ("pytorch_lora_weights.safetensors",)}
"""The files of a model; of a pipeline all there are. A card is written anew."""


@dataclass
class Product:
    """A model of a run, ready to be handed on."""

    run: Path
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    base: str
    """The pipeline that it belongs to: a hub id, the embedded one, or a folder that does not say its id."""
    files: dict[str, Path | bytes] = field(default_factory=dict)
    """By name: where each is, or what it holds where it is written anew."""

    @property
    def kind(self) -> str:
        return KINDS[self.folder.name]

    @property
    def sizes(self) -> list[dict[str, Any]]:
        """A row a file: path and bytes."""
        return [
            {"path": name, "bytes": len(file) if isinstance(file, bytes) else file.stat().st_size}
            for name, file in self.files.items()
        ]


def run(config: Export, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write the folder, push, or both. Returns what --json prints.

    Raises InputError for a run without a model, a target that is taken or a name that is none; MissingError without token, right or
    network; RunError when a push breaks off.
    """
    product, target = prepared(config)
    summary = described(config, product, target)
    if not named(product.base):
        reporter.warn(
            f"the base model is a folder of this machine, {product.base}: others need its hub id, --base OWNER/NAME"
        )
    if target is not None:
        with atomic_folder(target) as part:
            for name, file in product.files.items():
                place = part / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file) if isinstance(file, bytes) else shutil.copyfile(file, place)
                signals.check(f"nothing was written to {target}")
        reporter.note(f"{len(product.files)} files are in {target}")
    if config.push:
        summary |= push(config.push, product, public=config.public, reporter=reporter)
    return summary


def plan(config: Export) -> dict[str, Any]:
    """What `--dry-run` prints: nothing is written, and the hub is not asked."""
    found = described(config, *prepared(config))
    if config.push:
        found["token"] = "is there" if get_token() else "there is none: `hf auth login` first"
    return found


def described(config: Export, product: Product, target: Path | None) -> dict[str, Any]:
    """What is exported, from where and to where."""
    sizes = product.sizes
    return {
        "command": "export",
        "run": str(product.run),
        "model": str(product.folder),
        "kind": product.kind,
        "preset": product.config.get("preset", "tiny"),
        "generator": product.config.get("generator"),
        "base": product.base,
        "files": sizes,
        "bytes": sum(row["bytes"] for row in sizes),
        "to": None if target is None else str(config.to),
        "push": config.push,
        "visibility": None if not config.push else "public" if config.public else "private",
    }


def prepared(config: Export) -> tuple[Product, Path | None]:
    """The model with its card, and the folder it goes to, once everything that was asked for was looked at."""
    if config.to is None and config.push is None:
        raise InputError("--to: no target is named", hint="give --to FOLDER, --push OWNER/NAME, or both")
    if config.public and config.push is None:
        raise InputError("--public: nothing is pushed", hint="give --push OWNER/NAME with it")
    for flag, name in (("--push", config.push), ("--base", config.base)):
        if name is not None:
            _check_name(flag, name)
    target = None if config.to is None else _free_folder(config.to)
    product = found(config.run)
    product.base = config.base or cards.portable(product.base)
    if config.push and not named(product.base):
        raise InputError(
            f"--base: the run's base model is a folder of this machine, {product.base}",
            hint="give its id on the hub with --base OWNER/NAME, so that others can load what is pushed",
        )
    fill(product, config.push or str(config.to))
    return product, target


def named(base: str) -> bool:
    """Can others load it: is it a hub id, or in the package?"""
    return cards.is_embedded(base) or cards.base_id(base) == base


def _check_name(flag: str, name: str) -> None:
    try:
        validate_repo_id(name)
        sound = name.count("/") == 1
    except hub_errors.HFValidationError:
        sound = False
    if not sound:
        raise InputError(f"{flag} {name}: no OWNER/NAME", hint=f"for example {flag} owner/name")


def _free_folder(name: str) -> Path:
    """The place of a folder that is new or empty. Raises InputError for any other."""
    if not name.strip():
        raise InputError("--to: is empty", hint="name a folder")
    target = Path(name).expanduser().absolute()
    with guarded(target, flag="--to"):
        if target.exists() and not target.is_dir():
            raise InputError(f"--to {name}: a file, not a folder", hint="name a new folder")
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"--to {name}: is not empty", hint="name a new folder")
        if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
            raise InputError(f"--to {name}: the folder that you are in", hint="name a new folder")
    return target


# --- what is exported -------------------------------------------------------------------------------------------------


def found(name: str) -> Product:
    """The model of a run; of the newest in runs/ that made one where none is named.

    name: a run folder, or a model in it. Raises InputError where there is none, or not yet.
    """
    place = Path(name).expanduser() if name else newest()
    chosen = place.name if place.name in KINDS and (place.parent / "config.yaml").exists() else None
    folder = place.parent if chosen else place
    where = f"RUN {name or folder}"
    config = read_object(folder / "config.yaml", where)
    if config is None:
        raise InputError(f"{where}: holds no config.yaml", hint="give a run folder, such as runs/mine")
    command = str(config.get("command"))
    if command not in PRODUCTS:
        parts = [
            str(f.parent) for f in sorted(folder.glob("*/config.yaml")) if any((f.parent / p).is_dir() for p in KINDS)
        ]
        hint = f"export a part of it: {', '.join(parts)}" if parts else "give a run of `drm train-reward` or `drm grpo`"
        raise InputError(f"{where}: a run of `drm {command}`, which makes no model of its own", hint=hint)
    summary = read_object(folder / "summary.json", where)
    if summary is None:
        raise InputError(f"{where}: is not finished: there is no model yet", hint="run its command again to finish it")
    candidates = (chosen,) if chosen else PRODUCTS[command]
    model = next((folder / p for p in candidates if (folder / p).is_dir()), None)
    if model is None:
        raise InputError(f"{where}: its folder {candidates[0]} is gone", hint="run its command again with --overwrite")
    base = config.get("generator")
    if model.name == "reward":  # a run that went on from another model keeps that one's base
        _check_file(model / "config.json", where)
        base = read_config(model, where).base_model
    if not isinstance(base, str) or not base:
        raise damaged(folder / "config.yaml", where, f"generator is {short(base)}")
    return Product(folder, model, config, summary, base)


def newest() -> Path:
    """The run in runs/ that was begun last of those that make a model."""
    for folder in begun_runs():
        try:
            values = read_object(folder / "config.yaml", str(folder)) or {}
        except InputError:  # damaged: it is no candidate, and `drm show` says why
            continue
        if values.get("command") in PRODUCTS:
            return folder
    raise InputError("RUN: no run in runs/ makes a model", hint="give a run folder, or make one: drm train-reward")


def fill(product: Product, name: str) -> None:
    """The files of a product, its card under the name by which it will be loaded. Raises InputError for what is missing or damaged."""
    folder, kind = product.folder, product.folder.name.removesuffix("-last")
    last = folder.name.endswith("-last")
    files = [folder / name for name in WEIGHTS.get(kind, ())] or sorted(
        f for f in folder.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(folder).parts)
    )
    for file in files:
        _check_file(file, f"RUN {product.run}")
        product.files[file.relative_to(folder).as_posix()] = file
    if kind == "reward":
        values = read_object(folder / "config.json", f"RUN {product.run}") or {}
        if values.get("base_model") != product.base and named(product.base):
            values["base_model"] = product.base
            product.files["config.json"] = (json.dumps(values, indent=2) + "\n").encode()
        card = _card(
            product, lambda summary: cards.reward_card(values, config=product.config, summary=summary, name=name)
        )
    else:
        key = "updates" if last else "best_update"
        update = product.summary.get(key)
        if not isinstance(update, int):
            raise damaged(product.run / "summary.json", f"RUN {product.run}", f"{key} is {short(update)}")
        config = product.config | {"generator": product.base}
        card = _card(
            product,
            lambda summary: cards.policy_card(config, update, kind=kind, summary=None if last else summary, name=name),
        )
    product.files["README.md"] = card.encode()


def _card(product: Product, write: Callable[[dict[str, Any] | None], str]) -> str:
    """The card that `write` makes of the run's summary. Raises InputError naming the run's file that does not hold what a run writes."""
    card = ""
    for file, summary in (("config.yaml", None), ("summary.json", product.summary)):  # first of the config alone
        try:
            card = write(summary)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            fact = f"{type(error).__name__}: {one_line(error)}"
            raise damaged(product.run / file, f"RUN {product.run}", fact) from error
    return card


def _check_file(file: Path, where: str) -> None:
    """Raises InputError for weights that are not whole."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as opened:
                opened.keys()
        elif not file.is_file():
            raise FileNotFoundError
    except FileNotFoundError:
        raise InputError(
            f"{where}: {file.parent.name}/{file.name} is missing", hint="run its command again with --overwrite"
        ) from None
    except (SafetensorError, OSError):
        raise InputError(
            f"{where}: {file.parent.name}/{file.name} is damaged", hint="run its command again with --overwrite"
        ) from None


# --- the hub ----------------------------------------------------------------------------------------------------------


def push(name: str, product: Product, *, public: bool, reporter: Reporter) -> dict[str, Any]:
    """One commit with all files; the repository is made where there is none. Returns its url and commit.

    A repository that is there keeps its visibility: raises InputError when that is not what was asked for.
    """
    if not get_token():
        raise MissingError(
            f"--push {name}: no token of the hub is stored", hint="`hf auth login` first, or set HF_TOKEN"
        )
    hub, wanted = HfApi(), "public" if public else "private"
    with pushing(name):
        try:
            private = bool(hub.model_info(name).private)
        except hub_errors.RepositoryNotFoundError:
            private = not public
            hub.create_repo(name, private=private, exist_ok=False)
        if private == public:
            hint = (
                "give --public, or another name"
                if public is False
                else "make it public on its settings page, or give another name"
            )
            raise InputError(
                f"--push {name}: is there, and {'private' if private else 'public'}, not {wanted}", hint=hint
            )
        size = sum(row["bytes"] for row in product.sizes)
        reporter.note(f"pushing {len(product.files)} files, {size / 1e6:,.1f} MB, to {name} ({wanted})")
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=file if isinstance(file, bytes) else str(file))
            for path, file in product.files.items()
        ]
        commit = hub.create_commit(
            name, operations, commit_message=f"The {product.kind} of drm {product.config['command']}"
        )
    signals.check(f"the push to {name} may not be complete")
    return {"url": f"{constants.ENDPOINT}/{name}", "commit": commit.oid}
