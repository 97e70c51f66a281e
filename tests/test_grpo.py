"""grpo: one update's mathematics, equivalences between ways to run it, the alarm, and what it saves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from drmcli.algorithms import Prompts
from drmcli.cli import render
from drmcli.config import package_path, resolve
from drmcli.embeddings import Embeddings
from drmcli.errors import InputError, Interrupted, RunError
from drmcli.flow import Step, log_ratio
from drmcli.generator import PromptEmbeds
from drmcli.memory import SavedBytes
from drmcli.recipes import grpo
from drmcli.recipes.alignment import Alignment, assemble, read_prompts
from drmcli.recipes.launch import start_accelerator
from drmcli.results import read
from drmcli.rollout import Plan, Visit, trained
from drmcli.run import Run, Silent
from drmcli.tiny import world

TINY = {
    "updates": 4,
    "prompts_per_update": 4,
    "group_size": 3,
    "steps": 4,
    "lora_rank": 4,
    "eval_prompts": 4,
    "eval_seeds": 2,
    "eval_every": 2,
    "save_every": 1,
    "min_std": 0.0,
    "on_hacking": "ignore",
}


@pytest.fixture
def config(reward_folder: Path):
    def make(out: Path, **flags: object):
        return resolve("grpo", flags=TINY | {"out": str(out), "reward": str(reward_folder)} | flags)

    return make


def align(config) -> dict:
    return grpo.run(config, Silent())


def digest(out: Path, name: str = "lora-last") -> str:
    return hashlib.sha256((out / name / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()


def aligner(config, tmp_path: Path) -> Alignment:
    tmp_path.mkdir(exist_ok=True)
    run = Run(tmp_path, "grpo", "x", resumed=False, reporter=Silent())
    return assemble(config, start_accelerator(config, rounds=1), run)


def collect(a: Alignment):
    """What the first update draws."""
    return a.algorithm.draw(a.pick(0)[1], 0)


@pytest.mark.parametrize("algorithm", ["step-grpo", "tempflow", "flow-grpo", "nft", "nft-step", "direct"])
def test_runs_and_reports(tmp_path: Path, config, algorithm: str) -> None:
    summary = align(config(tmp_path, algorithm=algorithm, updates=2))
    assert summary["updates"] == 2
    assert 0 <= summary["judge_before"] <= 1
    assert np.isfinite(summary["reward_after"])
    rollouts = read(tmp_path / "rollouts")
    assert set(rollouts["update"]) == {1, 2}
    groups = rollouts.groupby(["update", "group", "step"])
    assert (groups.size() == 3).all()
    assert groups["advantage"].sum().abs().max() < 1e-3
    assert (groups["kept"].sum() == (1 if algorithm in ("step-grpo", "tempflow") else 3)).all()
    assert len(rollouts) == 2 * 4 * 3 * {"nft": 1, "nft-step": 2, "direct": 1}.get(algorithm, 3)
    assert rollouts["log_prob"].isna().all() == (algorithm in ("nft", "nft-step", "direct"))
    metrics = read(tmp_path / "metrics")
    assert metrics["ratio"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "curve.png").exists()
    assert len(list((tmp_path / "samples").glob("step-*/grid.png"))) == 2


def test_one_velocity_serves_all_candidates(tmp_path: Path, config) -> None:
    """Calls of the generator do not grow with k, those of the reward model do: 4 prompts, 4 steps, 3 of them trained."""
    counts = [align(config(tmp_path / str(k), group_size=k, updates=1, window=[0.0, 1.0])) for k in (2, 4)]
    assert [c["generator_calls"] for c in counts] == [16, 16]
    assert [c["reward_calls"] for c in counts] == [4 * 3 * 2, 4 * 3 * 4]


def test_the_loss_is_that_of_repeated_states(tmp_path: Path, config) -> None:
    """One state with k actions has the loss and the gradient of k copies of the state with an action each."""
    a = aligner(config(tmp_path), tmp_path / "a")
    drawn = collect(a)
    rollouts, cond = drawn.rollouts, drawn.prompts.cond
    visit = rollouts.visits[0]
    part = torch.arange(2)
    with torch.no_grad():
        for p in a.policy.trained:
            p.add_(0.02)
    shared = a.algorithm.part_loss(visit, part, cond).loss
    shared.backward()
    gradient = [p.grad.clone() for p in a.policy.trained]
    a.optimizer.zero_grad()
    k = visit.actions.shape[1]
    again = Visit(**vars(visit))
    again.states = visit.states.repeat_interleave(k, 0)
    again.owner = visit.owner.repeat_interleave(k)
    again.mean = visit.mean.repeat_interleave(k, 0)
    again.actions = visit.actions.reshape(-1, 1, *visit.actions.shape[2:])
    again.advantages = visit.advantages.reshape(-1, 1)
    repeated = a.algorithm.part_loss(again, torch.arange(2 * k), cond).loss
    repeated.backward()
    torch.testing.assert_close(shared, repeated, atol=1e-6, rtol=1e-4)
    for x, p in zip(gradient, a.policy.trained):
        torch.testing.assert_close(x, p.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("form", ["gaussian", "no-const", "guard"])
def test_the_ratio_is_one_before_an_update(tmp_path: Path, config, form: str) -> None:
    a = aligner(config(tmp_path), tmp_path / "a")
    drawn = collect(a)
    rollouts, cond = drawn.rollouts, drawn.prompts.cond
    grpo.check(a, drawn)
    for visit in rollouts.visits:
        new = a.algorithm.law(visit, torch.arange(4), cond)
        assert log_ratio(visit.actions[:, 0], new, Step(visit.mean, new.std), form=form).abs().max() < 1e-5


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path: Path, config) -> None:
    a = aligner(config(tmp_path), tmp_path / "a")
    drawn = collect(a)
    drawn.rollouts.visits[0].mean += 0.1
    with pytest.raises(RunError, match="log ratio before the first update"):
        grpo.check(a, drawn)


def test_kl_is_nothing_at_first_and_pulls_back_later(tmp_path: Path, config) -> None:
    a = aligner(config(tmp_path, kl_beta=1.0), tmp_path / "a")
    drawn = collect(a)
    rollouts, cond = drawn.rollouts, drawn.prompts.cond
    part = torch.arange(4)
    assert a.algorithm.part_loss(rollouts.visits[0], part, cond).kl.abs() < 1e-9
    with torch.no_grad():
        for p in a.policy.trained:
            p.add_(0.05)
    rollouts.visits[0].advantages.zero_()
    found = a.algorithm.part_loss(rollouts.visits[0], part, cond)
    found.loss.backward()
    assert found.kl > 0
    assert max(p.grad.abs().max() for p in a.policy.trained) > 0


def test_micro_batches_change_nothing(tmp_path: Path, config) -> None:
    a, b = (align(config(tmp_path / str(n), micro_batch_size=n, updates=1)) for n in (1, 16))
    x, y = (load_file(Path(s["lora_last"]) / "pytorch_lora_weights.safetensors") for s in (a, b))
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-4, rtol=0)


SEVERAL = """
import json, os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from drmcli.config import resolve
from drmcli.errors import Interrupted
from drmcli.recipes import grpo
from drmcli.run import Silent

