"""`drm export`: a clean folder, a push to a stand-in of the hub on this machine, and the cards of what is handed on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, Outcome
from hub_server import ModelHub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from drmcli import cards
from drmcli import config as configs
from drmcli.reward import RewardModel

Drm = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of train-reward, of one step."""
    from drmcli.cli.app import invoke

    folder = tmp_path_factory.mktemp("trained") / "mine"
    assert invoke(["train-reward", *SMALL, "--steps", "1", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """What a finished run of grpo leaves of a LoRA on a pipeline of the hub."""
    folder = tmp_path / "aligned"
    for name in ("lora", "lora-last"):
        (folder / name).mkdir(parents=True)
        save_file({"a.lora_A.weight": torch.ones(2, 3)}, folder / name / "pytorch_lora_weights.safetensors")
        (folder / name / "notes.txt").write_text("not the model's")
    flags = {"generator": "owner/base", "reward": str(tmp_path / "my-reward"), "lora_rank": 2, "lora_alpha": 6}
    (folder / "config.yaml").write_text(configs.to_yaml(configs.resolve("grpo", flags=flags), "grpo"))
    figures = {"reward_before": 1.0, "reward_after": 2.0, "reward_gain_ci95": [0.5, 1.5], "judge_before": None}
    summary = {"command": "grpo", "updates": 9, "best_update": 7} | figures
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """The only hub that the client knows, and a token that may write for `me`."""
    hub = ModelHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield hub
    hub.shutdown()
    hub.server_close()


def head(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_folder_of_the_model_and_its_card_alone(trained: Path, tmp_path: Path, drm: Drm) -> None:
    """What is exported scores as the run's own model does, and its card holds the run's figures."""
    (trained / "reward" / "scratch.txt").write_text("not the model's")
    result = drm("export", trained, "--to", tmp_path / "mine", "--json")
    assert result.code == 0, result.err
    assert sorted(f.name for f in (tmp_path / "mine").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {f["path"] for f in result.json["files"]} == {"README.md", "config.json", "model.safetensors"}
    assert result.json["bytes"] == sum(f.stat().st_size for f in (tmp_path / "mine").iterdir())
    picture, prompt = Image.new("RGB", (32, 32), (200, 30, 30)), "a large red square"
    a, b = (
        RewardModel.from_pretrained(f).score_images([picture], [prompt])
        for f in (trained / "reward", tmp_path / "mine")
    )
    assert torch.equal(a, b)


def test_the_card_of_a_reward_model(trained: Path) -> None:
    """Base, data, accuracy at each noise level with its interval, and a command that resolves to the run's own config."""
    card = (trained / "reward" / "README.md").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    assert head(card)["library_name"] == "drmcli"
    assert "base_model" not in head(card)  # the embedded one has no id on the hub
    assert "base: the embedded generator" in card
    assert f"shapes, of the embedded world, {summary['train_pairs']:,} pairs; 1 steps of 12 pairs" in card
    assert f"Accuracy on {summary['eval_pairs']} held-out pairs" in card
    for row in summary["eval_by_sigma"]:
        low, high = row["ci95"]
        assert low <= row["accuracy"] <= high
        assert f"| {row['sigma']:g} | {row['accuracy']:.1f} % | {low:.1f} to {high:.1f} |" in card
    assert summary["eval_ci95"] == summary["eval_by_sigma"][1]["ci95"]
    words = shlex.split(card.split("```bash\n")[1].split("\n")[0])
    assert words[:2] == ["drm", "train-reward"]
    assert resolved(words) == yaml.safe_load((trained / "config.yaml").read_text()) | {"out": None}


def resolved(words: list[str]) -> dict:
    """The config that a command line stands for."""
    import contextlib
    import io

    from drmcli.cli.app import invoke

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert invoke([*words[1:], "--dry-run", "--json"]) == 0
    return {"command": words[1]} | json.loads(out.getvalue())["config"]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "train-reward",
            {
                "data": ["shapes=0.7", "hpdv3=0.3"],
                "eval_sigmas": [0.1, 0.5],
                "tap_layers": [1, 2],
                "shared_noise": False,
            },
        ),
        (
            "grpo",
            {
                "window": [0.2, 0.9],
                "add_rewards": ["clip=0.5"],
                "global_std": False,
                "judge": "none",
                "reward_ceiling": 3.0,
            },
        ),
    ],
)
def test_a_config_as_a_command(command: str, flags: dict) -> None:
    """Every kind of value is said in the way in which its flag takes it."""
    from typer.main import get_command

    from drmcli.cli.app import make_app
    from drmcli.cli.options import NOT_CONFIG

    wanted = configs.resolve(command, preset="sd35-medium", flags=flags)
    words = configs.to_command(command, configs.to_dict(wanted))
    made = get_command(make_app({command})).commands[command]
    given = dict(made.make_context(command, words[2:]).params)
    parts = {k: [float(x) for x in v[0].split(",")] for k, v in given.items() if k in ("window", "eval_sigmas") and v}
    parts |= {"tap_layers": [int(x) for x in given["tap_layers"][0].split(",")]} if given.get("tap_layers") else {}
    flags = {k: v for k, v in (given | parts).items() if k not in NOT_CONFIG and v not in (None, [], ())}
    assert configs.resolve(command, preset=given["preset"], sets=list(given["sets"] or []), flags=flags) == wanted


def test_the_card_of_a_lora(aligned: Path, tmp_path: Path, drm: Drm) -> None:
    result = drm("export", aligned, "--to", tmp_path / "mine")
    assert result.code == 0, result.err
    assert sorted(f.name for f in (tmp_path / "mine").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    card = (tmp_path / "mine" / "README.md").read_text()
    assert head(card) == {"library_name": "diffusers", "tags": ["lora", "text-to-image"], "base_model": "owner/base"}
    assert "A LoRA of rank 2, alpha 6: step-grpo, update 7" in card
    assert "reward: my-reward; judge: shapes" in card
    assert str(tmp_path) not in card.replace(str(tmp_path / "mine"), "")
    assert "| reward | 1.000 | 2.000 | +0.500 to +1.500 |" in card
    assert 'DiffusionPipeline.from_pretrained("owner/base")' in card
    last = drm("export", aligned / "lora-last", "--to", tmp_path / "last")
    assert last.code == 0, last.err
    card = (tmp_path / "last" / "README.md").read_text()
    assert "update 9" in card
    assert "before" not in card


def test_the_newest_run_that_made_a_model(aligned: Path, drm: Drm) -> None:
    """Without RUN; a later run that makes none is passed over."""
    Path("runs").mkdir()
    aligned.rename("runs/aligned")
    Path("runs/bench").mkdir()
    Path("runs/bench/config.yaml").write_text("command: bench\n")
    assert drm("export", "--to", "out", "--json").json["run"] == "runs/aligned"
    missing = drm("export", "runs/bench", "--to", "other")
    assert (missing.code, missing.err.splitlines()[0]) == (
        2,
        "error: RUN runs/bench: a run of `drm bench`, which makes no model of its own",
    )


def test_a_push_is_private_and_can_be_loaded(trained: Path, hub: ModelHub, tmp_path: Path, drm: Drm) -> None:
    """Nothing is written by the dry run; the push is one commit; its card names the repository; the hub's model scores alike."""
    planned = drm("export", trained, "--push", "me/mine", "--dry-run", "--json")
    assert (planned.code, planned.json["visibility"], hub.asked) == (0, "private", [])
    shown = drm("export", trained, "--push", "me/mine", "--dry-run").out
    assert all(word in shown for word in ("model.safetensors", "hub: me/mine, private", "nothing was written"))
    result = drm("export", trained, "--push", "me/mine")
    assert result.code == 0, result.err
    assert f"hub: {hub.url}/me/mine, private" in result.out
    repo = hub.repos["me/mine"]
    assert repo["private"] is True
    assert repo["commits"] == ["The reward model of drm train-reward"]
    assert set(repo["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert 'from_pretrained("me/mine")' in repo["files"]["README.md"].decode()
    picture, prompt = Image.new("RGB", (32, 32), (200, 30, 30)), "a large red square"
    there = RewardModel.from_pretrained("me/mine", cache_dir=tmp_path / "cache")
    here = RewardModel.from_pretrained(trained / "reward")
    assert torch.equal(there.score_images([picture], [prompt]), here.score_images([picture], [prompt]))
    quiet = drm("export", trained, "--push", "me/mine", "--quiet")
    assert (quiet.code, quiet.out.strip(), quiet.err) == (0, f"{hub.url}/me/mine", "")


def test_what_is_public_is_so_by_its_own_flag(aligned: Path, hub: ModelHub, drm: Drm) -> None:
    """A repository that is there keeps its visibility, and nothing is pushed to one of another than was asked for."""
    assert drm("export", aligned, "--push", "me/open", "--public").code == 0
    assert hub.repos["me/open"]["private"] is False
    commits = len(hub.repos["me/open"]["commits"])
    refused = drm("export", aligned, "--push", "me/open")
    assert (refused.code, refused.err.splitlines()[0]) == (
        2,
        "error: --push me/open: is there, and public, not private",
    )
    assert len(hub.repos["me/open"]["commits"]) == commits


@pytest.mark.parametrize(
    ("token", "name", "fault", "code", "fact"),
    [
        ("", "me/mine", None, 3, "no token of the hub is stored"),
        ("hf_wrong", "me/mine", None, 3, "the hub does not accept the token"),
        ("hf_reader", "me/mine", None, 3, "the token may not write there"),
        ("hf_good", "other/mine", None, 3, "the token may not write there"),
        ("hf_good", "me/mine", 409, 3, "somebody else is changing it"),
        ("hf_good", "me/mine", 413, 1, "the hub answered 413"),
        ("hf_good", "mine", None, 2, "no OWNER/NAME"),
        ("hf_good", "me/a/b", None, 2, "no OWNER/NAME"),
        ("hf_good", "me/a..b", None, 2, "no OWNER/NAME"),
    ],
)
def test_faults_of_a_push(
    aligned: Path,
    hub: ModelHub,
    monkeypatch: pytest.MonkeyPatch,
    drm: Drm,
    token: str,
    name: str,
    fault: int | None,
    code: int,
    fact: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    hub.fault = fault
    result = drm("export", aligned, "--push", name)
    assert result.code == code, result.err
    error, hint = [line for line in result.err.splitlines() if not line.startswith("note:")]
    assert error.startswith(f"error: --push {name}: {fact}")
    assert hint.startswith("hint: ")


def test_no_network(aligned: Path, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, drm: Drm) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = drm("export", aligned, "--push", "me/mine")
    assert (offline.code, offline.err.splitlines()[0]) == (
        3,
        "error: --push me/mine: the hub cannot be reached: offline mode is on",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    away = drm("export", aligned, "--push", "me/mine")
    assert away.code == 3
    assert away.err.startswith("error: --push me/mine: the hub cannot be reached")
    assert "Traceback" not in away.err


def test_faults_of_a_folder(aligned: Path, tmp_path: Path, drm: Drm) -> None:
    """Each in one line, with nothing written."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, code, fact in (
        ([aligned], 2, "--to: no target is named"),
        ([aligned, "--to", tmp_path / "full"], 2, f"--to {tmp_path / 'full'}: is not empty"),
        ([aligned, "--to", tmp_path / "file"], 2, f"--to {tmp_path / 'file'}: a file, not a folder"),
        ([aligned, "--to", ""], 2, "--to: is empty"),
        ([aligned, "--to", empty, "--public"], 2, "--public: nothing is pushed"),
        ([tmp_path / "no", "--to", empty], 2, f"RUN {tmp_path / 'no'}: holds no config.yaml"),
        (["--to", empty], 2, "RUN: no run in runs/ makes a model"),
        ([aligned, "--to", empty, "--base", "x"], 2, "--base x: no OWNER/NAME"),
    ):
        result = drm("export", *args)
        assert (result.code, result.err.splitlines()[0]) == (code, f"error: {fact}")
    assert not list(empty.iterdir())
    weights = aligned / "lora" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert drm("export", aligned, "--to", empty).err.startswith(
        f"error: RUN {aligned}: lora/pytorch_lora_weights.safetensors is damaged"
    )
    (aligned / "summary.json").unlink()
    assert drm("export", aligned, "--to", empty).err.startswith(f"error: RUN {aligned}: is not finished")
    assert not list(empty.iterdir())


def test_a_base_that_is_a_folder(
    trained: Path, generator_folder: Path, hub: ModelHub, tmp_path: Path, drm: Drm
) -> None:
    """Its id on the hub is found in the cache's path or in the pipeline, or asked for; it stands in the card and in the config."""
    import shutil

    run, base = tmp_path / "mine", tmp_path / "pipeline"
    shutil.copytree(trained, run)
    shutil.copytree(generator_folder, base)
    values = json.loads((run / "reward" / "config.json").read_text())
    (run / "reward" / "config.json").write_text(json.dumps(values | {"base_model": str(base)}))
    nameless = drm("export", run, "--push", "me/mine")
    assert (nameless.code, nameless.err.split(": ")[1]) == (2, "--base")
    warned = drm("export", run, "--to", tmp_path / "a")
    assert (warned.code, "others need its hub id" in warned.err) == (0, True)
    assert drm("export", run, "--push", "me/mine", "--base", "owner/base").code == 0
    files = hub.repos["me/mine"]["files"]
    assert json.loads(files["config.json"])["base_model"] == "owner/base"
    assert head(files["README.md"].decode())["base_model"] == "owner/base"
    assert str(tmp_path) not in files["README.md"].decode()
    assert (
        load_file(tmp_path / "a" / "model.safetensors").keys() == load_file(run / "reward" / "model.safetensors").keys()
    )
    assert cards.portable(str(generator_folder)) == "{package}/tiny/weights/generator"
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_name_or_path": "owner/saved"}))
    assert cards.base_id(str(base)) == "owner/saved"
    snapshot = tmp_path / "models--owner--cached-1.5" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert cards.base_id(str(snapshot)) == "owner/cached-1.5"
