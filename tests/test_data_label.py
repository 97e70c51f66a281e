"""`drm data label`: votes survive a killed process, are given by keyboard in a real browser, and train a reward model."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastapi")

from drmcli.config import resolve
from drmcli.data.ballot import VOTES, Ballot
from drmcli.data.datasets import read
from drmcli.errors import InputError, Interrupted
from drmcli.recipes.data_label import closed

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captions, four pictures each: 36 pairs."""
    from drmcli.cli.app import invoke

    folder = tmp_path_factory.mktemp("drawn") / "own"
    flags = ["data", "make", "--limit", "6", "--steps", "1", "--label", "people", "--out", str(folder), "--quiet"]
    assert invoke(flags) == 0
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """A copy without votes."""
    return Path(shutil.copytree(drawn, tmp_path / "own"))


@contextmanager
def labelling(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "drmcli", "data", "label", str(folder), "--port", "0", "--quiet", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        assert process.stdout
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def ask(url: str, path: str = "", body: dict | None = None, more: str = "") -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", f"/{path}?{parts.query}{more}", data)
    answer = connection.getresponse()
    read_, kind = answer.read(), answer.headers.get("content-type", "")
    connection.close()
    return answer.status, json.loads(read_) if "json" in kind else read_


# --- votes ----------------------------------------------------------------------------------------------------------------


def test_votes_are_of_pictures_whatever_their_side(folder: Path) -> None:
    """Two labellers who see the sides differently and choose the same picture agree; the table is what they said."""
    ballot = Ballot(folder)
    sides = {name: {p: ballot.swapped(name, p) for p in range(36)} for name in ("ann", "bob")}
    pair = next(p for p in range(36) if sides["ann"][p] != sides["bob"][p])
    other = next(p for p in range(36) if p != pair)
    ballot.vote("ann", pair, "left")
    ballot.vote("bob", pair, "right")
    ballot.vote("ann", other, "tie")
    ballot.vote("bob", other, "left")
    assert ballot.agreement() == (50.0, 2)
    assert ballot.write("x") == 2
    table = pd.read_parquet(folder / "preferences.parquet").set_index("pair_id")
    assert table.loc[str(pair), ["label", "weight"]].tolist() == [1.0, 2.0]
    assert table.loc[str(other), ["label", "weight"]].tolist() == [0.75, 2.0]
    first, second = (ballot.pictures[i] for i in ballot.pairs[pair])
    assert table.loc[str(pair), "chosen"] == (second if sides["ann"][pair] else first)
    assert 5 < sum(sides["ann"].values()) < 31
    ballot.undo("bob")
    assert Ballot(folder).votes == {"ann": ballot.votes["ann"], "bob": {pair: ballot.votes["bob"][pair]}}


def test_a_line_cut_short_is_passed_over_and_the_next_is_whole(folder: Path) -> None:
    ballot = Ballot(folder)
    ballot.vote("ann", 0, "left")
    with (folder / VOTES).open("ab") as file:
        file.write(b'{"labeller": "ann", "pai')
    again = Ballot(folder)
    assert (again.damaged, len(again.votes["ann"])) == (1, 1)
    again.vote("ann", 1, "skip")
    last = Ballot(folder)
    assert (last.damaged, set(last.votes["ann"])) == (1, {0, 1})
    assert last.said().keys() == {0}  # a skipped pair says nothing


def test_least_sure_first_and_other_folders(folder: Path, tmp_path: Path) -> None:
    ballot = Ballot(folder, limit=5)
    ballot.least_sure(np.arange(24.0) ** 2)
    gaps = [abs(a * a - b * b) for a, b in (ballot.pairs[p] for p in ballot.asked)]
    assert gaps == sorted(gaps) and len(gaps) == 5
    with pytest.raises(InputError, match="holds no drawn pictures"):
        Ballot(tmp_path)
    table = pd.read_parquet(folder / "drawn.parquet")
    table.loc[3, "path"] = "../../secret.png"
    table.to_parquet(folder / "drawn.parquet")
    with pytest.raises(InputError, match="leaves the folder"):
        Ballot(folder)


# --- the page -------------------------------------------------------------------------------------------------------------


def test_the_page_over_http(folder: Path) -> None:
    """Without the token nothing; wrong votes are refused; a vote is on disk when its answer comes; a kill loses none."""
    with labelling(folder, "--limit", "4") as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{16}", url)
        for path in ("", "state", "picture/0"):
            assert ask(url.partition("?")[0] + "?token=guessed", path)[0] == 403
        assert ask(url, "picture/0")[1][:4] == b"\x89PNG"
        assert [ask(url, path)[0] for path in ("picture/24", "picture/..%2fconfig.yaml", "config.yaml")] == [404] * 3
        page = ask(url)[1].decode()
        assert not re.search(r'(src|href)="?https?:', page)
        state = ask(url, "state", more="&labeller=ann")[1]
        assert (state["done"], state["total"], state["seconds_left"]) == (0, 4, None)
        for body in ({"labeller": "ann", "pair": state["pair"]["pair"], "choice": "both"}, {"labeller": "ann"},
                     {"labeller": "", "pair": 0, "choice": "left"}, {"labeller": "ann", "pair": 99, "choice": "left"}):  # fmt: skip
            code, said = ask(url, "vote", body)
            assert code == 422 and said["error"], body
        assert not (folder / VOTES).exists()
        for count, choice in enumerate(("left", "right", "undo", "tie", "skip"), 1):
            ahead = state["ahead"]
            state = ask(url, "vote", {"labeller": "ann", "pair": state["pair"]["pair"], "choice": choice})[1]
            assert len((folder / VOTES).read_text().splitlines()) == count
            if choice != "undo":
                assert state["pair"] == ahead
        process.kill()
        process.wait()
    with pytest.raises(Interrupted, match=r"3 votes on 2 pairs are in .*; 1 pairs are left"):
        closed(resolve("data-label", flags={"folder": str(folder)}), Ballot(folder, limit=4), folder)
    assert len(read(folder)) == 2


class Browser:
    """Headless Chromium by its own protocol over two pipes: no driver, no package."""

    def __init__(self, profile: Path):
        assert BROWSER
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        line = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", str(to_read), str(to_write), BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number = b"", 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        said = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            said["sessionId"] = self.session
        os.write(self.to, json.dumps(said).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                more = os.read(self.back, 1 << 16)
                assert more, "the browser has ended"
                self.buffer += more
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of a script once it is true."""
        end = time.monotonic() + 120
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_thirty_votes_in_a_browser_and_a_killed_process(folder: Path, tmp_path: Path, drm) -> None:
    """By keyboard; SIGKILL; started again, no vote is lost; the file trains a reward model."""
    ready = "document.body.dataset.ready"
    browser = Browser(tmp_path / "profile")
    try:
        with labelling(folder) as (process, url):
            browser.send("Page.navigate", url=url)
            # Nobody clicks: the field for the name has the keyboard.
            browser.until("document.activeElement.id === 'labeller'")
            browser.send("Input.insertText", text="ann")
            browser.until("document.activeElement.value === 'ann'")
            browser.press("Enter")
            browser.until(f"{ready} === '0'")
            assert browser.run("document.getElementById('left').naturalWidth") == 32
            keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "s", "ArrowLeft"] * 6
            for count, key in enumerate(keys, 1):
                shown = browser.run(
                    "document.getElementById('prompt').textContent + document.getElementById('left').src"
                )
                browser.press(key)
                browser.until(f"{ready} === '{count}'")
                assert (
                    browser.run("document.getElementById('prompt').textContent + document.getElementById('left').src")
                    != shown
                )
            browser.press("u")
            browser.until(f"{ready} === '29'")
            browser.press("ArrowLeft")
            browser.until(f"{ready} === '30'")
            assert "30 of 36" in browser.run("document.body.innerText")
            process.kill()
            process.wait()
        with labelling(folder) as (process, url):
            browser.send("Page.navigate", url=url + "&name=ann")
            browser.until(f"{ready} === '30'")
            for count in range(31, 37):
                browser.press("ArrowRight")
                browser.until(f"{ready} === '{count}'")
            assert not browser.run("document.getElementById('end').hidden")
            process.terminate()
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert out.strip() == str(folder)
    finally:
        browser.close()
    data = read(folder)
    assert len(data) == 30  # six of 36 were skipped
    assert sum(data.is_tie) == 6
    flags = ["--set", "shapes_prompts=4", "--set", "shapes_generated=0", "--set", "eval_pairs=6", "--batch-size", "6"]
    trained = drm("train-reward", "--data", folder, "--eval-data", "shapes", *flags, "--steps", 2, "--json")
    assert trained.code == 0, trained.err
    assert trained.json["train_pairs"] == 30


def test_what_cannot_be_labelled(folder: Path, tmp_path: Path, drm) -> None:
    nothing = drm("data", "label", tmp_path / "nowhere")
    assert (nothing.code, nothing.err.startswith(f"error: DIR {tmp_path / 'nowhere'}: is no folder")) == (2, True)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"label": ["shapes"]}))
    judged = drm("data", "label", folder)
    assert judged.code == 2 and "labelled by a scorer" in judged.err
    (folder / "summary.json").unlink()
    assert "is not finished" in drm("data", "label", folder).err
