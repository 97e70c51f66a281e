"""`drm data get` against a stand-in of the hub on this machine: resume, checksums, access, interruptions."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub
from PIL import Image

from drmcli.recipes.data import MANIFEST
from drmcli.tiny import world

BIG = 24 * 2**20
"""More than two of the client's chunks of 10 MiB."""


@dataclass
class Client:
    """`drm` in a process of its own, which knows no other hub."""

    hub: Hub
    home: Path

    def command(self, *args: object) -> list[str]:
        return [sys.executable, "-m", "drmcli", *map(str, args)]

    def env(self, **more: str) -> dict[str, str]:
        return (
            os.environ
            | {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
            | more
        )

    def get(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command("data", "get", "hpdv2", "--data-dir", self.home / "out", *args)
        return subprocess.run(command, capture_output=True, text=True, env=self.env(**env), timeout=240)

    @property
    def manifest(self) -> Path:
        return self.home / "out" / MANIFEST


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A dataset in HPDv2's layout with one list of three pictures, and files that the split test does not need."""
    folder = tmp_path / "hub"
    (folder / "benchmark").mkdir(parents=True)
    caption = world.captions("test")[0]
    pictures = world.draw([caption] * 3, np.random.default_rng(0), flawed=0.5)
    with tarfile.open(folder / "test.tar.gz", "w:gz") as archive:
        for i, pixels in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            entry = tarfile.TarInfo(f"test/{i}.png")
            entry.size = buffer.tell()
            archive.addfile(entry, io.BytesIO(buffer.getvalue()))
    row = {"prompt": caption, "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 3]}
    (folder / "test.json").write_text(json.dumps([row]))
    (folder / "train.json").write_text("[]")
    (folder / "train.tar.gz").write_bytes(b"not needed")
    (folder / "benchmark" / "photo.json").write_text(json.dumps([caption]))
    hub = Hub(folder, "ymhao/HPDv2")
    yield Client(hub, tmp_path / "home")
    hub.shutdown()
    hub.server_close()


def two_lines(result: subprocess.CompletedProcess[str]) -> str:
    """The error line, after a check that there is one hint and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_what_the_split_needs_and_not_twice(client: Client) -> None:
    result = client.get()
    assert result.returncode == 0, result.stderr
    found = json.loads(client.manifest.read_text())
    assert set(found["files"]) == {"test.json", "test.tar.gz", "benchmark/photo.json"}
    assert all(len(f["sha256"]) == 64 for name, f in found["files"].items() if name.endswith(".gz"))
    assert json.loads(client.get("--json").stdout) == found
    assert "train.tar.gz" not in client.hub.asked
    assert "download: " in result.stderr
    client.hub.asked.clear()
    quiet = client.get("--quiet")
    assert (quiet.returncode, quiet.stdout.strip()) == (0, str(client.home / "out"))
    assert not client.hub.asked
    command = client.command(
        "bench", "--dataset", "hpdv2", "--data-dir", client.home / "out", "--json", "--out", client.home / "run"
    )
    bench = subprocess.run(command, capture_output=True, text=True, env=client.env(HF_HUB_OFFLINE="1"), timeout=120)
    assert bench.returncode == 0, bench.stderr
    assert json.loads(bench.stdout)["n_pairs"] == 3


def test_a_connection_that_is_cut_goes_on_where_it_was(client: Client) -> None:
    (client.hub.folder / "test.tar.gz").write_bytes(bytes(BIG))
    client.hub.cut = {"test.tar.gz": BIG - 1000}
    result = client.get()
    assert result.returncode == 0, result.stderr
    assert client.hub.ranges == [f"bytes={2 * 10 * 2**20}-"]
    assert client.hub.sent["test.tar.gz"] < 1.3 * BIG
    assert (client.home / "out" / "test.tar.gz").stat().st_size == BIG


def test_a_hub_that_stays_away_in_the_middle(client: Client) -> None:
    """Every attempt is cut: one error, no manifest; when the hub is back the same command goes on."""

    class Always(dict):
        def pop(self, name: str, default: object = None) -> int | None:  # type: ignore[override]
            return 100 if name == "test.tar.gz" else None

    client.hub.cut = Always()
    result = client.get()
    assert result.returncode in (1, 3)
    two_lines(result)
    assert not client.manifest.exists()
    client.hub.cut = {}
    client.hub.asked.clear()
    assert client.get().returncode == 0
    assert set(client.hub.asked) == {"test.tar.gz"}


def test_a_wrong_checksum_is_refused(client: Client) -> None:
    right = (client.hub.folder / "test.tar.gz").read_bytes()
    client.hub.lies = {"test.tar.gz": bytes(len(right))}
    result = client.get()
    assert result.returncode == 1
    assert "test.tar.gz has another checksum" in two_lines(result)
    assert not client.manifest.exists()
    assert not (client.home / "out" / "test.tar.gz").exists()
    client.hub.lies = {}
    assert client.get().returncode == 0
    assert (client.home / "out" / "test.tar.gz").read_bytes() == right


def test_no_access_and_not_there(client: Client) -> None:
    client.hub.gated = True
    gated = client.get()
    assert gated.returncode == 3
    assert "gated" in two_lines(gated)
    assert "hf auth login" in gated.stderr
    client.hub.gated, client.hub.absent = False, True
    absent = client.get()
    assert absent.returncode == 3
    assert "no such dataset" in two_lines(absent)
    client.hub.absent = False
    offline = client.get(HF_HUB_OFFLINE="1")
    assert offline.returncode == 3
    refused = client.get(HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.returncode == 3
    assert "cannot be reached" in two_lines(refused)
    assert not client.manifest.exists()


def test_a_folder_in_the_way(client: Client, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "out").write_text("a file")
    result = client.get()
    assert result.returncode == 2
    assert "--data-dir" in two_lines(result)


def test_interrupted_and_again(client: Client) -> None:
    """Ctrl-C while bytes come in; the same command ends it."""
    (client.hub.folder / "test.tar.gz").write_bytes(bytes(BIG))

    class Slow(dict):
        def pop(self, name: str, default: object = None) -> None:  # type: ignore[override]
            time.sleep(3 if name == "test.tar.gz" else 0)

    client.hub.cut = Slow()
    command = client.command("data", "get", "hpdv2", "--data-dir", client.home / "out")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=client.env())
    until = time.monotonic() + 240  # on a busy machine the imports alone take long
    while client.hub.asked["test.tar.gz"] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    assert client.hub.asked["test.tar.gz"], "the download was never begun"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not client.manifest.exists()
    client.hub.cut = {}
    assert client.get().returncode == 0
