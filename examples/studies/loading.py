"""What loading costs at real size: peak memory against the bytes of the weights that are used, seconds against plain reading of them.

    python examples/studies/loading.py [--folder DIR] [--blocks 24] [--t5-blocks 4] [--backbone lora]

Builds a folder of Stable Diffusion 3.5 Medium's shape with random weights in bf16 (the transformer of --blocks blocks in shards, the VAE,
both CLIPs whole, T5 of --t5-blocks blocks) and a reward model on it that leaves three blocks out, then starts a process each for

- plain reading: the bytes of the tensors that are used, into new memory, file by file;
- bare loading: `RewardModel.from_pretrained` and `model.generator()`, all in bf16 on the device;
- `drm score` of one picture.

Peak memory is the process's largest resident set as Linux counts it (VmHWM): anonymous memory and pages of mapped files alike. "Before" is
what it was when everything was imported. Each is done twice: after the files were dropped from the page cache (as far as the
system follows `posix_fadvise`), and with the files in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from random_pipeline import DROPPED, build

READ = """
import sys, time, json
pieces = json.load(sys.stdin)
started, n = time.perf_counter(), 0
kept = []
for path, wanted in pieces.items():
    with open(path, "rb", buffering=0) as file:
        for start, size in wanted:
            file.seek(start)
            kept.append(bytearray(size))
            file.readinto(kept[-1])
            n += size
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": n}))
"""
PEAK = """
def peak():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
LOAD = """
import sys, time, json, torch
from drmcli.generator import Generator
from drmcli.reward import RewardModel
import transformers.models.clip.modeling_clip, transformers.models.t5.modeling_t5, diffusers.pipelines.stable_diffusion_3, peft
before = peak()
started = time.perf_counter()
model = RewardModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device=sys.argv[2])
parts = model.generator().pipe.components.values()
seconds = time.perf_counter() - started
modules = [model, *(p for p in parts if isinstance(p, torch.nn.Module))]
used = {t.data_ptr(): t.nbytes for m in modules for t in m.state_dict().values() if not t.is_meta}
print(json.dumps({"seconds": seconds, "used": sum(used.values()), "before": before, "peak": peak()}))
"""


SCORE = """
import contextlib, io, json, sys, time
started = time.perf_counter()
from drmcli.cli.app import main
with contextlib.redirect_stdout(io.StringIO()):
    try:
        code = main(sys.argv[1:])
    except SystemExit as error:
        code = error.code
if code:
    sys.exit(code)
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak()}))
"""


def used_pieces(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """(start, bytes) of the tensors that scoring needs, by file: all but those of dropped blocks and of output layers."""
    full = json.loads((folder / "reward" / "config.json").read_text())["backbone"] == "full"
    kept = json.loads((folder / "base" / "transformer" / "config.json").read_text())["num_layers"] - DROPPED
    found: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        denoiser = path.parent.name == "transformer"
        if denoiser and full:
            continue
        raw = path.read_bytes()[:8]
        length = int.from_bytes(raw, "little")
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        for key, facts in header.items():
            block = key.split(".")[1] if key.startswith("transformer_blocks.") else "0"
            if key == "__metadata__" or (denoiser and (int(block) >= kept or key.startswith(("norm_out", "proj_out")))):
                continue
            start, end = facts["data_offsets"]
            found.setdefault(str(path), []).append((8 + length + start, end - start))
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(code: str, *arguments: str, text: str = "") -> dict:
    """What a Python process of its own printed as JSON."""
    command = [sys.executable, "-c", PEAK + code, *arguments]
    return json.loads(subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="kept and used again; else a temporary one")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--t5-blocks", type=int, default=4)
    parser.add_argument("--backbone", choices=["lora", "frozen", "full"], default="lora")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "picture.png").is_file():
            print("building", folder, flush=True)
            with ProcessPoolExecutor(1) as pool:  # whose memory is given back
                pool.submit(build, folder, args.blocks, args.t5_blocks, args.backbone).result()
            Image.new("RGB", (128, 128), "red").save(folder / "picture.png")
        pieces = json.dumps(used_pieces(folder))
        for state in ("cold", "warm"):
            if state == "cold":
                drop_from_cache(folder)
            plain = measured(READ, text=pieces)
            if state == "cold":
                drop_from_cache(folder)
            load = measured(LOAD, str(folder / "reward"), args.device)
            print(f"{state} files: {load['used'] / 2**30:.2f} GiB of weights are used")
            print(f"  plain reading of their {plain['bytes'] / 2**30:.2f} GiB in the files: {plain['seconds']:.1f} s")
            print(
                f"  loading: {load['seconds']:.1f} s, {load['seconds'] / plain['seconds']:.2f} times; peak {told(load, load)}"
            )
            print(f"  of which {load['before'] / 2**30:.2f} GiB before it")
        flags = [
            "--prompt",
            "a red circle",
            "--device",
            args.device,
            "--reward",
            str(folder / "reward"),
            "--dtype",
            "bf16",
        ]
        flags += ["--resolution", "128", "--noise-samples", "1", "--out", str(folder / "scores"), "--overwrite"]
        score = measured(SCORE, "score", str(folder / "picture.png"), *flags)
        print(f"drm score: {score['seconds']:.1f} s; peak {told(score, load)}", flush=True)


def told(found: dict, load: dict) -> str:
    """Peak memory beside the bytes of the weights that are used."""
    return f"{found['peak'] / 2**30:.2f} GiB, {found['peak'] / load['used']:.2f} times the weights"


if __name__ == "__main__":
    main()
