"""Shared fixtures: no network, a cache of the session's own, one thread a worker, and small things to test with."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.tiny import world

torch.set_num_threads(1)
SMALL = ["--set", "shapes_prompts=8", "--set", "shapes_generated=0", "--set", "eval_pairs=12", "--batch-size", "12"]
"""Flags that make train-reward a matter of a second."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails."""
    for name in ("connect", "connect_ex"):

        def guarded(self: socket.socket, address: object, original=getattr(socket.socket, name)) -> object:
            host = address[0] if isinstance(address, tuple) else "localhost"
            if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("localhost", "127.0.0.1", "::1"):
                raise AssertionError(f"a test reached for the network: {address}")
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of encoded pictures and prompts, kept for the session."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("DRM_CACHE")
    os.environ["DRM_CACHE"] = str(folder)
    yield folder
    os.environ.pop("DRM_CACHE") if before is None else os.environ.update(DRM_CACHE=before)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own: runs/ of one is not seen by another."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def generator_folder() -> Path:
    """The embedded pipeline."""
    return Path(world.__file__).parent / "weights" / "generator"


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> Path:
    """A reward model with a fresh head."""
    from drmcli.reward import RewardModel

    folder = tmp_path_factory.mktemp("reward")
    model = RewardModel.from_generator(str(generator_folder), drop_layers=3, head_width=16, max_sequence_length=1)
    model.save_pretrained(folder)
    return folder


@dataclass
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def drm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""
    from drmcli.cli.app import invoke

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        code = invoke([str(a) for a in args])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """12 captions with a clean and a flawed picture each, as JSONL beside its PNGs."""
    return write_pairs(tmp_path / "data", 12)


def write_pairs(folder: Path, count: int, **columns: list) -> Path:
    """pairs.jsonl and its pictures; extra columns are given a value a row."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    captions = list(world.captions("train"))[:count]
    clean, flawed = world.draw(captions, rng), world.draw(captions, rng, flawed=1.0)
    lines = []
    for i, caption in enumerate(captions):
        Image.fromarray(clean[i]).save(folder / f"{i}-a.png")
        Image.fromarray(flawed[i]).save(folder / f"{i}-b.png")
        row = {"prompt": caption, "chosen": f"{i}-a.png", "rejected": f"{i}-b.png"}
        lines.append(json.dumps(row | {name: values[i] for name, values in columns.items()}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
