"""`drm data list|get|check|make|label`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import data_label, data_make
from drmcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Datasets of human preferences.")


def group(*, full: bool, everything: bool) -> typer.Typer:
    """All of `drm data`; `make` with its options, as `Command.made` has them."""
    made = typer.Typer(no_args_is_help=True, help=app.info.help)
    made.registered_commands = list(app.registered_commands)
    made.command("label")(data_label.label)
    made.command("make")(data_make.make.made(full=full, everything=everything))
    return made


@app.command("list")
def list_datasets(as_json: o.Json = False) -> None:
    """Name the published datasets with their sizes and licences.

    [bold]Example[/]

      drm data list
    """
    from drmcli.cli import onward
    from drmcli.cli.output import show_json, stdout
    from drmcli.cli.render import table
    from drmcli.data.datasets import DATASETS

    if as_json:
        show_json({name: {k: v for k, v in vars(d).items() if k != "reader"} for name, d in DATASETS.items()})
        return
    made = table("datasets that drm reads in their published layouts", "name", "size", "licence", "splits", "what")
    made.add_row(
        "shapes",
        "made on the fly",
        "this project's",
        "train, val, test",
        "pictures of the embedded world, ranked by its judge",
    )
    for name, d in DATASETS.items():
        made.add_row(name, d.size, d.licence + (", gated" if d.gated else ""), ", ".join(d.splits), d.description)
    stdout().print(made)
    onward.say(["drm", "data", "get", "hpdv2"])


@app.command("get")
def get(
    name: Annotated[
        str,
        typer.Argument(help="A published dataset; `drm data list` names them.", autocompletion=o.offering(o.datasets)),
    ],
    split: Annotated[str | None, typer.Option(help="Split (default: the one that is benched).")] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where to put it (default: data/NAME).")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fetch what a split needs; goes on where it stopped.

    [bold]Examples[/]

      drm data get hpdv2

      drm data get pickapic --split validation_unique --data-dir ~/pickapic
    """
    from pathlib import Path

    from drmcli.cli import onward
    from drmcli.cli.output import Screen, show_json
    from drmcli.recipes import data as recipe

    with Screen(quiet=quiet or as_json) as screen:
        found = recipe.get(name, split, Path(data_dir or f"data/{name}").expanduser(), screen)
    if as_json:
        show_json(found)
    else:
        print(found["folder"])
        if not quiet:
            onward.say(onward.after_fetch(name, found["folder"], found["split"]))


@app.command("check")
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH",
            help="A file of pairs or rankings, or a published dataset.",
            autocompletion=o.offering(o.datasets),
        ),
    ],
    data_dir: o.DataDir = None,
    split: Annotated[str | None, typer.Option(help="Split of a published dataset.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="A second set that should share nothing with the first.")
    ] = None,
    against_split: Annotated[
        str | None, typer.Option(help="Its split; alone, another split of the same dataset.")
    ] = None,
    allow_outside: o.AllowOutside = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Read every picture once; name what is unreadable, double, empty, or in both of two sets. Exits with 1 when something is wrong.

    [bold]Examples[/]

      drm data check pairs.jsonl

      drm data check hpdv2 --data-dir ~/HPDv2 --split test

      drm data check hpdv2 --data-dir ~/HPDv2 --split test --against-split train
    """
    from os.path import expanduser

    from drmcli.cli import onward
    from drmcli.cli.output import Screen, show_json, stdout
    from drmcli.cli.render import table
    from drmcli.data.datasets import DATASETS
    from drmcli.recipes import data as recipe

    with Screen(quiet=quiet or as_json) as screen:
        found = recipe.examine(
            expanduser(path),
            data_dir=None if data_dir is None else expanduser(data_dir),
            split=split,
            allow_outside=bool(allow_outside),
            reporter=screen,
            against=None if against is None else expanduser(against),
            against_split=against_split,
        )
    if as_json:
        show_json(found)
    elif not quiet:
        made = table(f"{path}: {'fine' if found['ok'] else 'something is wrong'}", "what", "found")
        for key, value in found.items():
            if key not in ("data", "ok"):
                some = value[:3] if isinstance(value, list) else value
                made.add_row(key, f"{len(value)}: {some}" if isinstance(value, list) and value else str(value or 0))
        stdout().print(made)
        if found["ok"]:
            texts = found["prompts"] - found["repeated prompts"]
            onward.say(onward.after_check(path, data_dir, split, published=path in DATASETS, texts=texts))
    if not found["ok"]:
        raise typer.Exit(1)
