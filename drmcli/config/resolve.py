"""Configs resolved in one order: defaults < preset < config file < `--set` < flag.

A preset is a YAML file of `drmcli/config/presets`: a section `common` and one a command, with only what differs from the
defaults, or from another preset that it names at its head (`preset: flux1-dev`). Unknown keys, unknown names and wrong values
are InputErrors that list close matches; nothing is ignored. `{package}` in a path stands for the folder of the installed package.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

import drmcli
from drmcli.config.commands import COMMANDS, PATHS, SINGULAR, TEXTS
from drmcli.data.text import cut, dump_yaml, kind, parse_yaml, read_text, repaired, short, sound
from drmcli.errors import InputError, MissingError

C = TypeVar("C")


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files("drmcli.config.presets").iterdir()
        if f.name.endswith(".yaml")
    )


def preset_text(name: str, source: str = "--preset") -> str:
    """A preset's YAML with the comments of its header. Raises InputError, which names the source, for an unknown name."""
    if name not in preset_names():
        raise InputError(
            f"{source}: there is no preset {short(name)}", hint=_closest(name, preset_names(), "see `drm config list`")
        )
    return (resources.files("drmcli.config.presets") / f"{name}.yaml").read_text(encoding="utf-8")


def preset_values(name: str, command: str, source: str = "--preset") -> dict[str, Any]:
    """What a preset sets for a command: what the preset that it is based on sets, its `common` section and the command's own."""
    sections = parse_yaml(preset_text(name, source), f"--preset {name}") or {}
    base = sections.get("preset")
    return (preset_values(base, command) if base else {}) | _of_sections(sections, command, f"--preset {name}")


def field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def resolve(
    command: str,
    *,
    preset: str | None = None,
    file: str | None = None,
    sets: list[str] | None = None,
    flags: dict[str, Any] | None = None,
) -> Any:
    """The config of a command from all its sources. Flags that are None were not given.

    Raises InputError that names the source (`--set`, the file, the flag) of what is wrong.
    """
    cls = COMMANDS[command]
    loaded = read_config_file(file, command) if file else {}
    assigned = [_assignment(item, cls) for item in sets or []]
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    values: dict[str, Any] = {}
    if "preset" in field_names(cls):
        named = [("--preset", preset), *(("--set preset", v) for k, v in reversed(assigned) if k == "preset")]
        named += [(f"--config {file}", loaded.get("preset")), ("--preset", "tiny")]
        source, name = next((source, str(name)) for source, name in named if name)
        values = preset_values(name, command, source) | {"preset": name}
    values |= {key: value for key, value in loaded.items() if key != "preset"}
    values |= {key: value for key, value in assigned if key != "preset"} | given
    sources = dict.fromkeys(loaded, f"--config {file}") | {k: f"--set {k}" for k, _ in assigned}
    sources |= {key: flag_of(command, key) for key in given}
    for key, value in values.items():
        if key in PATHS and (command, key) not in TEXTS:
            values[key] = _place(value, key, str(sources.get(key) or key))
    return build(cls, values, sources)


def build(cls: type[C], values: dict[str, Any], sources: dict[str, Any] | None = None) -> C:
    """Validate values into a config. Raises InputError with the key, its source and the fact."""
    sources = sources or {}
    for key in values:
        _known(key, cls, sources.get(key))
    values = {key: _sound(value, sources.get(key) or key) for key, value in values.items()}
    for key, value in values.items():  # pydantic takes True for the number 1
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, bool) for part in parts) and "bool" not in str(_annotations(cls)[key]):
            raise InputError(
                f"{sources.get(key) or key}: {short(value)} is no value of {key}", hint=f"{key}: {describe(cls)[key]}"
            )
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule about several keys, whose text names them
            raise InputError(first["msg"].removeprefix("Value error, "), hint="see --help") from None
        key = str(first["loc"][0])
        where = str(sources.get(key) or key)
        names_key = where.lstrip("-").removeprefix("set ").replace("-", "_") in (key, key.removesuffix("s"))
        fact = first["msg"].replace("Input should", "must").replace("should", "must")
        entry = f"entry {first['loc'][1] + 1} " if len(first["loc"]) > 1 and isinstance(first["loc"][1], int) else ""
        raise InputError(
            f"{where}: {'' if names_key else key + ' '}{entry}{fact[0].lower()}{fact[1:]}, got {short(first['input'])}",
            hint=f"{key}: {describe(cls)[key]}",
        ) from None


