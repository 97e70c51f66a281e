"""Run folders: damaged files are named, passed over or made again; what came to nothing leaves nothing; one process at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL

from drmcli import config as configs
from drmcli import files, results, run
from drmcli.errors import InputError, RunError
from drmcli.run import Silent, open_run


class Heard(Silent):
    """A reporter that keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def score_config(out: Path | None = None, **more: object):
    flags = {"images": ["a.png"], "prompts": ["x"], "out": None if out is None else str(out)} | more
    return configs.resolve("score", flags=flags)


# --- a typo leaves nothing ------------------------------------------------------------------------------------------------


def test_a_typo_leaves_no_folder(tmp_path: Path, drm) -> None:
    for flags in ((), ("--out", "new/deeper/o")):
        assert drm("score", "nosuch.png", "--prompt", "x", *flags).code == 2
        assert list(tmp_path.iterdir()) == []


def test_a_run_without_results_takes_other_options(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    folder.mkdir()  # made by the user, so not taken away
    with pytest.raises(InputError), open_run("score", score_config(folder), Silent()):
        raise InputError("a.png: missing", hint="")
    assert (folder / "config.yaml").is_file()
    with open_run("score", score_config(folder, images=["b.png"]), Silent()) as opened:
        assert not opened.resumed
        (folder / "checkpoints").mkdir()
    with (
        pytest.raises(InputError, match="holds a run with images"),
        open_run("score", score_config(folder, images=["c.png"]), Silent()),
    ):
        pass
    assert (folder / "checkpoints").is_dir()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        open_run("score", score_config(tmp_path / "o"), Silent()),
        pytest.raises(InputError, match="another process"),
        open_run("score", score_config(tmp_path / "o"), Silent()),
    ):
        pass


def test_runs_where_there_is_no_fcntl() -> None:
    """As on Windows: the package imports, locks a run folder and lets it go."""
    code = """
import sys, warnings
sys.modules["fcntl"] = None
warnings.simplefilter("ignore")
from drmcli import config as configs
from drmcli.run import Silent, open_run
config = configs.resolve("score", flags={"images": ["a"], "prompts": ["b"], "out": "o"})
for _ in range(2):
    with open_run("score", config, Silent()) as run:
        try:
            with open_run("score", config, Silent()):
                print("shared")
        except Exception as error:
            print("another process" in str(error))
import drmcli.cli.app, drmcli.cli.options
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


# --- what a run reads back ------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[: max(1, f.stat().st_size // 2)]),
    "cut between lines": lambda f: f.write_bytes(f.read_bytes()[: 1 + f.read_bytes().rindex(b"\n", 0, -1)]),
    "emptied": lambda f: f.write_bytes(b""),
    "binary": lambda f: f.write_bytes(bytes(range(256))),
    "a list": lambda f: f.write_text("[]"),
    "a number": lambda f: f.write_text("3"),
    "nested": lambda f: f.write_text("[" * 100_000),
    "aliases": lambda f: f.write_text(
        "a: &a [x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abc", "bcd"))
    ),
    "a folder": lambda f: (f.unlink(), f.mkdir()),  # type: ignore[list-item, return-value]
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of sample."""
    from drmcli.recipes import sample

    folder = tmp_path_factory.mktemp("finished") / "o"
    flags = {"prompts": ["a large red circle on the left"], "steps": 1, "reward": "none", "out": str(folder)}
    sample.run(configs.resolve("sample", flags=flags), Silent())
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "env.json", "images.parquet"])
def test_show_and_the_same_command_of_a_damaged_run(name: str, kind: str, finished: Path, tmp_path: Path, drm) -> None:
    """`show` names what is damaged and shows the rest; the command refuses in one line, and --overwrite is a way out."""
    folder = tmp_path / "o"
    shutil.copytree(finished, folder)
    DAMAGE[kind](folder / name)
    shown = drm("show", folder)
    assert "internal" not in shown.err
    if name != "env.json":
        assert name in shown.err, shown.err
        assert shown.code == 2
        assert "a large red circle" in shown.out + shown.err
    again = drm("sample", "a large red circle on the left", "--steps", 1, "--reward", "none", "--out", folder)
    assert "internal" not in again.err
    if (name, kind) == ("env.json", "a folder"):
        assert again.code == 2
    elif name in ("summary.json", "config.yaml"):
        assert again.code == 2
        assert f"{name} is damaged" in again.err
    else:
        assert again.code == 0
    if name == "env.json" and kind != "a folder":
        assert "env.json is damaged" in again.err
        assert json.loads((folder / "env.json").read_text())["run_id"]


@pytest.mark.parametrize("kind", ["cut", "emptied", "binary"])
def test_a_damaged_part_is_made_again(kind: str, tmp_path: Path) -> None:
    parts = results.Parts(tmp_path / "parts", "partial_scores", "id")
    for number in range(3):
        parts.add(item=number, column=0, score=1.0)
        parts.flush(number)
    DAMAGE[kind](tmp_path / "parts" / "part-000001.parquet")
    (tmp_path / "parts" / "part-notes.parquet").write_text("a stray file")
    heard: list[str] = []
    assert [number for number, _ in parts.whole(heard.append)] == [0]
    assert "part-000001.parquet" in heard[0]
    assert [f.name for _, f in results.parts_of(tmp_path / "parts")] == ["part-000000.parquet"]
    with pytest.raises(InputError, match="damaged table"):
        DAMAGE[kind](tmp_path / "parts" / "part-000000.parquet")
        results.read(tmp_path / "parts")


