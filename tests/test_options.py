"""The command line is made from the configs' fields: nothing is said twice, help fits a screen, and old ways of writing still work."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import typer.main

from drmcli import config as configs
from drmcli.cli import fields, options, pages
from drmcli.cli.app import make_app
from drmcli.errors import InputError

PAGES = ["demo", "train-reward", "bench", "score", "sample", "grpo", "serve", "reproduce", "show", "doctor"]
GROUPS = [
    ["data", "list"],
    ["data", "get"],
    ["data", "check"],
    ["data", "make"],
    ["config", "list"],
    ["config", "show"],
    [],
]


@pytest.mark.parametrize("page", [[p] for p in PAGES] + GROUPS, ids=" ".join)
def test_help_fits_a_screen(page: list[str], monkeypatch: pytest.MonkeyPatch, drm) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = drm(*page, "--help")
    assert result.code == 0
    lines = result.out.rstrip().splitlines()
    assert len(lines) <= 60, len(lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", configs.COMMANDS)
def test_fields_are_read_as_pydantic_reads_them(command: str) -> None:
    """What is taken from the text of the configs is what the configs are: names, lines, defaults, types."""
    cls = configs.COMMANDS[command]
    found = fields.fields_of(command)
    assert set(found) == set(configs.field_names(cls))
    about = configs.describe(cls)
    made = cls.__pydantic_fields__
    for name, field in found.items():
        assert field.about == " ".join(about[name].split())
        default = made[name].get_default(call_default_factory=True)
        assert field.default == default or field.default is None
        kinds = {bool: "bool", int: "int", float: "float", str: "str"}
        text = str(made[name].annotation)
        assert field.choices or kinds[field.kind] in text, (name, text)
        assert field.many == ("list[" in text), (name, text)


@pytest.mark.parametrize("command", list(configs.COMMANDS))
def test_every_field_is_a_flag(command: str, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    """--help-all lists all of them with their whole lines, bounds and defaults."""
    monkeypatch.setenv("COLUMNS", "200")
    words = command.split("-") if command.startswith("data-") else [command]
    page = " ".join(drm(*words, "--help-all").out.replace("│", " ").split())
    arguments = {
        ("score", "images"),
        ("sample", "prompts"),
        ("data-make", "prompts"),
        ("data-label", "folder"),
        ("export", "run"),
    }
    for field in fields.fields_of(command).values():
        if (command, field.name) in arguments:
            continue
        assert f"--{field.name.replace('_', '-')}" in page or f"--{field.name.rstrip('s')}" in page, field.name
    if command != "data-label":  # its help page has them all
        assert len(page) > len(" ".join(drm(*words, "--help").out.split()))


def resolved(monkeypatch: pytest.MonkeyPatch, drm, *argv: object) -> dict:
    """The config that a command line gives."""
    found: dict = {}

    def keep(command: str, given: dict) -> None:
        flags = {k: v for k, v in given.items() if k not in options.NOT_CONFIG}
        found.update(
            configs.to_dict(configs.resolve(command, preset=given.get("preset"), sets=given.get("sets"), flags=flags))
        )

    monkeypatch.setattr(options, "execute", keep)
    result = drm(*argv)
    assert result.code == 0, result.err
    return found


@pytest.mark.parametrize("command", [["bench"], ["score", "a.png", "--prompt", "x"]])
@pytest.mark.parametrize(
    "words",
    [
        "--sigma 0.1 --sigma 0.5",
        "--sigmas 0.1,0.5",
        "--sigma 0.1,0.5",
        "--sigmas 0.1 --sigma 0.5",
        "--sigmas 0.1 --sigmas 0.5",
    ],
)
def test_noise_levels_are_written_as_one_likes(command: list[str], words: str, monkeypatch, drm) -> None:
    assert resolved(monkeypatch, drm, *command, *words.split())["sigmas"] == [0.1, 0.5]


CASES = {
    "hidden": (["grpo", "--lora-rank", "8"], {"lora_rank": 8}),
    "list": (["grpo", "--lora-targets", "attn.to_q", "--lora-targets", "attn.to_k"], {"lora_targets": ["attn.to_q", "attn.to_k"]}),
    "pair": (["sample", "x", "--branch-sigmas", "0.2,1"], {"branch_sigmas": [0.2, 1.0]}),
    "steps": (["sample", "x", "--branch-steps", "0,3"], {"branch_steps": [0, 3]}),
    "window": (["grpo", "--window", "0.1,0.9"], {"window": [0.1, 0.9]}),
    "off": (["train-reward", "--no-shared-noise", "--no-resume"], {"shared_noise": False, "resume": False}),
    "on": (["sample", "x", "--trace"], {"trace": True}),
    "stepwise": (["sample", "x", "--stepwise"], {"mode": "stepwise"}),
    "singular": (["bench", "--scorer", "clip", "--scorers", "shapes"], {"scorers": ["clip", "shapes"]}),
    "example": (["sample"], {"prompts": ["a large red circle above a small blue square"]}),
    "flag over set": (["bench", "--set", "seed=1", "--seed", "2"], {"seed": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flags_fill_the_config(name: str, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    argv, wanted = CASES[name]
    found = resolved(monkeypatch, drm, *argv)
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("words", ["--sigma x", "--sigmas 0.1,", "--sigmas ,"])
def test_no_numbers(words: str, drm) -> None:
    result = drm("bench", *words.split())
    assert result.code == 2
    assert "not numbers with commas between" in result.err


def test_nothing_is_useful(drm) -> None:
    """Without arguments: help, and no empty error."""
    for argv in ([], ["score"], ["data"], ["config"]):
        result = drm(*argv)
        assert (result.code, result.err) == (0, ""), argv
        assert "Usage: drm" in result.out and "\nnext: drm " in result.out


def test_values_are_completed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "a" / "lora").mkdir(parents=True)
    known = fields.fields_of("sample") | fields.fields_of("bench")
    offered = {
        name: options.completion(known[name]) for name in ("preset", "mode", "dataset", "scorers", "lora", "out")
    }
    assert all(offered.values())
    assert "tiny" in offered["preset"]("t")  # type: ignore[misc]
    assert offered["mode"]("st") == ["stepwise"]  # type: ignore[misc]
    assert "hpdv2" in offered["dataset"]("h")  # type: ignore[misc]
    assert "pickscore" in offered["scorers"]("p")  # type: ignore[misc]
    assert offered["lora"]("") == ["runs/a/lora"]  # type: ignore[misc]
    assert offered["out"]("runs/") == ["runs/a"]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("drm sample --mode b", ["best-of-n", "beam"]),
        ("drm show runs/", ["runs/mine"]),
        ("drm config show pa", ["paper"]),
    ],
)
def test_the_shell_completes_a_line(line: str, offered: list[str], tmp_path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    asked = {"_DRM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [sys.executable, "-m", "drmcli"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == offered, done.stderr
    assert "torch" not in done.stderr


def test_numbers_name_their_flag() -> None:
    with pytest.raises(InputError, match="--window a: not numbers"):
        options.numbers(["a"], "--window", float)


@pytest.mark.parametrize("command", configs.COMMANDS)
def test_help_lines_are_whole(command: str, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    """No line of a help page is cut short."""
    monkeypatch.setenv("COLUMNS", "100")
    words = command.split("-") if command.startswith("data-") else [command]
    cut = [line for line in drm(*words, "--help").out.splitlines() if " ..." in line and "N,N" not in line]
    assert cut == []


SCORER_FLAGS = {
    "sample": "--reward", "score": "--reward", "bench": "--reward --scorer --against", "grpo": "--reward --judge --add-reward",
}  # fmt: skip


@pytest.mark.parametrize("command, flag", [(c, f) for c, flags in SCORER_FLAGS.items() for f in flags.split()])
def test_a_scorer_is_named_alike_everywhere(
    command: str, flag: str, tmp_path, monkeypatch: pytest.MonkeyPatch, drm
) -> None:
    """Every kind of name passes what is checked before anything is loaded, and a wrong one is told with its flag."""
    from drmcli.cli import inputs

    (tmp_path / "lr=0.5").mkdir()
    monkeypatch.chdir(tmp_path)
    key = {"--scorer": "scorers", "--add-reward": "add_rewards"}.get(flag, flag[2:])
    for ref in ("pickscore", "pickscore=.", "dina-lrm", "mine:score", "http://host:1", "owner/name", "lr=0.5"):
        value = [ref] if key.endswith("s") and key != "against" else ref
        inputs.check(command, configs.resolve(command, flags={key: value}))
    argv = [command, *(["x"] if command == "sample" else ["a.png", "--prompt", "x"] if command == "score" else [])]
    (tmp_path / "a.png").touch()
    result = drm(*argv, flag, "pikscore")
    assert result.code == 2 and result.err.startswith(f"error: {flag} pikscore: there is no such scorer")
    assert "did you mean pickscore" in result.err


@pytest.mark.parametrize("command", [["sample", "x"], ["grpo"]], ids=["sample", "grpo"])
def test_rewards_are_repeated(command: list[str], monkeypatch: pytest.MonkeyPatch, drm) -> None:
    found = resolved(
        monkeypatch, drm, *command, "--reward", "clip=2", "--reward", "pickscore=0.5", "--add-reward", "shapes"
    )
    assert (found["reward"], found["add_rewards"]) == ("clip=2", ["pickscore=0.5", "shapes"])


@pytest.mark.parametrize(
    "argv, title",
    [
        ("", "Usage: drm [OPTIONS] COMMAND"),
        ("data", "Usage: drm data [OPTIONS] COMMAND"),
        ("score", "Usage: drm score [OPTIONS] [IMAGE...]"),
        ("data make -h", "Usage: drm data make [OPTIONS] [PROMPTS]"),
        ("show --help", "Usage: drm show [OPTIONS] [RUN]"),
        ("data get --json --help", "Usage: drm data get [OPTIONS] NAME"),
        ("sample", None),
        ("sample -- --help", None),
        ("nosuch --help", None),
        ("data nosuch --help", None),
        ("score a.png", None),
    ],
)
def test_which_page_is_asked_for(argv: str, title: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = typer.main.get_command(make_app(argv.split()))
    found = pages.asked(root, argv.split())
    assert found is None if title is None else (found or "").startswith(title)
    monkeypatch.setenv("_DRM_COMPLETE", "complete_bash")
    assert pages.asked(root, argv.split()) is None, "the shell completes a line"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100])
def test_pages_keep_to_their_width(width: int) -> None:
    """Whatever the terminal, and an example that is broken can still be pasted into a shell."""
    root = typer.main.get_command(make_app(["sample", "grpo", "data"]))
    for command in (root, root.commands["sample"], root.commands["grpo"], root.commands["data"].commands["make"]):  # type: ignore[attr-defined]
        found = pages.page(command, "drm x", width)
        long = [line for line in found.splitlines() if len(line) > width]
        assert all(len(line.split()) <= 3 or '"' in line for line in long), (
            long
        )  # what cannot be broken: a name, a quoted text
        assert "[bold]" not in found
    example = pages._example('drm sample "a large red circle" --stepwise --beams 4', width)
    assert shlex.split("\n".join(example).replace("\\\n", "")) == [
        "drm",
        "sample",
        "a large red circle",
        "--stepwise",
        "--beams",
        "4",
    ]
    assert all(line.rstrip(" \\").count('"') % 2 == 0 for line in example)
