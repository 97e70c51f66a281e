"""`drm serve` and its client: batches, limits, wrong input, and what happens when a server ends."""

from __future__ import annotations

import asyncio
import base64
import http.client
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

pytest.importorskip("fastapi")

from drmcli.config import resolve
from drmcli.errors import InputError, MissingError, RunError
from drmcli.recipes import serve as recipe
from drmcli.reward import RewardModel
from drmcli.scorers import StateScorer, load_scorer
from drmcli.scorers.plain import shapes
from drmcli.scorers.remote import connect
from drmcli.service.batching import Batcher, Full
from drmcli.service.scoring import Served, make_app
from drmcli.tiny import world

CAPTIONS = list(world.captions("test"))[:6]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def pictures(count: int = 6) -> list[Image.Image]:
    return [Image.fromarray(x) for x in world.draw(CAPTIONS[:count], np.random.default_rng(0))]


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def serving(config, served: list[Served]) -> Iterator[str]:
    """A server in a thread of this process; yields its address when it takes requests."""
    listening, up = recipe.listen("127.0.0.1", 0), threading.Event()
    app = make_app(config, served)
    thread = threading.Thread(target=lambda: recipe.serve(app, listening, up.set, grace=5), daemon=True)
    thread.start()
    assert up.wait(60)
    try:
        yield recipe.address(listening)
    finally:
        app.state.stop()
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def model(reward_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(reward_folder)


@pytest.fixture(scope="module")
def url(reward_folder: Path) -> Iterator[str]:
    flags = {
        "reward": str(reward_folder),
        "scorers": ["shapes"],
        "max_items": 6,
        "max_body_mib": 1,
        "max_pixels": 10000,
    }
    config = resolve("serve", flags=flags)
    with serving(config, recipe.load(config)) as address:
        yield address


def ask(url: str, path: str, body: bytes | dict | None = None, kind: str = "application/json", method: str = "POST"):
    """Status, JSON or text, headers."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, data, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text, dict(answer.headers)


def test_scores_are_those_of_the_models_themselves(url: str, model: RewardModel) -> None:
    """Pictures as JSON and as multipart, and noisy latents, by the reward model and by a scorer."""
    body = {
        "images": [encoded(p) for p in pictures()],
        "prompts": CAPTIONS,
        "sigma": 0.5,
        "noise_samples": 2,
        "seed": 3,
    }
    status, said, _ = ask(url, "/score", body)
    assert status == 200, said
    direct = model.score_images(pictures(), CAPTIONS, sigmas=[0.5], noise_samples=2, seed=3)[:, 0]
    assert said["scores"]["reward"] == pytest.approx(direct.tolist(), abs=1e-5)
    assert said["scores"]["shapes"] == pytest.approx(shapes(pictures(), CAPTIONS).tolist(), abs=1e-6)
    assert said["errors"] == []
    form, kind = multipart(pictures()[:2], {"prompts": CAPTIONS[:2], "scorers": ["reward"], "sigma": ["0.5"],
                                         "noise_samples": ["2"], "seed": ["3"]})  # fmt: skip
    status, said, _ = ask(url, "/score", form, kind)
    assert status == 200, said
    assert said["scores"] == {"reward": pytest.approx(direct[:2].tolist(), abs=1e-5)}
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))[:, : channels(model)]
    levels = [0.2, 0.6, 0.9]
    cond = model.generator().encode_prompts(CAPTIONS[:3])
    wanted = model.score(x, torch.tensor(levels), cond).detach()
    remote = load_scorer(url, **CPU)
    assert isinstance(remote, StateScorer)
    found = remote.score(x, torch.tensor(levels), remote.encode(CAPTIONS)[torch.tensor([0, 1, 2])])
    assert torch.allclose(found, wanted, atol=1e-5)


def channels(model: RewardModel) -> int:
    return int(model.config.transformer["in_channels"])


def multipart(images: list[Image.Image], fields: dict[str, list[str]]) -> tuple[bytes, str]:
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, values in fields.items() for value in values]
    parts += [
        b'name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + base64.b64decode(encoded(image))
        for image in images
    ]
    body = b"".join(b"--EDGE\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--EDGE--\r\n"
    return body, "multipart/form-data; boundary=EDGE"


PNG = encoded(Image.new("RGB", (8, 8)))
FINE = {"images": [PNG], "prompts": "a picture", "scorers": ["reward"], "noise_samples": 1}


def latents(**tensors: torch.Tensor) -> str:
    return base64.b64encode(safetensors.torch.save(tensors)).decode()


WRONG: dict[str, tuple[str, bytes | dict, str, int, str]] = {
    "not JSON": ("/score", b"{images", "application/json", 400, "not JSON"),
    "nested a million deep": ("/score", b"[" * 500_000, "application/json", 400, "not JSON"),
    "a list": ("/score", b"[1]", "application/json", 422, "not a JSON object"),
    "plain text": ("/score", b"hello", "text/plain", 415, "text/plain"),
    "no type": ("/score", b"hello", "", 415, "missing"),
    "an unknown key": ("/score", FINE | {"image": 1}, "application/json", 422, "image: extra inputs"),
    "no pictures": ("/score", {"prompts": "x"}, "application/json", 422, "images: "),
    "an empty list": ("/score", FINE | {"images": []}, "application/json", 422, "images: "),
    "pictures that are no text": ("/score", FINE | {"images": [3]}, "application/json", 422, "base64"),
    "no base64": ("/score", FINE | {"images": ["?!"]}, "application/json", 422, "images.0: not base64"),
    "no picture": ("/score", FINE | {"images": ["aGVsbG8="]}, "application/json", 422, "not a picture"),
    "a picture cut short": ("/score", FINE | {"images": [PNG[:64]]}, "application/json", 422, "images.0"),
    "too many pixels": ("/score", FINE | {"images": [encoded(Image.new("L", (200, 200)))]}, "application/json", 422, "10000"),
    "too many pictures": ("/score", FINE | {"images": [PNG] * 7}, "application/json", 413, "the limit is 6"),
    "too large": ("/score", b" " * (2**20 + 1), "application/json", 413, "larger than"),
    "prompts of another number": ("/score", FINE | {"prompts": ["a", "b"]}, "application/json", 422, "prompts: 2 for 1"),
    "an empty prompt": ("/score", FINE | {"prompts": " "}, "application/json", 422, "a prompt is empty"),
    "an unknown scorer": ("/score", FINE | {"scorers": ["clip"]}, "application/json", 422, "'clip' is not served"),
    "a noise level above 1": ("/score", FINE | {"sigma": 1.5}, "application/json", 422, "sigma: "),
    "a noise level that is no number": ("/score", b'{"images":[""],"prompts":"a","sigma":NaN}', "application/json", 422, "sigma: "),
    "words of another world": ("/score", FINE | {"scorers": ["shapes"], "prompts": "a cat"}, "application/json", 422, "a cat"),
    "a form without a file": ("/score", b'--E\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n--E--\r\n',
                              "multipart/form-data; boundary=E", 422, "not sent as a file"),
    "a form without an edge": ("/score", b"--E", "multipart/form-data", 400, "boundary"),
    "latents that are no file": ("/score/latents", {"latents": "aGVsbG8=", "sigma": 0.5, "prompts": "a"},
                                 "application/json", 422, "not a safetensors file"),
    "another tensor": ("/score/latents", {"latents": latents(x=torch.zeros(1)), "sigma": 0.5, "prompts": "a"},
                       "application/json", 422, "the file holds x"),
    "other channels": ("/score/latents", {"latents": latents(latents=torch.zeros(9, 4, 4)), "sigma": 0.5, "prompts": "a"},
                       "application/json", 422, "9 channels"),
    "latents that are not finite": ("/score/latents", {"latents": latents(latents=torch.full((4, 4, 4), torch.nan)),
                                                       "sigma": 0.5, "prompts": "a"}, "application/json", 422, "not finite"),
    "no noise level": ("/score/latents", {"latents": "", "prompts": "a"}, "application/json", 422, "sigma: field required"),
    "another path": ("/scores", FINE, "application/json", 404, "not found"),
}  # fmt: skip


def test_wrong_input_is_refused_and_the_server_lives_on(url: str) -> None:
    """Each kind with a 4xx and one line; what is fine is scored between them."""
    for kind, (path, body, content, code, fact) in WRONG.items():
        status, said, _ = ask(url, path, body, content)
        assert status == code, (kind, status, said)
        assert fact.lower() in said["error"].lower() and said["hint"], (kind, said)
        assert "\n" not in said["error"], kind
    assert ask(url, "/score", None, method="GET")[0] == 405
    assert ask(url, "/score", FINE)[0] == 200
    assert ask(url, "/health", method="GET")[1]["status"] == "ok"


def test_a_bad_picture_fails_alone(url: str) -> None:
    """In a request of three, one is damaged and one has a caption that the scorer does not know."""
    body = {"images": [encoded(pictures(1)[0]), PNG[:64], PNG], "prompts": [CAPTIONS[0], CAPTIONS[0], "a cat"]}
    status, said, _ = ask(url, "/score", body)
    assert status == 200
    assert [x is None for x in said["scores"]["reward"]] == [False, True, False]
    assert [x is None for x in said["scores"]["shapes"]] == [False, True, True]
    assert [(e["index"], e["scorer"]) for e in said["errors"]] == [(1, "reward"), (1, "shapes"), (2, "shapes")]


def test_metrics_and_interface(url: str) -> None:
    ask(url, "/score", FINE)
    text = ask(url, "/metrics", method="GET")[1]
    assert re.search(r'^drm_requests_total\{path="/score",code="200"\} [1-9]', text, re.M)
    assert re.search(r'^drm_batch_seconds_bucket\{scorer="reward",le="\+Inf"\} [1-9]', text, re.M)
    assert all(re.fullmatch(r"# (HELP|TYPE) .+|\w+(\{[^{}]*\})? [0-9.e+-]+", line) for line in text.splitlines())
    interface = ask(url, "/openapi.json", method="GET")[1]
    assert set(interface["paths"]) == {"/score", "/score/latents", "/health", "/metrics"}
    assert "images" in json.dumps(interface["paths"]["/score"]["post"]["requestBody"])


# --- the queue ------------------------------------------------------------------------------------------------------------


def test_requests_are_joined_and_a_failing_one_is_found() -> None:
    """While the worker is busy, seven wait; they then share batches of at most four, and one that fails does so alone."""
    busy, go = threading.Event(), threading.Event()
    sizes: list[tuple[str, int]] = []

    def score(key: str, payloads: list[int]) -> list[int]:
        busy.set()
        assert go.wait(60)
        if 5 in payloads:
            raise InputError("five: is bad", hint="leave it out")
        return [10 * x for x in payloads]

    async def story() -> list:
        observe = lambda key, size, seconds: sizes.append((key, size))  # noqa: E731
        batcher = Batcher(score, max_batch=4, max_wait=0.0, max_queue=8, observe=observe)
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.submit([("a", 0)]))
        await asyncio.to_thread(busy.wait, 60)
        rest = [asyncio.create_task(batcher.submit([("a", x)])) for x in range(1, 8)]
        await asyncio.sleep(0)
        with pytest.raises(Full) as full:
            await batcher.submit([("a", 9)])
        assert full.value.retry_after >= 1
        go.set()
        answers = [await task for task in (first, *rest)]
        batcher.close()
        await worker
        return answers

    answers = asyncio.run(story())
    assert [a[0] for a in answers if not isinstance(a[0], Exception)] == [0, 10, 20, 30, 40, 60, 70]
    assert isinstance(answers[5][0], InputError)
    assert sizes == [("a", 1), ("a", 4), ("a", 3)]


def test_a_batch_waits_for_company_and_other_keys_do_not_join() -> None:
    sizes: list[tuple[str, int]] = []

    async def story() -> None:
        batcher = Batcher(
            lambda key, payloads: payloads, max_batch=3, max_wait=3600, max_queue=99,
            observe=lambda key, size, seconds: sizes.append((key, size)),
        )  # fmt: skip
        worker = asyncio.create_task(batcher.run())
        tasks = [asyncio.create_task(batcher.submit([(key, 1)])) for key in "ababa"]
        assert await tasks[0] == [1]  # full with three; an hour was not waited for
        batcher.close()
        await asyncio.gather(*tasks, worker)

    asyncio.run(story())
    assert sizes == [("a", 3)]


def test_a_full_queue_says_when_to_come_again_and_the_client_does() -> None:
    """The worker is held; a second request is answered 503 with Retry-After, and the client's next try goes through."""
    go, refused = threading.Event(), threading.Event()
    config = resolve("serve", flags={"reward": "none", "max_queue": 1, "max_wait_ms": 0.0})

    def slow(images: list, prompts: list[str], settings: dict) -> list[float]:
        assert go.wait(60)
        return [1.0] * len(images)

    with serving(config, [Served("slow", slow)]) as address, ThreadPoolExecutor(2) as pool:
        body = {"images": [PNG], "prompts": "x"}
        first = pool.submit(ask, address, "/score", body)
        status, said, headers = 200, {}, {}
        while status == 200 and not first.done():  # until the first one holds the only place
            if ask(address, "/metrics", method="GET")[1].count("drm_queue_items 1"):
                status, said, headers = ask(address, "/score", body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "queue is full" in said["error"]
        scorer = connect(address)
        once = scorer.server._once
        scorer.server._once = lambda *a: _told(once, refused, *a)  # type: ignore[method-assign]
        waiting = pool.submit(scorer.score_images, pictures(1), ["x"])
        assert refused.wait(60)
        go.set()
        assert waiting.result(60).tolist() == [1.0]
        assert first.result(60)[0] == 200


def _told(once: Callable, refused: threading.Event, *args: object) -> dict:
    try:
        return once(*args)
    except Exception:
        refused.set()
        raise


# --- the client -----------------------------------------------------------------------------------------------------------


def test_the_client_scores_in_parts_and_in_every_command(url: str, tmp_path: Path, drm, pairs_file: Path) -> None:
    judge = load_scorer(f"{url}#shapes", **CPU)
    images, texts = pictures() * 3, CAPTIONS * 3  # more than one request may hold
    assert judge.score_images(images, texts).tolist() == pytest.approx(shapes(images, texts).tolist(), abs=1e-6)
    flags = ["bench", "--reward", "none", "--dataset", pairs_file, "--json"]
    remote = drm(*flags, "--scorer", f"{url}#shapes", "--out", tmp_path / "a")
    assert remote.code == 0, remote.err
    own = drm(*flags, "--scorer", "shapes", "--out", tmp_path / "b")
    assert remote.json["scorers"][0]["accuracy"] == own.json["scorers"][0]["accuracy"]
    told = drm("bench", "--reward", "none", "--dataset", pairs_file, "--scorer", f"{url}#clip")
    assert told.code == 2
    assert f"error: --scorer {url}#clip: does not serve 'clip'" in told.err


def test_the_client_says_what_is_wrong() -> None:
    free = recipe.listen("127.0.0.1", 0)
    nobody = recipe.address(free)
    free.close()
    with pytest.raises(MissingError, match="no answer: Connection refused"):
        load_scorer(nobody, **CPU, flag="--judge")
    for ref in ("http://", "http://host:port", "http://user@host"):
        with pytest.raises(InputError, match="^--scorer http"):
            load_scorer(ref, **CPU)


def test_a_flag_that_cannot_be_served(drm) -> None:
    taken = recipe.listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    for flags, fact in (
        (["--port", port], f"--port {port}: Address already in use"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: not an address"),
        (["--reward", "none"], "--reward none: nothing is left to serve"),
        (["--scorer", "shapes", "--scorer", "shapes", "--reward", "none"], "--scorer shapes: is named twice"),
        (["--port", "70000"], "--port: must be less than or equal to 65535, got 70000"),
    ):
        result = drm("serve", "--port", "0", *flags)
        assert result.code == 2, flags
        assert fact in result.err
    taken.close()
    plan = drm("serve", "--dry-run", "--json", "--port", "0")
    assert plan.json["plan"]["address"] == "http://127.0.0.1:0"


def start(folder: Path) -> subprocess.Popen[str]:
    """A server with a scorer that never answers a picture of prompt "wait"; its first line is its address."""
    folder.mkdir()
    (folder / "own.py").write_text(
        "import threading\ndef score(images, prompts):\n"
        "    if 'wait' in prompts:\n        open('reached', 'w').close(); threading.Event().wait(600)\n"
        "    return [1.0] * len(images)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "drmcli", "serve", "--reward", "none", "--scorer", "own:score", "--port", "0", "--quiet"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def test_signals_and_a_killed_server(tmp_path: Path) -> None:
    """SIGTERM ends with 130 and one error; a SIGKILL makes the request in flight fail clearly, not hang."""
    ended, killed = start(tmp_path / "a"), start(tmp_path / "b")  # both at once: starting takes seconds
    try:
        assert ended.stdout and killed.stdout
        scorer = connect(ended.stdout.readline().strip(), retries=1, backoff=0.01)
        assert scorer.score_images(pictures(2), ["x", "x"]).tolist() == [1.0, 1.0]
        ended.send_signal(signal.SIGTERM)
        _, err = ended.communicate(timeout=60)
        assert ended.returncode == 130, err
        assert err.splitlines()[0] == "error: interrupted: 1 requests were answered"
        assert len(err.splitlines()) == 2, err
        url = killed.stdout.readline().strip()
        scorer = connect(url, retries=1, backoff=0.01)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(scorer.score_images, pictures(1), ["wait"])
            while not (tmp_path / "b" / "reached").exists():  # the request is in the worker
                assert killed.poll() is None and not waiting.done()
                time.sleep(0.05)
            killed.kill()
            with pytest.raises(RunError, match=rf"--scorer {url}: no answer: "):
                waiting.result(60)
    finally:
        for process in (ended, killed):
            process.kill()
            process.communicate()


def test_the_example_for_other_projects(url: str, model: RewardModel, tmp_path: Path) -> None:
    """It needs nothing but Python: run without site packages and without this project on the path."""
    for i, picture in enumerate(pictures()[:2]):
        picture.save(tmp_path / f"{i}.png")
    script = Path(__file__).parents[1] / "examples" / "score_over_http.py"
    command = [sys.executable, "-I", "-S", str(script), url, CAPTIONS[0], "0.png", "1.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert found == pytest.approx(model.score_images(pictures()[:2], [CAPTIONS[0]] * 2)[:, 0].tolist(), abs=1e-4)


def test_load_test_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of the figures, with 3 clients and 12 requests: nothing lost, nothing twice, no answer of another picture."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "studies"))
    load_test = importlib.import_module("load_test")
    config = resolve("serve", flags={})
    with serving(config, recipe.load(config)) as address:
        found = load_test.main(["--clients", "3", "--requests", "12", "--noise-samples", "1", "--server", address])
    assert (found["answers"], found["lost"], found["twice"], found["wrong"]) == (12, 0, 0, 0)
    assert found["ratio"] > 0
