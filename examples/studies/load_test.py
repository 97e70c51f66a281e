"""How fast is `drm serve` under load, and does it lose anything? 32 clients, 2,000 requests on the embedded reward model.

    python examples/studies/load_test.py [--clients 32] [--requests 2000] [--batch 32] [--noise-samples 4]

The yardstick is the model called directly with batches of the sizes that the server really made, from the same files (decoded, as the
server must). Every picture is one of a few hundred whose score is known, so that a lost, doubled or exchanged answer shows. The server
is a process of its own; so are the clients, four of them with a thread a client, as the load should not run in the server's process.
`ratio` is of pictures a second by the clock; `processor_ratio` of processor time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
from PIL import Image

from drmcli.tiny import world

KINDS = 256
"""Different pictures."""


def files() -> tuple[list[bytes], list[str]]:
    captions = (list(world.captions("test")) * KINDS)[:KINDS]
    out = []
    for pixels in world.draw(captions, np.random.default_rng(0), flawed=0.5):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        out.append(buffer.getvalue())
    return out, captions


def client(host: str, jobs: list[tuple[int, bytes]]) -> list[tuple[int, float]]:
    """One client: requests one after the other on one connection. (number of the request, score) for each answer."""
    connection = http.client.HTTPConnection(host, timeout=300)
    answers = []
    for number, body in jobs:
        connection.request("POST", "/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        assert answer.status == 200, said
        answers.append((number, said["scores"]["reward"][0]))
    connection.close()
    return answers


def clients(host: str, loads: list[list[tuple[int, bytes]]]) -> list[tuple[int, float]]:
    """Several clients of one process."""
    with ThreadPoolExecutor(len(loads)) as pool:
        return [answer for found in pool.map(lambda jobs: client(host, jobs), loads) for answer in found]


def direct(
    pictures: list[bytes], captions: list[str], sizes: list[int], noise_samples: int
) -> tuple[float, float, list[float]]:
    """Seconds and processor seconds for as many pictures in the same batches by the model itself, and the score of each kind."""
    from drmcli.config import package_path, resolve
    from drmcli.reward import RewardModel

    model = RewardModel.from_pretrained(package_path(resolve("serve").reward))

    def score(kinds: list[int]) -> list[float]:
        opened = [Image.open(io.BytesIO(pictures[k])).convert("RGB") for k in kinds]
        return model.score_images(opened, [captions[k] for k in kinds], noise_samples=noise_samples)[:, 0].tolist()

    known = [x for i in range(0, KINDS, 32) for x in score(list(range(i, i + 32)))]
    began, worked, at = time.monotonic(), time.process_time(), 0
    for size in sizes:
        score([(at + i) % KINDS for i in range(size)])
        at += size
    return time.monotonic() - began, time.process_time() - worked, known


def counts(host: str) -> tuple[int, int, float]:
    """(batches, pictures) of the reward model so far, and processor seconds of the server."""
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()

    def value(name: str) -> float:
        found = re.search(rf"^{name} ([0-9.e+-]+)$", page, re.M)
        return float(found[1]) if found else 0.0

    mark = r'\{scorer="reward"\}'
    batches, pictures = value(f"drm_batch_seconds_count{mark}"), value(f"drm_scores_total{mark}")
    return int(batches), int(pictures), value("process_cpu_seconds_total")


def measure(host: str, args: argparse.Namespace) -> dict[str, float]:
    """All requests to a server, then the model itself."""
    pictures, captions = files()
    bodies = [
        json.dumps(
            {"images": [base64.b64encode(p).decode()], "prompts": c, "noise_samples": args.noise_samples}
        ).encode()
        for p, c in zip(pictures, captions)
    ]
    jobs = [(i, bodies[i % KINDS]) for i in range(args.requests)]
    loads = [jobs[i :: args.clients] for i in range(args.clients)]
    groups = [loads[i::4] for i in range(min(4, args.clients))]
    with ProcessPoolExecutor(len(groups), mp_context=get_context("spawn")) as pool:
        list(pool.map(clients, [host] * len(groups), [[jobs[:1]]] * len(groups)))  # everybody is there
        before, began = counts(host), time.monotonic()
        answers = [a for found in pool.map(clients, [host] * len(groups), groups) for a in found]
        seconds, after = time.monotonic() - began, counts(host)
    batches, total = after[0] - before[0], after[1] - before[1]
    sizes = [total // batches + (i < total % batches) for i in range(batches)]  # the server's, evened out
    plain, worked, known = direct(pictures, captions, sizes, args.noise_samples)
    numbers = [number for number, _ in answers]
    wrong = sum(abs(score - known[number % KINDS]) > 1e-4 for number, score in answers)
    return {
        "requests": args.requests, "answers": len(answers), "lost": args.requests - len(set(numbers)),
        "twice": total - len(numbers), "wrong": wrong, "served_per_second": total / seconds,
        "direct_per_second": total / plain, "ratio": plain / seconds,
        "processor_ratio": worked / (after[2] - before[2]), "mean_batch": total / batches,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="the server's --max-batch")
    parser.add_argument("--noise-samples", type=int, default=4)
    parser.add_argument("--server", help="a running server of the embedded reward model; else one is started")
    args = parser.parse_args(argv)
    if args.server:
        found = measure(args.server.removeprefix("http://"), args)
    else:
        command = [sys.executable, "-m", "drmcli", "serve", "--port", "0", "--quiet", "--max-batch", str(args.batch)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                found = measure(server.stdout.readline().strip().removeprefix("http://"), args)
            finally:
                server.terminate()
    for name, value in found.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")
    return found


if __name__ == "__main__":
    main()