torch.set_num_threads(1)
rank, interrupted = int(os.environ["RANK"]), Path(sys.argv[1]) / "stop"
learn = grpo.learn

def signalled(a, drawn, update):
    assert torch.distributed.get_world_size() == a.accelerator.num_processes == 2
    if rank == 1 and Path(a.config.out) == interrupted and update == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return learn(a, drawn, update)

grpo.learn = signalled
runs, end = json.loads(sys.argv[2]), Accelerator.end_training
for flags in runs:
    # It closes the process group, which the next run needs.
    Accelerator.end_training = end if flags is runs[-1] else lambda self: None
    try:
        done = grpo.run(resolve("grpo", flags=flags), Silent())
    except Interrupted as stop:
        done = {"interrupted": str(stop), "updates": None}
    (Path(sys.argv[1]) / f"{Path(flags['out']).name}-{rank}.json").write_text(json.dumps(done))
assert not torch.distributed.is_initialized()
"""


def in_two_processes(folder: Path, runs: list[dict], **variables: str) -> subprocess.CompletedProcess:
    """Runs of grpo, one after the other, by two real processes; each process leaves NAME-RANK.json."""
    script = folder / "several.py"
    script.write_text(SEVERAL)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    environment = os.environ | variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(grpo.__file__).parents[2])}
    return subprocess.run(
        [*command, str(script), str(folder), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def same_weights(one: Path, other: Path) -> None:
    x, y = (load_file(out / "lora-last" / "pytorch_lora_weights.safetensors") for out in (one, other))
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-4, rtol=0)


def test_two_processes_are_one(tmp_path: Path, config, reward_folder: Path) -> None:
    """The same weights, tables and figures; and when one process is told to stop, both do, with a checkpoint."""
    flags = TINY | {"updates": 1, "eval_prompts": 3, "reward_draws": 2, "reward": str(reward_folder)}
    one = align(resolve("grpo", flags=flags | {"out": str(tmp_path / "one")}))
    two, stop = (flags | {"out": str(tmp_path / name), "device": "cpu"} for name in ("two", "stop"))
    stop |= {"updates": 3, "eval_every": 0, "save_every": 0}
    others = [
        {"algorithm": "nft-step", "nft_levels": 2, "eval_every": 0},
        {"algorithm": "direct", "direct_steps": 2, "kl_beta": 0.1, "eval_every": 0},
        # No learning of the policy: AdamW's second update would magnify rounding.
        {"algorithm": "tempflow", "updates": 2, "lr": 0.0, "eval_every": 0, "refresh_every": 1, "refresh_by": "shapes",
         "refresh_prompts": 4, "refresh_samples": 2, "refresh_steps": 3},
    ]  # fmt: skip
    others = [two | more | {"out": str(tmp_path / f"two-{more['algorithm']}")} for more in others]
    done = in_two_processes(tmp_path, [stop, two, *others])
    assert done.returncode == 0, done.stderr[done.stderr.find("Traceback") :][:3000]
    both = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    first, second = ([row | {"seconds": 0} for row in summary["history"]] for summary in both)
    assert first == second
    for name in ("reward_before", "reward_after", "judge_before", "judge_after", "diversity_before"):
        assert both[0][name] == pytest.approx(one[name], abs=2e-3), name
    for name in ("generator_calls", "reward_calls", "updates"):
        assert both[0][name] == one[name], name
    same_weights(tmp_path / "one", tmp_path / "two")
    for more in others:
        name = more["algorithm"]
        align(resolve("grpo", flags=more | {"out": str(tmp_path / name)}))
        same_weights(tmp_path / name, tmp_path / f"two-{name}")
    x, y = (load_file(tmp_path / name / "reward" / "model.safetensors") for name in ("tempflow", "two-tempflow"))
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-4, rtol=0)
    for table in ("metrics", "rollouts", "evals"):
        a, b = (read(tmp_path / name / table) for name in ("one", "two"))
        a, b = (t.drop(columns="seconds", errors="ignore") for t in (a, b))
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two" / "log.txt").read_text().count("update 0:") == 1
    for rank in (0, 1):
        assert "update 2 of 3 is saved" in json.loads((tmp_path / f"stop-{rank}.json").read_text())["interrupted"]
    assert [p.name for p in (tmp_path / "stop" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_is_refused(tmp_path: Path, config, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match="does not shard"):
        align(config(tmp_path))


def test_fp16_is_refused(tmp_path: Path, config) -> None:
    with pytest.raises(InputError, match="--dtype fp16"):
        align(config(tmp_path / "a", dtype="fp16"))


def test_rounding_beyond_the_clip_range_is_said(tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Silent, "warn", lambda self, text: said.append(text))
    a = aligner(config(tmp_path, clip_range=1e-9), tmp_path / "a")
    drawn = collect(a)
    grpo.check(a, drawn)
    assert not said
    visit = drawn.rollouts.visits[0]
    visit.mean += 1e-5 * visit.std
    grpo.check(a, drawn)
    assert any("rounding alone moves the log ratio" in text for text in said), said


class InterruptAfter(Silent):
    def __init__(self, update: int):
        self.update = update

    def progress(self, task: str, done: int, total: int, **fields: object) -> None:
        if task == "align" and done == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ema_decay": 0.5, "warmup_updates": 2, "kl_beta": 0.1},
        {"algorithm": "nft-step", "old_decay_rate": 0.3, "nft_levels": 2},
        {"algorithm": "direct", "direct_form": "refl", "reward_draws": 2},
        {"refresh_every": 2, "refresh_by": "shapes", "refresh_prompts": 2, "refresh_samples": 2, "refresh_steps": 3},
    ],
    ids=["plain", "averaged", "nft-step", "direct", "refreshed"],
)
def test_resumed_is_unbroken_bit_for_bit(tmp_path: Path, config, extra: dict) -> None:
    whole = align(config(tmp_path / "whole", **extra))
    for update in (1, 3):
        with pytest.raises(Interrupted):
            grpo.run(config(tmp_path / "parts", **extra), InterruptAfter(update))
    parts = align(config(tmp_path / "parts", **extra))
    for name in ("lora", "lora-last"):
        assert digest(tmp_path / "parts", name) == digest(tmp_path / "whole", name)
    assert parts["reward_after"] == whole["reward_after"]
    for table in ("metrics", "rollouts", "evals"):
        a, b = read(tmp_path / "whole" / table), read(tmp_path / "parts" / table)
        assert a.drop(columns="seconds", errors="ignore").equals(b.drop(columns="seconds", errors="ignore"))


def test_plain_diffusers_draws_what_the_run_evaluated(
    tmp_path: Path, config, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a script that never imports drmcli: LoRA alpha is 2 x rank and comes back with the file."""
    seen: list[torch.Tensor] = []
    draw = grpo.sample

    def seeing(*args, **options):
        found = draw(*args, **options)
        seen.append(found.latents)
        return found

    monkeypatch.setattr(grpo, "sample", seeing)
    summary = align(config(tmp_path, updates=3, lr=0.01, eval_every=3, lora_alpha=8))
    assert summary["best_update"] in (0, 3)
    after, before = (
        seen[-2][:2],
        seen[-1][:2],
    )  # test prompts: the best policy, then the one before training; seeds 0 and 1
    np.save(tmp_path / "drawn.npy", torch.stack([before, after]).numpy())
    code = f"""
import numpy as np, torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(generator_folder)!r}, text_encoder_3=None, tokenizer_3=None)
def draw(seed):
    rng = torch.Generator().manual_seed(seed)
    options = dict(num_inference_steps=4, guidance_scale=1.0, max_sequence_length=1, generator=rng, output_type="latent")
    return pipe({next(iter(world.captions("test")))!r}, **options).images[0]
drawn = torch.from_numpy(np.load({str(tmp_path / "drawn.npy")!r}))
before = torch.stack([draw(0), draw(1)])
pipe.load_lora_weights({summary["lora"]!r})
after = torch.stack([draw(0), draw(1)])
print((before - drawn[0]).abs().max().item(), (after - drawn[1]).abs().max().item(), (after - before).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second, changed = map(float, done.stdout.split()[-3:])
    assert first < 1e-5 and second < 1e-5, done.stderr[-1000:]
    assert changed > 1e-2 or summary["best_update"] == 0


def test_the_alarm_stops_and_keeps_the_best(tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward 0, 1, 2, 3 by evaluation, judge 0.5, 0.7, 0.3: fooled at the third, and lora/ is the second."""
    points = iter([(0.0, 0.5), (1.0, 0.7), (2.0, 0.3), (9.0, 9.0)])
    look = grpo.look

    def fake(a: Alignment, split: str) -> grpo.Evaluation:
        found = look(a, split)
        if split == "val":
            reward, judged = next(points)
            noise = np.linspace(-0.01, 0.01, len(found.reward))
            found.reward, found.judge = reward + noise, judged + noise
        return found

    monkeypatch.setattr(grpo, "look", fake)
    summary = align(config(tmp_path, updates=8, on_hacking="stop"))
    assert summary["updates"] == 4
    assert summary["best_update"] == 2
    assert "being fooled" in summary["stopped"]
    assert digest(tmp_path, "lora") != digest(tmp_path, "lora-last")


