"""The `drm` command: its subcommands and the one boundary where errors become two lines and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from drmcli import __version__
from drmcli.cli import bench, config, data, demo, doctor, grpo, sample, score, serve, show, train_reward

app = typer.Typer(
    name="drm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Diffusion-based reward models: train them, measure them, use them.\n\n"
    "Everything works at once on a tiny embedded model, with no download and no GPU: try [bold]drm demo[/].",
)
START, MEASURE, USE, INSPECT = "Start", "Train and measure", "Use", "Look around"
app.command("demo", rich_help_panel=START)(demo.demo)
app.command("train-reward", rich_help_panel=MEASURE)(train_reward.train_reward)
app.command("bench", rich_help_panel=MEASURE)(bench.bench)
app.command("score", rich_help_panel=MEASURE)(score.score)
app.command("sample", rich_help_panel=USE)(sample.sample)
app.command("grpo", rich_help_panel=USE)(grpo.grpo)
app.command("serve", rich_help_panel=USE)(serve.serve)
app.command("show", rich_help_panel=INSPECT)(show.show)
app.add_typer(data.app, name="data", rich_help_panel=INSPECT)
app.add_typer(config.app, name="config", rich_help_panel=INSPECT)
app.command("doctor", rich_help_panel=INSPECT)(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"drm {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(invoke(sys.argv[1:] if argv is None else argv))


def invoke(argv: list[str]) -> int:
    """Run one command. Returns the exit code: see `drmcli.errors`."""
    from drmcli.cli.output import show_error
    from drmcli.errors import DrmError

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notices on import are not ours to show
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that is not UTF-8, or a terminal that is not, ends no run
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in argv
    try:
        code = app(argv, prog_name="drm", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except DrmError as error:
        if debug:
            raise
        show_error(error.message, error.hint)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        show_error("interrupted", "run the same command again to go on")
        return 130
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        command = getattr(getattr(error, "ctx", None), "command_path", "drm")
        show_error(message, f"`{command} --help` lists what there is")
        return 2
    except KeyboardInterrupt:
        show_error("interrupted", "run the same command again to go on from the last checkpoint")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        show_error("out of memory", "use smaller batches; --dry-run prints a memory plan")
        return 1
    except Exception as error:  # the last boundary: whatever comes here is a bug, and says so
        if debug:
            raise
        if "out of memory" in str(error).lower():
            show_error(
                f"out of memory: {error}", "use --set micro_batch_size=..., gradient_checkpointing, or see --dry-run"
            )
            return 1
        show_error(
            f"internal: {type(error).__name__}: {error}",
            "a bug in drm: run again with --debug and report the traceback",
        )
        return 1
