"""The `drm` command: its subcommands and the one boundary where errors become two lines and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from drmcli import __version__, signals
from drmcli.cli import (
    bench,
    config,
    data,
    demo,
    doctor,
    export,
    grpo,
    onward,
    pages,
    reproduce,
    sample,
    score,
    serve,
    show,
    train_reward,
)
from drmcli.cli.options import Command
from drmcli.errors import DrmError, Interrupted, is_out_of_memory
from drmcli.files import ROOM, disk_is_full


class Group(TyperGroup):
    """The root of all commands: what ends one reaches `invoke` as it is, where Typer would make exit codes without a word of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", hint=signals.AGAIN) from None
        except (EOFError, OSError) as error:
            raise _Carried() from error


class _Carried(Exception):
    """Holds, as its cause, an error that Typer would not let through."""


START, MEASURE, USE, INSPECT = "Start", "Train and measure", "Use", "Look around"


def make_app(words: Collection[str], *, everything: bool = False) -> typer.Typer:
    """All commands; those among `words` with their options, which take time to make. everything: also those that help leaves out."""
    app = typer.Typer(
        cls=Group,
        name="drm",
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Diffusion-based reward models: train them, measure them, use them.\n\n"
        "Everything works at once on a tiny embedded model, with no download and no GPU: try [bold]drm demo[/].\n\n"
        "A value is taken from the first that has it: flag, --set, --config, --preset, default.",
    )
    app.callback()(root)

    def add(panel: str, command: Command | Callable[..., None], **options: Any) -> None:
        name = (command.name if isinstance(command, Command) else command.__name__).replace("_", "-")
        made = command.made(full=name in words, everything=everything) if isinstance(command, Command) else command
        app.command(name, rich_help_panel=panel, **options)(made)

    add(START, demo.demo)
    add(MEASURE, train_reward.train_reward)
    add(MEASURE, bench.bench)
    add(MEASURE, reproduce.reproduce)
    add(MEASURE, score.score, no_args_is_help=True)
    add(USE, sample.sample)
    add(USE, grpo.grpo)
    add(USE, serve.serve)
    add(USE, export.export)
    add(INSPECT, show.show)
    app.add_typer(data.group(full="data" in words, everything=everything), name="data", rich_help_panel=INSPECT)
    app.add_typer(config.app, name="config", rich_help_panel=INSPECT)
    add(INSPECT, doctor.doctor)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"drm {__version__}")
        raise typer.Exit()


def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def invoke(argv: list[str]) -> int:
    """Run one command. Returns the exit code: see `drmcli.errors`."""
    from drmcli.cli.output import Stdout, show_error, show_warnings

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that spin long while they wait keep from the CPU the very thread that they wait for, where other work takes a core: a step
    # then takes many times as long. A short spin costs nothing on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notices on import are not ours to show
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("torch.utils._pytree").setLevel(
        logging.ERROR
    )  # nor PyTorch's of torchao, which others import too
    if sys.stderr is None:  # closed: nothing can be said there
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    out = Stdout(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that is not UTF-8, or a terminal that is not, ends no run
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv
    with signals.watched(), warnings.catch_warnings():
        show_warnings()
        try:
            with contextlib.redirect_stdout(out):  # type: ignore[type-var]
                everything = "--help-all" in argv
                words = [*argv, *os.environ.get("COMP_WORDS", "").split()]  # the second: the shell completes a line
                app = make_app(words, everything=everything)
                asked = ["--help" if everything and word == "--help-all" else word for word in argv]
                if (page := pages.asked(typer.main.get_command(app), asked)) is not None:
                    print(page)
                    if onwards := onward.ALONE.get(tuple(argv)):  # the end of the page, which is all that was asked for
                        print(f"\nnext: {' '.join(onwards)}")
                    code = 0
                else:
                    code = app(asked, prog_name="drm", standalone_mode=False)
                    code = code if isinstance(code, int) else 0
                if code == 130 and signals.came():  # before the command itself: Typer has made an exit code of it
                    raise Interrupted("interrupted", hint=signals.AGAIN)
        except BaseException as error:
            found = error.__cause__ if isinstance(error, _Carried) and error.__cause__ else error
            if debug and not isinstance(found, (typer.Exit, typer.TyperException, KeyboardInterrupt)):
                raise found from None
            told = explain(found)
            if told.message:
                show_error(told.message, told.hint)
            code = told.code
        if fault := out.close():
            show_error(f"stdout: cannot be written: {fault}", "what a run has made is in its folder: drm show")
            code = code or 1
    return code


class Told(NamedTuple):
    """How an error is told."""

    message: str
    hint: str
    code: int


def explain(error: BaseException) -> Told:
    """The two lines and the exit code of whatever ended a command."""
    if isinstance(error, DrmError):
        return Told(error.message, error.hint, error.exit_code)
    if signals.came() or isinstance(
        error, KeyboardInterrupt | typer.Abort
    ):  # whatever a library has made of the signal
        return Told("interrupted", signals.AGAIN, 130)
    if isinstance(error, typer.Exit):
        return Told("", "", error.exit_code)
    if isinstance(error, typer.TyperException):
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        command = getattr(getattr(error, "ctx", None), "command_path", "drm")
        return Told(message, f"`{command} --help` lists what there is", 2)
    if is_out_of_memory(error):
        fact = f": {error}" if str(error) else ""
        hint = "use smaller sizes or batches (--set micro_batch_size=..., gradient_checkpointing=true); --dry-run prints a memory plan"
        return Told(f"out of memory{fact}", hint, 1)
    if disk_is_full(error):
        where = getattr(error, "filename", None)
        return Told(f"{where or 'the disk'}: cannot write: No space left on device", ROOM, 1)
    if isinstance(error, SystemExit):
        return Told(f"internal: something called sys.exit({error.code!r})", REPORT, 1)
    return Told(f"internal: {type(error).__name__}: {error}", REPORT, 1)


REPORT = "a bug in drm: run again with --debug and report the traceback"


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(invoke(sys.argv[1:] if argv is None else argv))