def test_conditioning_does_not_depend_on_what_was_asked_before(tmp_path: Path, config) -> None:
    """Bit for bit: a resumed run asks for other prompts first than the unbroken one did."""
    one, other = (aligner(config(tmp_path), tmp_path / name) for name in ("a", "b"))
    texts = one.prompts["train"][:20]
    whole, _ = one.cond(texts)
    for i in (3, 17):
        assert torch.equal(whole.prompt_embeds[i : i + 1], other.cond([texts[i]])[0].prompt_embeds)


def test_a_damaged_checkpoint_costs_a_few_updates(tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = align(config(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        grpo.run(config(tmp_path / "parts"), InterruptAfter(3))
    (tmp_path / "parts" / "checkpoints" / "step-000003" / "state.safetensors").write_bytes(b"half")
    said: list[str] = []
    monkeypatch.setattr(Silent, "warn", lambda self, text: said.append(text))
    parts = align(config(tmp_path / "parts"))
    assert "step-000003 is damaged" in said[0]
    assert parts["reward_after"] == whole["reward_after"]
    assert len(read(tmp_path / "parts" / "rollouts")) == len(read(tmp_path / "whole" / "rollouts"))


def test_embeddings_are_kept_on_the_cpu_and_not_for_ever() -> None:
    asked: list[str] = []

    def encode(text: str) -> list[PromptEmbeds]:
        asked.append(text)
        one = PromptEmbeds(prompt_embeds=torch.full((1, 2, 3), float(len(asked))))
        return [one, one]

    kept = Embeddings(encode, torch.device("cpu"), room=2)
    own, other = kept(["a", "b", "a", "c"])
    assert own.prompt_embeds[:, 0, 0].tolist() == [1, 2, 1, 3]
    assert torch.equal(own.prompt_embeds, other.prompt_embeds)
    assert asked == ["a", "b", "c"]
    assert list(kept.kept) == ["b", "c"]
    kept(["c", "a"])
    assert asked == ["a", "b", "c", "a"]
    assert all(one is other for one, other in kept.kept.values())  # models of one base share theirs


def test_one_prompt_and_one_picture(tmp_path: Path, config, capsys: pytest.CaptureFixture[str]) -> None:
    """No interval and no diversity: null, a dash in the table and in the card, and the run ends well."""
    summary = align(config(tmp_path, updates=1, eval_prompts=1, eval_seeds=1, on_hacking="stop", prompts_per_update=1))
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary, allow_nan=False))
    assert summary["reward_gain_ci95"] == [None, None]
    assert summary["diversity_after"] is None
    render.grpo(summary)
    assert re.search(r"diversity +- +-", capsys.readouterr().out)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert re.search(r"\| reward \| -?\d+\.\d{3} \| -?\d+\.\d{3} \| - \|", card)
    assert 'from_pretrained(package_path("{package}/tiny/weights/generator"))' in card


@pytest.mark.parametrize(("form", "steps", "expected"), [("draft", 1, 1), ("draft", 3, 3), ("refl", 1, 1)])
def test_the_gradient_of_direct_goes_through_the_last_steps(
    tmp_path: Path, config, form: str, steps: int, expected: int
) -> None:
    """The loss is minus the reward of what is drawn; as many steps carry a gradient as are asked for; its sample is the plain one."""
    flags = {"algorithm": "direct", "direct_form": form, "direct_steps": steps, "kl_beta": 0.5}
    a = aligner(config(tmp_path, **flags), tmp_path / "a")
    drawn = collect(a)
    cond = drawn.prompts.cond[torch.zeros(1, dtype=torch.long)]
    x, states = a.algorithm._sample(drawn, drawn.noise[0, :1], cond)
    assert len(states) == expected
    part = next(iter(a.algorithm.parts(drawn)))
    part.loss.loss.backward()
    assert part.loss.kl.abs() < 1e-9
    assert max(float(p.grad.abs().max()) for p in a.policy.trained if p.grad is not None) > 0
    assert all(p.grad is None for model in a.rewards.models for p in model.parameters())
    if form == "draft":
        plain = grpo.sample(
            a.policy.generator, None, cond, None, [0], grpo.Search(num_inference_steps=4), shape=a.shape
        )
        assert x.shape == plain.latents.shape


def test_direct_refuses_rewards_of_pictures(tmp_path: Path, config) -> None:
    with pytest.raises(InputError, match="has no gradient"):
        aligner(config(tmp_path, algorithm="direct", add_rewards=["shapes"]), tmp_path / "a")


def test_old_policy_of_nft_follows(tmp_path: Path, config) -> None:
    """After update i it keeps min(rate i, limit) of itself: 0, 0.3, 0.5."""
    a = aligner(config(tmp_path, algorithm="nft", old_decay_rate=0.3), tmp_path / "a")
    first = a.policy.trained[0].detach().clone()
    for update, share in enumerate((0.0, 0.3, 0.5)):
        before = a.policy.old[0].clone()
        grpo.learn(a, a.algorithm.draw(a.pick(update)[1], update), update)
        now = a.policy.trained[0].detach()
        torch.testing.assert_close(a.policy.old[0], share * before + (1 - share) * now)
    with a.policy.drawing_policy():
        assert torch.equal(a.policy.trained[0], a.policy.old[0])
    assert torch.equal(a.policy.trained[0], now)
    assert not torch.equal(now, first)


def test_time_is_up(tmp_path: Path, config) -> None:
    assert align(config(tmp_path, updates=500, max_time=0.02, eval_every=0, save_every=0))["updates"] < 500


def test_windows() -> None:
    """A step is trained when it starts within the window, and never when it ends at 0."""
    sigmas = torch.tensor([1.0, 0.6, 0.2, 0.0])
    assert [trained(Plan(window=(0.0, 1.0)), sigmas, i) for i in range(3)] == [True, True, False]
    assert [trained(Plan(window=(0.5, 0.9)), sigmas, i) for i in range(3)] == [False, True, False]


def test_prompts_are_disjoint(tmp_path: Path, config) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(world.captions("train")[:30]) + "\n")
    split = read_prompts(config(tmp_path, prompts=str(file)))
    assert {k: len(v) for k, v in split.items()} == {"train": 24, "val": 3, "test": 3}
    assert len({t for texts in split.values() for t in texts}) == 30
    file.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="2 prompts"):
        read_prompts(config(tmp_path, prompts=str(file)))


