"""A reward for another project's GRPO loop, over HTTP: the standard library alone, no import of drmcli, torch or anything else.

Start a server, `drm serve --reward runs/reward/reward --port 8000`, and give `reward_fn` to the loop: it takes a group of pictures and
their prompts and gives a number each. Run as a script it scores files: python score_over_http.py
[http://HOST:PORT] PROMPT PICTURE...
"""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def reward_fn(
    pictures: list[bytes], prompts: list[str], *, server: str = "http://127.0.0.1:8000", sigma: float = 0.25
) -> list[float]:
    """A reward for each picture (the bytes of a PNG or JPEG file) and its prompt. A server that is busy is asked again."""
    body = {"images": [base64.b64encode(p).decode() for p in pictures], "prompts": prompts, "sigma": sigma}
    request = urllib.request.Request(f"{server}/score", json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                said = json.load(answer)
            break
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise RuntimeError(json.load(error)["error"]) from None
            time.sleep(float(error.headers.get("Retry-After", 1)))
    if said["errors"]:  # a picture that cannot be scored must not become a reward of 0
        raise RuntimeError(said["errors"][0]["error"])
    return next(iter(said["scores"].values()))


def advantages(rewards: list[float]) -> list[float]:
    """GRPO's: each reward against its group."""
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std + 1e-6) for r in rewards]


if __name__ == "__main__":
    words = sys.argv[1:]
    server = words.pop(0) if words and words[0].startswith("http") else "http://127.0.0.1:8000"
    if len(words) < 2:
        sys.exit("usage: python score_over_http.py [http://HOST:PORT] PROMPT PICTURE...")
    prompt, *files = words
    rewards = reward_fn([Path(f).read_bytes() for f in files], [prompt] * len(files), server=server)
    for file, reward, advantage in zip(files, rewards, advantages(rewards)):
        print(f"{reward:+.4f}  advantage {advantage:+.2f}  {file}")
