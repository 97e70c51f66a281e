"""train-reward by two real processes does what one does: copies, split weights, two machines, and stops that all of them make."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file
from test_train_reward import TINY, assert_close, weights

import drmcli
from drmcli.config import resolve
from drmcli.errors import InputError, Interrupted
from drmcli.recipes import train_reward
from drmcli.recipes.launch import ended
from drmcli.results import read
from drmcli.run import Silent

SMALL = TINY | {"steps": 3, "lr": 1e-5, "head_lr": 1e-5, "save_every": 0, "eval_pairs": 6, "device": "cpu"}
SHARDED = {"shard": True, "ema_decay": 0.9, "gradient_checkpointing": True, "max_grad_norm": 0.01}
LORA = {"shard": True, "backbone": "lora", "lora_rank": 4}
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from drmcli.config import resolve
from drmcli.errors import DrmError
from drmcli.recipes import learner, train_reward
from drmcli.run import Silent

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
learn = learner.Learner.learn

def signalled(self, micro, window):
    assert torch.distributed.get_world_size() == self.accelerator.num_processes == 2
    learn(self, micro, window)
    if rank == 1 and self.step == 2 and self.config.seed == 77:
        os.kill(os.getpid(), signal.SIGTERM)

learner.Learner.learn = signalled
runs, end = json.loads(sys.argv[2]), Accelerator.end_training
for flags in runs:
    # It closes the process group, which the next run needs.
    Accelerator.end_training = end if flags is runs[-1] else lambda self: None
    try:
        done = train_reward.run(resolve("train-reward", flags=flags), Silent())
    except DrmError as stop:
        done = {"stopped": str(stop)}
    with (folder / f"{Path(flags['out']).name}-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(done) + "\\n")
assert not torch.distributed.is_initialized()
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(folder: Path, runs: list[dict], *placement: str) -> subprocess.Popen[str]:
    """These runs one after the other; each process leaves NAME-RANK.jsonl, a line a run."""
    script = folder / "together.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *placement, str(script), str(folder), json.dumps(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(drmcli.__file__).parents[1])},
    )


def summaries(folder: Path, name: str) -> list[list[dict]]:
    """What each process returned of the runs in a folder."""
    return [
        [json.loads(line) for line in (folder / f"{name}-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]


def run_together(folder: Path) -> None:
    """All runs of two processes on one machine, and the same by one process."""
    broken = write_pairs(folder / "data", 12)
    (broken.parent / "3-b.png").write_bytes(b"nonsense")
    own = {"data": [str(broken)], "max_bad": 50.0, "batch_size": 8, "cache_dir": str(folder / "cache")}
    runs = {
        "copies": SMALL | {"micro_batch_size": 3},
        "split": SMALL | SHARDED,
        "split-lora": SMALL | LORA,
        "own": SMALL | own,
        "stop": SMALL | {"shard": True, "seed": 77},
    }
    together = [flags | {"out": str(folder / name)} for name, flags in runs.items()]
    process = start(
        folder, [*together, together[-1]], "--nproc_per_node", "2", "--master_port", str(free_port())
    )  # the last run is stopped and gone on with
    for name, flags in runs.items():
        flags = {k: v for k, v in flags.items() if k != "shard"} | {"out": str(folder / f"one-{name}")}
        if name == "own":
            flags["cache_dir"] = str(folder / "one-cache")
        train_reward.run(resolve("train-reward", flags=flags), Silent())
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-3000:]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """One test for all, since the processes take seconds to start: copies, split weights, a LoRA, bad pictures, a stop, checkpoints."""
    run_together(tmp_path)
    for name in ("copies", "split", "split-lora", "own"):
        same_in_one_and_two(tmp_path, name)
    bad_pictures_are_the_same_for_all(tmp_path)
    a_stop_of_one_is_a_stop_of_all_and_goes_on(tmp_path)
    checkpoints_do_not_show_the_number_of_processes(tmp_path)


def same_in_one_and_two(together: Path, name: str) -> None:
    (first,), (second,) = summaries(together, name)
    assert "stopped" not in first, first
    assert all(first[key] == value for key, value in second.items() if key != "seconds")
    one = json.loads((together / f"one-{name}" / "summary.json").read_text())
    assert first["eval_accuracy"] == one["eval_accuracy"]
    a, b = read(together / f"one-{name}" / "metrics"), read(together / name / "metrics")
    for column in ("loss", "grad_norm", "accuracy", "score_scale", "lr"):
        assert a[column].tolist() == pytest.approx(b[column].tolist(), abs=1e-5, rel=1e-3), column
    assert_close(weights(together / f"one-{name}"), weights(together / name), atol=1e-4)
    assert (together / name / "reward" / "README.md").is_file()
    log = (together / name / "log.txt").read_text()
    assert log.count("started, run") == 1, log


def bad_pictures_are_the_same_for_all(together: Path) -> None:
    for name in ("own", "one-own"):
        assert (together / name / "bad_images.txt").read_text().startswith("3-b.png: ")
    assert [rows[0]["train_pairs"] for rows in summaries(together, "own")] == [
        json.loads((together / "one-own" / "summary.json").read_text())["train_pairs"]
    ] * 2


def a_stop_of_one_is_a_stop_of_all_and_goes_on(together: Path) -> None:
    for rows in summaries(together, "stop"):
        assert "step 2 of 3 is saved" in rows[0]["stopped"]
        assert rows[1]["steps"] == 3
    assert_close(weights(together / "one-stop"), weights(together / "stop"), atol=1e-4)


def checkpoints_do_not_show_the_number_of_processes(together: Path) -> None:
    """They are whole, so another number of processes may go on."""
    step = next((together / "split" / "checkpoints").iterdir())
    kept = load_file(step / "state.safetensors")
    one = next((together / "one-split" / "checkpoints").iterdir())
    alone = load_file(one / "state.safetensors")
    assert kept.keys() == alone.keys()
    assert all(kept[name].shape == alone[name].shape for name in kept)
    assert any(name.startswith("ema.") for name in kept) and any(name.startswith("adam.") for name in kept)


def test_two_machines(tmp_path: Path) -> None:
    """One process on each of two machines with a shared file system, told of each other as every launcher tells them."""
    script = tmp_path / "together.py"
    script.write_text(SCRIPT)
    runs = json.dumps([SMALL | {"out": str(tmp_path / "two"), "steps": 2}])
    place = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(drmcli.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), runs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | place | {"RANK": str(rank), "GROUP_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = summaries(tmp_path, "two")
    assert first[0]["eval_accuracy"] == second[0]["eval_accuracy"]


@pytest.mark.parametrize(
    ("device", "error", "closed"),
    [
        ("cpu", None, True),
        ("cuda", None, True),
        ("cpu", Interrupted("stopped", hint="go on"), True),
        ("cuda", Interrupted("stopped", hint="go on"), True),
        ("cpu", InputError("no such file", hint="look"), True),
        ("cuda", InputError("no such file", hint="look"), False),
        ("cpu", KeyboardInterrupt(), True),
    ],
)
def test_the_group_of_processes_is_closed(device: str, error: BaseException | None, closed: bool) -> None:
    """A process that leaves it open may abort at its exit; on GPUs the failure of one alone must not wait for the others."""
    calls: list[str] = []
    accelerator = SimpleNamespace(device=torch.device(device), end_training=lambda: calls.append("ended"))
    try:
        with ended(accelerator):  # type: ignore[arg-type]
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert calls == ["ended"] * closed


def test_nothing_to_split_over_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one process"):
        train_reward.run(resolve("train-reward", flags=SMALL | {"out": str(tmp_path), "shard": True}), Silent())


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_other_sharding_is_refused(tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match="does not shard") as refused:
        train_reward.run(resolve("train-reward", flags=SMALL | {"out": str(tmp_path)}), Silent())
    assert "--set shard=true" in refused.value.hint
    assert not torch.distributed.is_initialized()