def _annotations(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def _sound(value: Any, where: str) -> Any:
    """The value, its texts checked to be UTF-8; what a locale without it has taken apart is put together."""
    if isinstance(value, str):
        return sound(repaired(value), where)
    return [_sound(part, where) for part in value] if isinstance(value, list) else value


def _place(value: Any, key: str, where: str) -> Any:
    """The value, `~` at the head of a path in it replaced by the home folder, as a shell does where it is not in quotes.

    Raises InputError for a name that the file system's encoding cannot hold: no such file could be opened.
    """
    if isinstance(value, list):
        return [_place(part, key, where) for part in value]
    if not isinstance(value, str):
        return value
    text = sound(repaired(value), where)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: {short(text)}: files have no such names where the locale's encoding is {sys.getfilesystemencoding()}",
            hint="set PYTHONUTF8=1, or another locale (LC_ALL=C.UTF-8)",
        ) from None
    if key == "dataset" and "~" in text:  # several with commas between
        return ",".join(os.path.expanduser(name.strip()) for name in text.split(","))
    return os.path.expanduser(text)


def describe(cls: type) -> dict[str, str]:
    """The line below each field of a config."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):  # pydantic reads the lines of each class for itself
        for name, info in part.__dict__.get("__pydantic_fields__", {}).items():
            found[name] = info.description or found.get(name, "")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, ready for YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any, command: str) -> str:
    """A config as the YAML that `--config` reads. The command comes last: a file that was cut between two lines lacks it."""
    return dump_yaml({**to_dict(config), "command": command})


def to_command(command: str, values: dict[str, Any]) -> list[str]:
    """The words of the command line that repeats a run of these values: what differs from the preset, without where it was kept.

    For commands whose keys are all flags, as train-reward and grpo.
    """
    cls, words = COMMANDS[command], ["drm", command]
    flags: dict[str, Any] = {}
    if "preset" in field_names(cls) and values.get("preset", "tiny") != "tiny":
        flags["preset"] = values["preset"]
        words += ["--preset", str(values["preset"])]
    usual = to_dict(resolve(command, preset=flags.get("preset")))
    for key in field_names(cls):
        value = values.get(key, usual[key])
        if key in PLACES or value == usual[key]:
            continue
        flag = flag_of(command, key)
        if value is None or isinstance(value, bool) or value == []:
            words += ["--set", f"{key}={json.dumps(value)}"]
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            words += [word for part in value for word in (flag, part)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


PLACES = {"preset", "out", "resume", "overwrite", "cache_dir", "no_cache", "device"}
"""Keys that say where a run works, and nothing of its result; the preset is named first."""


def read_config_file(path: str, command: str) -> dict[str, Any]:
    """A YAML file of config keys; `command:` in it must be this command."""
    name = f"--config {path}"
    values = parse_yaml(read_text(path, name=name, hint="give a YAML file, such as a run's config.yaml"), name)
    if not isinstance(values, dict):
        raise InputError(
            f"--config {path}: holds no `key: value` lines", hint="`drm config show tiny` prints an example"
        )
    if {"common", *COMMANDS} & set(values):  # in a preset's form, as `drm config show` prints it
        whole = {key: value for key, value in values.items() if key not in ("common", *COMMANDS)}
        values = whole | _of_sections(values, command, name)
    if strange := [key for key in values if not isinstance(key, str)]:
        raise InputError(
            f"--config {path}: {short(strange[0])} is no key", hint="`drm config show tiny` prints an example"
        )
    wanted = values.pop("command", command)
    if not isinstance(wanted, str) or wanted not in COMMANDS:
        hint = _closest(str(wanted), list(COMMANDS), f"leave it out, or write `command: {command}`")
        raise InputError(f"{name}: there is no command {short(wanted)}", hint=hint)
    if wanted != command:
        words = f"drm {wanted.replace('data-', 'data ')}"
        raise InputError(f"{name}: written for `{words}`", hint=f"run `{words} --config {path}`")
    return values


def _of_sections(sections: dict[str, Any], command: str, name: str) -> dict[str, Any]:
    """What a file in a preset's form sets for a command: what it knows of `common`, and the command's own section.

    Raises InputError for a section, of any command, that does not hold keys which it can have.
    """
    known = {section: field_names(cls) for section, cls in COMMANDS.items()}
    known["common"] = sorted({key for keys in known.values() for key in keys})
    found: dict[str, dict[str, Any]] = {}
    for section in [key for key in sections if key in known]:
        found[section] = {} if sections[section] is None else sections[section]
        if not isinstance(found[section], dict):
            raise InputError(
                f"{name}: {section} is {kind(found[section])}, not a section of `key: value` lines",
                hint="`drm config show tiny` prints an example",
            )
        for key in found[section]:
            if key not in known[section]:
                hint = _closest(str(key), known[section], "`drm config show tiny` lists the keys")
                raise InputError(f"{name}: {section}: there is no key {short(key)}", hint=hint)
    common = {key: value for key, value in found.get("common", {}).items() if key in known[command]}
    return common | found.get(command, {})


def package_path(text: str) -> str:
    """`{package}` in a path replaced by the folder of the installed package."""
    return text.replace("{package}", str(Path(drmcli.__file__).parent))


def split_ratio(item: str) -> tuple[str, float | None]:
    """`NAME=NUMBER`, data with a ratio or a scorer with a weight, as its parts; None where there is no number, or the whole is a file."""
    name, mark, number = item.rpartition("=")
    if mark and not os.path.exists(package_path(item)):
        try:
            return name, float(number)
        except ValueError:  # NAME=FOLDER
            pass
    return item, None


def dataset_names(text: str) -> list[str]:
    """Datasets with commas between, one by one. Raises InputError where none is named."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--dataset {text!r}: names nothing", hint="for example --dataset shapes")
    return names


