"""Kill a run with SIGKILL at five random points, start it again each time, compare with an unbroken run.

    python examples/studies/kill_and_resume.py [train-reward|grpo|sample|reproduce]... [--folder FOLDER]

Ends with 0 when the weights (or pictures and tables) of both are equal, byte for byte. `drm reproduce`, some minutes of work, is killed
twice and only when it is asked for; its tables must be equal but for the seconds a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

KILLS = {"reproduce": 2}
"""How often each is killed; the others five times."""
COMMANDS = {
    "train-reward": "--steps 60 --save-every 5 --set shapes_prompts=200 --set eval_pairs=200",
    "grpo": "--updates 12 --save-every 1 --eval-every 4 --set eval_prompts=16 --set prompts_per_update=8 --on-hacking ignore",
    "sample": "--stepwise --beams 4 --num-images 100 --set batch_size=4 --trace",
    "reproduce": "",
}
PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]


def start(command: str, out: Path) -> subprocess.Popen:
    prompts = PROMPTS if command == "sample" else []
    line = [sys.executable, "-m", "drmcli", command, *prompts, *COMMANDS[command].split(), "--out", str(out), "--quiet"]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL)


def what_is_left(command: str, out: Path) -> Iterator[bytes]:
    """Everything that must be equal."""
    if command == "train-reward":
        yield (out / "reward" / "model.safetensors").read_bytes()
    elif command == "grpo":
        for name in ("lora", "lora-last"):
            yield (out / name / "pytorch_lora_weights.safetensors").read_bytes()
    elif command == "reproduce":
        rows = pd.read_parquet(out / "tables.parquet")
        yield rows[rows["column"] != "seconds a picture"].to_csv(index=False).encode()
    else:
        for picture in sorted((out / "images").iterdir()):
            yield picture.name.encode() + picture.read_bytes()
        for table in ("images", "candidates"):
            yield pd.read_parquet(out / f"{table}.parquet").to_csv(index=False).encode()


def digest(command: str, out: Path) -> str:
    found = hashlib.sha256()
    for part in what_is_left(command, out):
        found.update(part)
    return found.hexdigest()[:12]


def compare(command: str, folder: Path) -> bool:
    """One command, unbroken and killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    raise_on_failure(start(command, folder / "unbroken").wait())
    whole = time.monotonic() - began
    rng, wanted = random.Random(0), KILLS.get(command, 5)
    kills = 0
    while True:
        process = start(command, folder / "killed")
        try:
            process.wait(timeout=rng.uniform(0.15, 0.45) * whole if kills < wanted else None)
            raise_on_failure(process.returncode)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    a, b = (digest(command, folder / name) for name in ("unbroken", "killed"))
    print(
        f"drm {command}, killed {kills} times: {'equal' if a == b else 'NOT equal'} to the unbroken run of {whole:.0f} s ({a}, {b})",
        flush=True,
    )
    return a == b and kills > 0


def raise_on_failure(code: int) -> None:
    if code:
        raise SystemExit(f"drm ended with {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", default=["train-reward", "grpo", "sample"], metavar="|".join(COMMANDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-and-resume"))
    args = parser.parse_args()
    equal = [compare(command, args.folder / command) for command in args.commands]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    raise SystemExit(main())
