"""The command line: quick to answer, one way of speaking, and true help."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SMALL

from drmcli import config as configs
from drmcli.cli import app as application
from drmcli.errors import InputError

COMMANDS = [
    "demo",
    "train-reward",
    "bench",
    "sample",
    "grpo",
    "score",
    "serve",
    "export",
    "show",
    "data",
    "config",
    "doctor",
]
HEAVY = ("torch", "diffusers", "transformers", "pandas", "pyarrow", "matplotlib", "yaml", "numpy", "pydantic", "rich")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    ("own", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_soon_sleep_while_they_wait(own: dict[str, str], spins: str) -> None:
    """Set before torch is imported, which reads it once; what the user has set stays."""
    code = """
import os, sys
from drmcli.cli.app import invoke
assert invoke(["--help"]) == 0 and "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | own
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.split() == [spins], done.stderr


def test_help_imports_nothing_heavy() -> None:
    """Every help page in one process, and still none of the libraries that take seconds to import."""
    code = f"""
import sys, io, contextlib
from drmcli.cli.app import invoke
for name in {[[], *[[c] for c in COMMANDS]]!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        assert invoke([*name, "--help"]) == 0, name
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_happens_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """The first line of a run waits for the config's check alone."""
    code = f"""
import sys, typer
from drmcli.cli import output
from drmcli.cli.app import invoke

def note(self, text):
    print(text, [m for m in {HEAVY!r} if m in sys.modules], flush=True)
    raise typer.Exit

output.Screen.note = note
for argv in ["sample x", "grpo", "bench", "train-reward", "demo", "score x.png --prompt x"]:
    invoke([*argv.split(), "--out", "o"])
"""
    (tmp_path / "x.png").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(re.match(r"drm .* into o \['yaml', 'pydantic'\]$", line) for line in lines), lines


def test_importing_the_package_imports_no_torch_and_prints_nothing() -> None:
    code = "import sys, drmcli; print('torch' in sys.modules); drmcli.RewardModel; print('torch' in sys.modules)"
    loud = {k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=loud)
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert done.stderr == ""


def examples(text: str) -> list[list[str]]:
    return [shlex.split(line.split("|")[-1]) for line in text.splitlines() if re.match(r"\s*(drm|.*\| drm) ", line)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("data", "config")])
def test_help_has_examples_whose_options_exist(command: str, drm) -> None:
    page = drm(command, "--help").out
    module = __import__(f"drmcli.cli.{command.replace('-', '_')}", fromlist=["x"])
    found = [e for e in examples(getattr(module, command.replace("-", "_")).__doc__) if e[1] == command]
    assert len(found) >= 2
    for example in found:
        for word in example:
            if word.startswith("--"):
                assert word in page.replace("\n", ""), f"{word} of {example}"


def test_readme_names_real_commands_and_options(drm) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    found = [shlex.split(line.split("#")[0]) for block in blocks for line in block.splitlines() if "drm" in line]
    lines = [
        words[words.index("drm" if "drm" in words else "drmcli") :] for words in found if {"drm", "drmcli"} & set(words)
    ]
    assert len(lines) >= 8
    for words in lines:
        page = drm(*words[1 : 3 if words[1] == "data" else 2], "--help-all" if words[1] != "data" else "--help").out
        assert all(word in page for word in words[2:] if word.startswith("--")), words


def test_two_lines_for_an_error(drm) -> None:
    result = drm("bench", "--sigma", "2")
    assert result.code == 2
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "hint"]
    assert result.err.startswith("error: --sigma: ")


def test_json_and_quiet_and_table(reward_folder: Path, tmp_path: Path, drm) -> None:
    flags = ["bench", "--reward", reward_folder, "--pairs", "6", "--sigma", "0.25", "--set", "shapes_generated=0"]
    as_json = drm(*flags, "--json", "--out", tmp_path / "a")
    assert json.loads(as_json.out)["n_pairs"] >= 6
    quiet = drm(*flags, "--quiet", "--out", tmp_path / "b")
    assert quiet.out.strip() == str(tmp_path / "b")
    assert quiet.err == ""
    table = drm(*flags, "--out", tmp_path / "c")
    assert "strict" in table.out
    assert "\x1b[" not in table.out + table.err
    again = drm(*flags, "--json", "--out", tmp_path / "a")
    assert again.out == as_json.out