def flag_of(command: str, key: str) -> str:
    """The flag that sets a key of a command's config."""
    return "--" + SINGULAR.get((command, key), key).replace("_", "-")


def spoken(ref: str | None) -> str:
    """A model reference as people read it: the embedded models by what they are, everything else as it was given."""
    inside = package_path("{package}/tiny/weights/")
    text = package_path(ref or "none")
    if text.startswith(inside):
        return {
            "reward": "the first embedded reward model",
            "reward-own": "the embedded reward model",
            "generator": "the embedded generator",
        }.get(text.removeprefix(inside).strip("/"), "a file of the embedded world")
    return ref or "none"


def local_or_hub(ref: str, flag: str) -> str:
    """Where a model reference points: an existing folder, or a hub id as it is.

    Raises MissingError when it looks like a path and is not there, InputError when it is empty.
    """
    if not ref:
        raise InputError(f"{flag}: no model is named", hint=f"give {flag} FOLDER_OR_HUB_ID, or a --preset that has one")
    path = package_path(ref)
    if Path(path).is_dir():
        return path
    if Path(path).is_file():
        hint = "give the folder that holds config.json or model_index.json"
        if flag == "--generator" and Path(path).suffix in (".safetensors", ".ckpt"):
            hint = "turn a single-file checkpoint into one in Python: PIPELINE.from_single_file(FILE).save_pretrained(FOLDER)"
        raise InputError(f"{flag} {ref}: a file, not a folder", hint=hint)
    looks_local = path.startswith((".", "/", "~", "{")) or path.count("/") != 1
    if looks_local:
        raise MissingError(
            f"{flag} {ref}: there is no such folder", hint="give an existing folder, or a hub id like owner/name"
        )
    return path


def _assignment(item: str, cls: type) -> tuple[str, Any]:
    key, mark, value = item.partition("=")
    key = key.strip().replace("-", "_")
    if not mark:
        raise InputError(f"--set {cut(item)}: not of the form key=value", hint="for example --set steps=100")
    _known(key, cls, f"--set {key}")
    hint = "quote it, for example --set 'name=\"a: b\"'"
    return key, parse_yaml(sound(repaired(value), f"--set {key}"), f"--set {key}: the value", hint=hint)


def _known(key: str, cls: type, source: Any) -> None:
    if key not in field_names(cls):
        where = source or key
        hint = _closest(key, field_names(cls), "`drm config show tiny` lists the keys")
        raise InputError(f"{where}: there is no key {short(key)}", hint=hint)


def _closest(name: str, names: list[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise
