"""Kill `drm train-reward` with SIGKILL at five random points, start it again each time, compare with an unbroken run.

    python examples/kill_and_resume.py [FOLDER]

Ends with 0 when both reward models are equal, byte for byte.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

KILLS = 5
ARGS = ["--steps", "60", "--save-every", "5", "--set", "shapes_prompts=200", "--set", "eval_pairs=200"]


def start(out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "drmcli", "train-reward", *ARGS, "--out", str(out), "--quiet"])


def main(folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    assert start(folder / "unbroken").wait() == 0
    whole = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    while True:
        process = start(folder / "killed")
        try:
            if kills == KILLS:
                raise_on_failure(process.wait())
                break
            process.wait(timeout=rng.uniform(0.3, 0.8) * whole)
            break  # done before the blow
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            steps = sorted(p.name for p in (folder / "killed" / "checkpoints").glob("step-*"))
            print(f"killed {kills} times; newest checkpoint {steps[-1] if steps else 'none'}", flush=True)
    digests = [
        hashlib.sha256((folder / name / "reward" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("unbroken", "killed")
    ]
    equal = digests[0] == digests[1]
    print(
        f"killed {kills} times: model.safetensors is {'equal' if equal else 'NOT equal'} ({digests[0][:12]}, {digests[1][:12]})"
    )
    return 0 if equal and kills else 1


def raise_on_failure(code: int) -> None:
    if code:
        raise SystemExit(f"drm ended with {code}")


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/kill-and-resume")))
