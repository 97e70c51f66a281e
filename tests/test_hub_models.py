"""Pipelines of the hub in the forms that repositories have: weights with a number format in their names alone, and in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import COMMIT, ModelHub
from PIL import Image

from drmcli.fingerprints import of_parts
from drmcli.generator import Generator
from drmcli.reward import RewardModel

FORMS = {"fp16": {"variant": "fp16"}, "sharded": {"max_shard_size": "300KB"}}
"""How `save_pretrained` makes each."""
PROMPT = "a large red circle above a small blue square"


@pytest.fixture(scope="module", params=FORMS)
def saved(request: pytest.FixtureRequest, generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline in one of the forms, float32 whatever the names of its files say."""
    cache = tmp_path_factory.mktemp("hub")
    folder = cache / f"models--someone--{request.param}" / "snapshots" / COMMIT
    pipe = Generator.load(str(generator_folder)).pipe
    pipe.save_pretrained(folder, **FORMS[request.param])
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    weights = [file.name for file in (folder / "transformer").glob("*.safetensors")]
    if request.param == "fp16":
        assert all(".fp16." in name for name in weights)
    else:
        assert len(weights) > 1
    return folder


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "images" / "000000.png"))


def draw(drm: Callable, generator: object, out: Path) -> np.ndarray:
    done = drm("sample", PROMPT, "--generator", generator, "--reward", "none", "--steps", 2, "--out", out)
    assert done.code == 0, done.err
    return pixels(out)


def test_offline_from_the_cache(
    saved: Path, generator_folder: Path, tmp_path: Path, drm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched once is loaded without the hub: the same picture, and the same reward model on it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(saved.parents[2]))
    ref = f"someone/{saved.parents[1].name.rpartition('--')[2]}"
    expected = draw(drm, generator_folder, tmp_path / "folder")
    assert np.array_equal(draw(drm, ref, tmp_path / "hub"), expected)
    ours, theirs = (RewardModel.from_generator(where, drop_layers=2) for where in (ref, str(generator_folder)))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert of_parts(ref, None, ["transformer", "vae"]) == of_parts(str(saved), None, ["transformer", "vae"])


def test_fetched_from_the_hub(saved: Path, generator_folder: Path, tmp_path: Path, drm: Callable) -> None:
    """All that is needed, once, and the picture is the same."""
    hub = ModelHub()
    files = {str(f.relative_to(saved)): f.read_bytes() for f in saved.rglob("*") if f.is_file()}
    hub.repos["someone/pipeline"] = {"private": False, "files": files, "commits": []}
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = ["sample", PROMPT, "--generator", "someone/pipeline", "--reward", "none", "--steps", "2", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "drmcli", *command], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=240
    )
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(tmp_path / "run"), draw(drm, generator_folder, tmp_path / "folder"))
    fetched = [call.partition(COMMIT + "/")[2] for call in hub.asked if call.startswith("GET") and "/resolve/" in call]
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert sorted(weights) == sorted(name for name in files if name.endswith(".safetensors"))
