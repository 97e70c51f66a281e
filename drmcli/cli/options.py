"""Options that commands share, and the one way from a command's options to its recipe."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from drmcli.cli.fields import ConfigField, fields_of, singular

MODEL, RUN, OUTPUT = "Models", "Run", "Run"


def offering(values: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """What the shell asks for the completion of a value: those that begin with what is typed."""
    return lambda incomplete: [value for value in values() if value.startswith(incomplete)]


def run_argument(default: str) -> Any:
    """The argument RUN, and what it is where it is not given."""
    return typer.Argument(
        metavar="RUN", help=f"A run folder (default: {default}).", autocompletion=offering(lambda: run_folders("*"))
    )


Preset = Annotated[
    str | None,
    typer.Option(
        help="Preset (default: tiny); `drm config list` names them.",
        rich_help_panel=MODEL,
        autocompletion=offering(lambda: presets()),  # defined below
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML with config keys, such as a run's config.yaml.", rich_help_panel=RUN
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any config key; may be repeated.", rich_help_panel=RUN),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of everything random (default: 0).", rich_help_panel=RUN)
]
Device = Annotated[str | None, typer.Option(help="auto, cuda, cuda:1 or cpu.", rich_help_panel=MODEL)]
Dtype = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=MODEL)]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Folder with a published dataset in its own layout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the config and the plan; write nothing.", rich_help_panel=RUN)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only the run folder's path on stdout.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", hidden=True, rich_help_panel=OUTPUT)]
HelpAll = Annotated[bool, typer.Option("--help-all", help="Show every option there is.", rich_help_panel=OUTPUT)]
AllowOutside = Annotated[
    bool | None, typer.Option("--allow-outside", help="Let a data file name images outside its folder.")
]

METAVARS = {
    "label": "SCORER=WEIGHT|people", "only": "PART", "eval_prompts": "FILE",
    "generator": "REF", "reward": "SCORER", "against": "SCORER", "detector": "REF", "color_model": "REF", "judge": "SCORER|none",
    "scorers": "SCORER", "add_rewards": "SCORER=WEIGHT", "refresh_by": "SCORER", "lora": "REF", "out": "DIR",
    "data_dir": "DIR", "cache_dir": "DIR", "images": "DIR",
    "dataset": "NAME|PATH", "data": "NAME|PATH", "eval_data": "NAME|PATH", "prompts": "FILE", "preset": "NAME",
    "tune": "FILE", "methods": "FILE", "branch_sigmas": "LO,HI", "window": "LO,HI", "branch_steps": "FIRST,LAST",
    "to": "FOLDER", "push": "OWNER/NAME", "base": "OWNER/NAME",
}  # fmt: skip
"""What stands for a value in help, where its type says too little."""
KINDS = {int: "N", float: "X", str: "TEXT", bool: ""}
"""What stands for a value of a type."""
COMMON = {
    MODEL: "preset generator reward device dtype",
    RUN: "out seed cache_dir overwrite",
}
MORE = "More, also as --set KEY=VALUE"


@dataclass(frozen=True)
class Command:
    """A command whose options are the fields of its config."""

    name: str
    function: Callable[..., None]
    panels: dict[str, str]
    """Names of fields by the panel of the help page where they are listed; all others come with --help-all."""

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__

    def made(self, *, full: bool = True, everything: bool = False) -> Callable[..., None]:
        """The function for Typer. full: with its options, which cost time; everything: none of them hidden."""
        own = dict(inspect.signature(self.function, eval_str=True).parameters)
        rest = next((name for name, p in own.items() if p.kind is p.VAR_KEYWORD), None)
        own.pop(rest or "", None)
        taken = set(own) | {"prompts"} if "prompts_file" in own else set(own)  # --prompts is a file's name there
        fields = {k: f for k, f in fields_of(self.name).items() if k not in taken} if full else {}
        params = list(own.values())
        for panel, names in (self.panels | COMMON).items():
            for key in names.split():
                if key in fields:
                    params.append(self._option(fields.pop(key), panel, hidden=False, long=everything))
        params += [self._option(f, MORE, hidden=not everything, long=True) for f in fields.values()]
        if full:
            params += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
                for name, kind, default in SHARED
                if name not in ("config", "sets") or "preset" in fields_of(self.name)
            ]

        def run(**given: Any) -> None:
            for key, f in fields_of(self.name).items():
                if f.many and f.kind in (int, float) and given.get(key) is not None:
                    given[key] = numbers(given[key], self.flags(f)[0], f.kind)
            if self.repeats_reward and isinstance(given["reward"], list):
                given["reward"], *more = given["reward"]
                given["add_rewards"] = [*more, *(given["add_rewards"] or [])] or None
            self.function(**given)

        run.__doc__, run.__name__ = self.function.__doc__, self.function.__name__
        run.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in params}
        return run

    @property
    def repeats_reward(self) -> bool:
        """May `--reward` be given several times, with weights? The first is the config's reward, the others are added to it."""
        return "add_rewards" in fields_of(self.name)

    def flags(self, f: ConfigField) -> list[str]:
        """Names on the command line: of a list that is filled by repeating, one of it too."""
        names = [singular().get((self.name, f.name), f.name), f.name]
        if f.name == "sigmas":  # the same in every command
            names = ["sigmas", "sigma"]
        return ["--" + name.replace("_", "-") for name in dict.fromkeys(names)]

    def _option(self, f: ConfigField, panel: str, *, hidden: bool, long: bool) -> inspect.Parameter:
        flags = self.flags(f)
        many_numbers = f.many and f.kind in (int, float)
        metavar = (METAVARS.get(f.name) if f.kind is str or many_numbers else None) or (
            "N,N,..." if many_numbers else None
        )
        repeated = f.name == "reward" and self.repeats_reward
        if repeated:
            metavar = "SCORER[=WEIGHT]"
        metavar = metavar or ("NAME" if f.choices else KINDS[f.kind])
        if f.kind is bool:
            metavar = None
            flags = [f"{flags[0]}/--no-{flags[0][2:]}"] if f.default else flags
        kind: Any = str if many_numbers else f.kind
        info = typer.Option(
            *flags, help=f.long if long else f.short, metavar=metavar, hidden=hidden, rich_help_panel=panel, show_default=False,
            autocompletion=completion(f),
        )  # fmt: skip
        annotation: Any = Annotated[Optional[list[kind] if f.many or repeated else kind], info]  # type: ignore[valid-type]  # noqa: UP045
        return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def command(name: str, listed: str = "", **panels: str) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function: its own parameters come first, then an option for every field of the command's config.

    listed: fields of the first panel of the help page; panels: of further ones, by title. The function is called with its own
    parameters, and with the rest as keywords, for `execute`.
    """
    return lambda function: Command(name, function, {"Options": listed} | panels)


def numbers(texts: list[str], flag: str, kind: type) -> list[Any]:
    """Numbers that were given by repeating a flag, with commas between, or both. Raises InputError naming the flag."""
    from drmcli.errors import InputError

    try:
        return [kind(part) for text in texts for part in text.split(",")]
    except ValueError:
        example = "0.25,0.5" if kind is float else "0,1"
        raise InputError(
            f"{flag} {','.join(texts)}: not numbers with commas between", hint=f"for example {flag} {example}"
        ) from None


def completion(f: ConfigField) -> Callable[[str], list[str]] | None:
    """What the shell offers for a value."""
    known: dict[str, Callable[[], list[str]]] = {
        "preset": presets, "dataset": datasets, "data": datasets, "eval_data": datasets, "scorers": scorers, "against": scorers,
        "judge": scorers, "add_rewards": scorers, "reward": rewards, "init": rewards, "label": scorers,
        "lora": lambda: run_folders("*/lora"), "out": lambda: run_folders("*"),
    }  # fmt: skip
    values = known.get(f.name) or ((lambda: list(f.choices)) if f.choices else None)
    return None if values is None else offering(values)


def presets() -> list[str]:
    """Names of the presets."""
    import drmcli

    return sorted(p.stem for p in (Path(drmcli.__file__).parent / "config" / "presets").glob("*.yaml"))


def datasets() -> list[str]:
    """Names of datasets."""
    from drmcli.data.datasets import DATASETS

    return ["shapes", *DATASETS]


def scorers() -> list[str]:
    """Names of scorers."""
    from drmcli.scorers import NAMES

    return list(NAMES)


def rewards() -> list[str]:
    """Names of scorers, and reward models under runs/."""
    return scorers() + run_folders("*/reward")


def run_folders(pattern: str) -> list[str]:
    """Folders under runs/, the newest first."""
    found = [p for p in Path("runs").glob(pattern) if p.is_dir()]
    return [str(p) for p in sorted(found, key=lambda p: -p.stat().st_mtime)]


SHARED: list[tuple[str, Any, Any]] = [
    ("config", ConfigFile, None), ("sets", Sets, None), ("dry_run", DryRun, False), ("as_json", Json, False), ("quiet", Quiet, False),
    ("debug", Debug, False), ("help_all", HelpAll, False),
]  # fmt: skip
"""Options of every command that are no fields."""
NOT_CONFIG = {"help_all", "preset", "config", "sets", "dry_run", "as_json", "quiet", "debug"}


def execute(command: str, options: dict[str, Any]) -> None:
    """Resolve the config from a command's options, then plan or run its recipe and draw the result.

    `options` are the command's locals: the config's fields, and the names of NOT_CONFIG.
    """
    from importlib import import_module

    from drmcli import config as configs
    from drmcli.cli import inputs, onward
    from drmcli.cli.output import Screen, show_json

    environment_numbers()
    flags = {k: v for k, v in options.items() if k not in NOT_CONFIG}
    config = configs.resolve(
        command, preset=options.get("preset"), file=options.get("config"), sets=options.get("sets"), flags=flags
    )
    inputs.check(command, config)
    inputs.refuse_unread(command, config, inputs.given(flags, options.get("sets")))
    module = "drmcli.recipes." + command.replace("-", "_")
    if options.get("dry_run"):
        plan = import_module(module).plan(config)
        if options["as_json"]:
            show_json({"command": command, "config": configs.to_dict(config), "plan": plan})
        else:
            from drmcli.cli import render

            render.plan(command, configs.to_yaml(config, command), plan)
        return
    screen = Screen(quiet=options["quiet"] or options["as_json"])
    screen.note(what_happens(command, config))
    with screen:
        screen.busy("load")
        summary = import_module(module).run(config, screen)
    if not _is_main():
        return
    if options["as_json"]:
        show_json(summary)
    elif options["quiet"]:
        print(summary["run"])
    else:
        from drmcli.cli import render

        render.SUMMARIES[command](summary)
        onward.say(onward.after(command, summary, configs.to_dict(config)))
    limit = getattr(config, "fail_under", None)
    if limit is not None and summary["accuracy"] < limit:
        from drmcli.errors import RunError

        raise RunError(
            f"--fail-under {limit:g}: the accuracy is {summary['accuracy']:.2f} %",
            hint="see the run folder for the pairs",
        )


def what_happens(command: str, config: Any) -> str:
    """The first line of a run, before seconds of imports: command, device and number format, seed, run folder."""
    from drmcli.run import planned_folder

    several = environment_numbers().get("WORLD_SIZE", 1) > 1  # then the processes choose the folder together
    where = "a folder in runs/" if config.out is None and several else planned_folder(command, config)
    device = config.device if config.device != "auto" else "cuda" if has_gpu() else "cpu"
    dtype = getattr(config, "dtype", "auto")
    dtype = dtype if dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    return f"drm {command} on {device} in {dtype}, seed {config.seed}, into {where}"


def has_gpu() -> bool:
    """Is there an NVIDIA GPU, as far as can be told without importing torch?"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible not in ("", "-1") and os.path.exists("/dev/nvidiactl")


ENVIRONMENT_NUMBERS = (
    "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
    "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT",
)  # fmt: skip
"""Numbers of the environment: those by which launchers tell a process its place among others, and others that a library turns into a
number without a look at what they hold."""


def environment_numbers() -> dict[str, int]:
    """Those that are set. An empty one, as schedulers and CI export it, is unset for the libraries too.

    Raises InputError for one that is no number.
    """
    from drmcli.errors import InputError

    found = {}
    for name in ENVIRONMENT_NUMBERS:
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip():
            del os.environ[name]
            continue
        try:
            found[name] = int(text)
        except ValueError:
            raise InputError(f"{name}: {text[:80]!r} is no number", hint=f"unset {name}, or make it a number") from None
    return found


def _is_main() -> bool:
    numbers = environment_numbers()
    return numbers.get("RANK", 0) == 0 or numbers.get("WORLD_SIZE", 1) <= 1