def test_an_empty_window_is_refused(tmp_path: Path, config) -> None:
    with pytest.raises(InputError, match="holds none"):
        align(config(tmp_path, window=[0.001, 0.002]))


def test_sample_takes_the_lora(tmp_path: Path, config, drm) -> None:
    summary = align(config(tmp_path / "run", updates=2, lr=0.01))
    flags = ["sample", "a large red circle on the left", "--steps", "3", "--reward", "none"]
    plain = drm(*flags, "--out", tmp_path / "a", "--json")
    aligned = drm(*flags, "--out", tmp_path / "b", "--json", "--lora", summary["lora_last"])
    assert aligned.code == 0, aligned.err
    pictures = [Path(r.json["images"][0]["path"]).read_bytes() for r in (plain, aligned)]
    assert pictures[0] != pictures[1]


def reward_of(a: Alignment, x: torch.Tensor, sigma: float, texts: list[str]) -> torch.Tensor:
    prompts = Prompts(texts, [0] * len(texts), *a.cond(texts))
    return a.reward(x, sigma, prompts, torch.arange(len(texts)))


def brightness(images: list, prompts: list[str]) -> list[float]:
    """A reward of pictures, named as test_grpo:brightness."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def test_a_callable_and_a_second_model_are_added_by_their_weights(
    tmp_path: Path, config, reward_folder: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    alone = aligner(config(tmp_path), tmp_path / "a")
    more = [f"{reward_folder}=0.5", "test_grpo:brightness=10"]
    summed = aligner(config(tmp_path, add_rewards=more), tmp_path / "b")
    texts = alone.prompts["val"][:3]
    assert len(summed.cond(texts)[1]) == 2
    x = torch.randn(3, *summed.shape, generator=torch.Generator().manual_seed(0))
    single = reward_of(alone, x, 0.0, texts)
    bright = torch.tensor(brightness(summed.policy.generator.decode(x), texts))
    torch.testing.assert_close(reward_of(summed, x, 0.0, texts), 1.5 * single + 10 * bright)
    # At a noise level the picture is the one that the policy predicts, for a velocity a state.
    before = summed.reward.generator_calls
    reward_of(summed, x, 0.5, texts)
    assert summed.reward.generator_calls == before + 3


def test_spread_and_ceiling(tmp_path: Path, config, reward_folder: Path) -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = aligner(config(tmp_path), tmp_path / "a")
    texts = plain.prompts["val"][:3]
    one = reward_of(plain, x, 0.5, texts)
    # Two equal models have no spread; their sum is twice the one.
    twins = aligner(config(tmp_path, add_rewards=[str(reward_folder)], spread_penalty=3.0), tmp_path / "b")
    torch.testing.assert_close(reward_of(twins, x, 0.5, texts), 2 * one)
    drawn = [aligner(config(tmp_path, reward_draws=4, spread_penalty=p), tmp_path / f"d{p}") for p in (0.0, 1.0)]
    free, held = (reward_of(a, x, 0.5, texts) for a in drawn)
    assert (held < free).all()
    capped = aligner(config(tmp_path, reward_ceiling=float(one.median())), tmp_path / "c")
    torch.testing.assert_close(reward_of(capped, x, 0.5, texts), one.clamp(max=float(one.median())))
    with pytest.raises(InputError, match="has no spread"):
        aligner(config(tmp_path, spread_penalty=1.0), tmp_path / "e")


@pytest.mark.parametrize(
    "extra",
    [{}, {"algorithm": "nft", "ema_decay": 0.5}, {"algorithm": "direct", "direct_steps": 2, "ema_decay": 0.5}],
    ids=["step-grpo", "nft", "direct"],
)
def test_full_fine_tuning_saves_a_pipeline_of_its_own(tmp_path: Path, config, extra: dict) -> None:
    flags = {"train": "full", "lr": 1e-4, "kl_beta": 0.1, "updates": 3, "eval_every": 3} | extra
    summary = align(config(tmp_path / "whole", **flags))
    assert summary["lora"] is None
    assert (tmp_path / "whole" / "generator" / "model_index.json").exists()
    weights = load_file(tmp_path / "whole" / "generator-last" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = Path(package_path(resolve("grpo").generator))
    start = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = max(float((weights[k].float() - start[k].float()).abs().max()) for k in start)
    assert 0 < moved < 0.1
    metrics = read(tmp_path / "whole" / "metrics")
    assert metrics["kl"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert metrics["kl"].iloc[-1] > 0


def test_ends_at_the_target(tmp_path: Path, config) -> None:
    summary = align(config(tmp_path, target=0.1))
    assert summary["updates"] == 0
    assert "target" in summary["stopped"]


def test_unknown_lora_targets(tmp_path: Path, config) -> None:
    with pytest.raises(InputError, match="lora_targets"):
        aligner(config(tmp_path, lora_targets=["no_such_layer"]), tmp_path / "a")


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_plan_is_what_an_update_uses(tmp_path: Path, config, train: str, checkpointed: bool) -> None:
    """The plan of the policy and the frozen models beside it, against the bytes of real tensors."""
    c = config(tmp_path, train=train, gradient_checkpointing=checkpointed, micro_batch_size=4)
    memory = grpo.plan(c)["memory"]
    a = aligner(c, tmp_path / "a")
    drawn = collect(a)
    rollouts, cond = drawn.rollouts, drawn.prompts.cond
    with SavedBytes(a.policy.generator.transformer) as kept:
        loss = a.algorithm.part_loss(rollouts.visits[0], torch.arange(4), cond).loss
    loss.backward()
    a.optimizer.step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    policy = a.policy.generator.transformer
    grads = size(p.grad for p in a.policy.trained if p.grad is not None)
    moments = size(t for s in a.optimizer.state.values() for t in s.values())
    average = size(a.policy.ema.shadow_params) if a.policy.ema is not None else 0
    used = size(policy.parameters()) + size(policy.buffers()) + grads + moments + average + kept.total
    planned = memory["total_checkpointed" if checkpointed else "total"] - sum(memory["beside"].values())
    blocks = len(policy.transformer_blocks)
    again = memory["activations"] // blocks if checkpointed else 0  # one block lives again while it is recomputed
    assert planned == pytest.approx(used + again, rel=0.2)
    real = {
        "vae": a.policy.generator.pipe.vae,
        "text_encoder": a.policy.generator.pipe.text_encoder,
        "reward model": a.rewards.models[0],
    }
    for name, model in real.items():
        assert memory["beside"][name] == pytest.approx(size((*model.parameters(), *model.buffers())), rel=0.02)