def test_dry_run_writes_nothing(tmp_path: Path, drm) -> None:
    result = drm("train-reward", "--dry-run", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "total with gradient checkpointing" in result.out
    assert not (tmp_path / "run").exists()
    plan = drm("train-reward", "--dry-run", "--json").json["plan"]
    assert plan["memory"]["total_checkpointed"] < plan["memory"]["total"]
    assert list(tmp_path.iterdir()) == []


def test_precedence(tmp_path: Path) -> None:
    """defaults < preset < file < --set < flag, key by key."""
    file = tmp_path / "c.yaml"
    file.write_text("command: train-reward\nlr: 0.1\nsteps: 11\nseed: 5\n")
    sets = ["lr=0.2", "steps=12"]
    c = configs.resolve("train-reward", file=str(file), sets=sets, flags={"steps": 13, "out": None})
    assert (c.max_grad_norm, c.head_width, c.seed, c.lr, c.steps) == (1.0, 32, 5, 0.2, 13)


def test_a_runs_config_repeats_it(tmp_path: Path, drm) -> None:
    first = drm("train-reward", *SMALL, "--steps", "1", "--out", tmp_path / "a", "--json")
    assert first.code == 0, first.err
    again = drm("train-reward", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b", "--json")
    weights = [(tmp_path / name / "reward" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    keys = {
        "command",
        "run",
        "seed",
        "device",
        "dtype",
        "seconds",
        "reward",
        "steps",
        "train_pairs",
        "eval_accuracy",
        "eval_by_sigma",
    }
    assert again.json.keys() >= keys


def test_every_preset_resolves_for_every_command() -> None:
    for name in configs.preset_names():
        for command in configs.COMMANDS:
            if "preset" in configs.field_names(configs.COMMANDS[command]):
                configs.resolve(command, preset=name)
        known = {"common", "preset", *configs.COMMANDS}
        assert set(yaml.safe_load(configs.preset_text(name))) <= known


def test_a_preset_over_another_one(tmp_path: Path) -> None:
    """What it does not say is the other's, and its text is a config file with the same values."""
    own, base = configs.resolve("sample", preset="flux1-schnell"), configs.resolve("sample", preset="flux1-dev")
    assert (own.steps, base.steps, own.max_batch) == (4, 28, base.max_batch)
    (tmp_path / "own.yaml").write_text(configs.preset_text("flux1-schnell"), encoding="utf-8")
    again = configs.resolve("sample", file=str(tmp_path / "own.yaml"))
    assert again.preset == "flux1-dev"
    again.preset = own.preset
    assert again == own


def test_every_config_key_says_what_it_means() -> None:
    for cls in configs.COMMANDS.values():
        assert [k for k, text in configs.describe(cls).items() if not text] == []


def test_config_commands(drm) -> None:
    assert set(drm("config", "list", "--json").json) >= {"tiny", "sd35-medium", "paper"}
    assert "{package}" in drm("config", "show", "tiny").out
    assert drm("config", "show", "paper", "--command", "train-reward", "--json").json["batch_size"] == 128
    assert drm("config", "show", "nope").code == 2


def test_doctor(drm) -> None:
    found = drm("doctor", "--device", "cpu", "--json").json
    assert found["forward pass"].startswith("works")
    assert "torch" in found["versions"]


def test_a_shown_config_is_one(tmp_path: Path, drm) -> None:
    """What `drm config show` prints is YAML that --config takes, a preset's text and a command's whole config alike."""
    for preset in ("tiny", "paper"):
        for more in ([], ["--command", "train-reward"]):
            file = tmp_path / "my.yaml"
            file.write_text(drm("config", "show", preset, *more).out)
            found = configs.resolve("train-reward", file=str(file))
            wanted = configs.resolve("train-reward", preset=preset)
            assert {k: v for k, v in vars(found).items() if k != "preset"} == {
                k: v for k, v in vars(wanted).items() if k != "preset"
            }


def test_doctor_tells_what_to_do(monkeypatch: pytest.MonkeyPatch, drm) -> None:
    """A line for each check; a model without access fails, with its remedy and an exit code."""
    from drmcli.recipes import doctor as recipe

    fine = drm("doctor", "--device", "cpu")
    assert fine.code == 0, fine.out
    assert "the embedded reward model" in fine.out
    assert "WARN" in fine.out
    pasted = drm("doctor", "--device", "cpu", "--markdown").out.splitlines()
    assert pasted[1] == "|---|---|---|---|"
    assert all(line.count(" | ") == 3 for line in pasted[2:8])

    def gated(where: str) -> None:
        from drmcli.errors import MissingError

        raise MissingError(f"--generator {where}: the model is gated", hint="hf auth login")

    monkeypatch.setattr(recipe.HfApi, "model_info", lambda self, where: gated(where))
    monkeypatch.setattr(recipe.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(recipe, "_forward", lambda preset, where: recipe.Check("forward pass", "OK", "works"))
    failed = drm("doctor", "--device", "cpu", "--preset", "sd35-medium")
    assert failed.code == 1
    assert "FAIL" in failed.out
    assert "hf auth login" in failed.out
    assert "train one, and name it with --reward" in failed.out


def test_the_public_names(drm) -> None:
    import drmcli

    assert dir(drmcli) == sorted(drmcli.__all__)


def test_version(drm) -> None:
    from drmcli import __version__

    assert drm("--version").out.strip() == f"drm {__version__}"


def test_a_bug_says_so(monkeypatch: pytest.MonkeyPatch, drm) -> None:
    monkeypatch.setattr(configs, "resolve", lambda *a, **k: 1 / 0)
    result = drm("bench")
    assert result.code == 1
    assert "internal: ZeroDivisionError" in result.err
    with pytest.raises(ZeroDivisionError):
        application.invoke(["bench", "--debug"])


def test_close_matches() -> None:
    with pytest.raises(InputError) as error:
        configs.resolve("train-reward", sets=["warmup_step=3"])
    assert "warmup_steps" in error.value.hint