@pytest.mark.parametrize("what", ["partial/images/part-000001.parquet", "images/000001.png", "partial/counts.json"])
@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_sample_goes_on_from_what_is_whole(
    what: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drm
) -> None:
    """Three pictures one by one, stopped before the end: the damaged one is drawn again, and the result is the same."""
    flags = [
        "sample",
        "a large red circle on the left",
        "--num-images",
        3,
        "--steps",
        2,
        "--batch-size",
        1,
        "--reward",
        "none",
    ]
    whole = drm(*flags, "--out", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.err
    from drmcli.recipes import sample

    with monkeypatch.context() as m:
        m.setattr(sample, "finish", lambda *a: (_ for _ in ()).throw(RunError("stopped", hint="")))
        assert drm(*flags, "--out", tmp_path / "o").code == 1
    file = tmp_path / "o" / what
    DAMAGE["cut"](file) if kind == "cut" else file.unlink()
    again = drm(*flags, "--out", tmp_path / "o", "--json")
    assert again.code == 0, again.err
    for i in range(3):
        name = f"images/{i:06d}.png"
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["seed"] for row in again.json["images"]] == [0, 1, 2]


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def checkpointed(folder: Path, steps: list[int]) -> run.Run:
    made = run.Run(folder, "train-reward", "id", resumed=True, reporter=Heard())
    for step in steps:
        with run.atomic_folder(run.checkpoint_folder(made, step)) as part:
            (part / "optimizer.bin").write_bytes(bytes([step] * 1000))
            (part / "inner").mkdir()
            (part / "inner" / "trained.safetensors").write_bytes(bytes([step] * 500))
            run.seal(part)
    return made


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["optimizer.bin", "inner/trained.safetensors", files.MANIFEST])
@pytest.mark.parametrize("kind", ["cut", "emptied", "gone", "flipped", "a folder"])
def test_an_older_checkpoint_is_taken(name: str, kind: str, tmp_path: Path) -> None:
    made = checkpointed(tmp_path, [2, 4])
    (tmp_path / "checkpoints" / "step-9x").mkdir()
    (tmp_path / "checkpoints" / "step-000007").write_text("a file")
    assert run.latest_checkpoint(made) == (4, tmp_path / "checkpoints" / "step-000004")
    spoil = {"gone": lambda f: f.unlink(), "flipped": flip} | DAMAGE
    spoil[kind](tmp_path / "checkpoints" / "step-000004" / name)
    assert run.latest_checkpoint(made) == (2, tmp_path / "checkpoints" / "step-000002")
    assert "step-000004 is damaged" in made.reporter.warnings[0]  # type: ignore[attr-defined]
    run.retire_checkpoints(made, 1, set())
    assert run.latest_checkpoint(made) is not None
    spoil[kind](tmp_path / "checkpoints" / "step-000002" / name)
    with pytest.raises(InputError, match="step-000002 is damaged") as error:
        run.latest_checkpoint(made)
    assert "--overwrite" in error.value.hint


def test_training_goes_on_from_an_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    """Bit for bit as if it had never been stopped, whatever was damaged."""
    flags = ["train-reward", *SMALL, "--steps", 3, "--save-every", 1]
    assert drm(*flags, "--out", tmp_path / "whole").code == 0
    from drmcli.recipes import train_reward

    with monkeypatch.context() as m:
        m.setattr(train_reward, "finish", lambda *_: (_ for _ in ()).throw(RunError("stopped", hint="")))
        assert drm(*flags, "--out", tmp_path / "o").code == 1
    newest = max((tmp_path / "o" / "checkpoints").glob("step-*"))
    flip(newest / "state.safetensors")
    (tmp_path / "o" / "checkpoints" / "step-9x").mkdir()
    again = drm(*flags, "--out", tmp_path / "o")
    assert again.code == 0, again.err
    assert "state.safetensors has another checksum" in again.err
    weights = [(tmp_path / name / "reward" / "model.safetensors").read_bytes() for name in ("whole", "o")]
    assert weights[0] == weights[1]


# --- a folder that goes away, a disk that is full -----------------------------------------------------------------------------


def test_a_run_folder_that_is_deleted_under_way(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    for again in (False, True):
        with (
            pytest.raises(RunError, match="was deleted while the run was at work"),
            open_run("score", score_config(folder), Silent()) as opened,
        ):
            shutil.rmtree(folder)
            if again:
                folder.mkdir()  # another one at the same place
            results.write(
                folder / "scores.parquet", "scores", pd.DataFrame(columns=results.SCHEMAS["scores"].names), ""
            )
            opened.finish({})
        assert not (folder / "summary.json").exists()
        shutil.rmtree(folder, ignore_errors=True)


FULL = {
    "errno": OSError(28, "No space left on device"),
    "safetensors": RuntimeError(
        'Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'
    ),
    "arrow": ValueError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "quota": OSError(122, "Disk quota exceeded"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_says_make_room(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as error, run.atomic_folder(tmp_path / "step"):
        raise FULL[kind]
    assert "make room" in error.value.hint
    assert "No space left" in error.value.message
