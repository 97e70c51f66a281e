"""grpo: one update's mathematics, equivalences between ways to run it, the alarm, and what it saves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drmcli.config import package_path, resolve
from drmcli.errors import InputError, Interrupted, RunError
from drmcli.flow import Step, log_ratio
from drmcli.memory import SavedBytes
from drmcli.recipes import grpo
from drmcli.results import read
from drmcli.rollout import Plan, trained
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


def aligner(config, tmp_path: Path) -> grpo.Aligner:
    from drmcli.recipes.train_reward import start_accelerator

    tmp_path.mkdir(exist_ok=True)
    return grpo.Aligner(
        config, start_accelerator(config, rounds=1), Run(tmp_path, "grpo", "x", resumed=False, reporter=Silent())
    )


@pytest.mark.parametrize("algorithm", ["step-grpo", "tempflow", "flow-grpo"])
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
    assert (groups["kept"].sum() == (3 if algorithm == "flow-grpo" else 1)).all()
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
    rollouts, _, cond = a.collect()
    visit = rollouts.visits[0]
    part = torch.arange(2)
    with torch.no_grad():
        for p in a.trained:
            p.add_(0.02)
    shared, _ = a.part_loss(visit, part, cond)
    shared.backward()
    gradient = [p.grad.clone() for p in a.trained]
    a.optimizer.zero_grad()
    k = visit.actions.shape[1]
    again = grpo.Visit(**vars(visit))
    again.states = visit.states.repeat_interleave(k, 0)
    again.owner = visit.owner.repeat_interleave(k)
    again.mean = visit.mean.repeat_interleave(k, 0)
    again.actions = visit.actions.reshape(-1, 1, *visit.actions.shape[2:])
    again.advantages = visit.advantages.reshape(-1, 1)
    repeated, _ = a.part_loss(again, torch.arange(2 * k), cond)
    repeated.backward()
    torch.testing.assert_close(shared, repeated, atol=1e-6, rtol=1e-4)
    for x, p in zip(gradient, a.trained):
        torch.testing.assert_close(x, p.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("form", ["gaussian", "no-const", "guard"])
def test_the_ratio_is_one_before_an_update(tmp_path: Path, config, form: str) -> None:
    a = aligner(config(tmp_path), tmp_path / "a")
    rollouts, _, cond = a.collect()
    a.check(rollouts, cond)
    for visit in rollouts.visits:
        new = a._law(visit, torch.arange(4), cond)
        assert log_ratio(visit.actions[:, 0], new, Step(visit.mean, new.std), form=form).abs().max() < 1e-5


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path: Path, config) -> None:
    a = aligner(config(tmp_path), tmp_path / "a")
    rollouts, _, cond = a.collect()
    rollouts.visits[0].mean += 0.1
    with pytest.raises(RunError, match="log ratio before the first update"):
        a.check(rollouts, cond)


def test_kl_is_nothing_at_first_and_pulls_back_later(tmp_path: Path, config) -> None:
    a = aligner(config(tmp_path, kl_beta=1.0), tmp_path / "a")
    rollouts, _, cond = a.collect()
    part = torch.arange(4)
    assert a.part_loss(rollouts.visits[0], part, cond)[1][2].abs() < 1e-9
    with torch.no_grad():
        for p in a.trained:
            p.add_(0.05)
    rollouts.visits[0].advantages.zero_()
    loss, shown = a.part_loss(rollouts.visits[0], part, cond)
    loss.backward()
    assert shown[2] > 0
    assert max(p.grad.abs().max() for p in a.trained) > 0


def test_micro_batches_change_nothing(tmp_path: Path, config) -> None:
    a, b = (align(config(tmp_path / str(n), micro_batch_size=n, updates=1)) for n in (1, 16))
    x, y = (load_file(Path(s["lora_last"]) / "pytorch_lora_weights.safetensors") for s in (a, b))
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-4, rtol=0)


def test_two_processes_are_one(tmp_path: Path, config, reward_folder: Path) -> None:
    one = align(config(tmp_path / "one", updates=1))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "drmcli", "grpo"]
    command += ["--out", str(tmp_path / "two"), "--device", "cpu", "--quiet", "--reward", str(reward_folder)]
    for key, value in (TINY | {"updates": 1}).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    x = load_file(Path(one["lora_last"]) / "pytorch_lora_weights.safetensors")
    y = load_file(tmp_path / "two" / "lora-last" / "pytorch_lora_weights.safetensors")
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-4, rtol=0)


class InterruptAfter(Silent):
    def __init__(self, update: int):
        self.update = update

    def progress(self, task: str, done: int, total: int, **fields: object) -> None:
        if task == "align" and done == self.update:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.5, "warmup_updates": 2, "kl_beta": 0.1}])
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


def test_the_lora_changes_the_picture_of_plain_diffusers(tmp_path: Path, config, generator_folder: Path) -> None:
    """In a script that never imports drmcli."""
    summary = align(config(tmp_path, updates=3, lr=0.01))
    code = f"""
import torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(generator_folder)!r}, text_encoder_3=None, tokenizer_3=None)
def draw():
    rng = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=4, guidance_scale=1.0, max_sequence_length=1, generator=rng, output_type="latent")
    return pipe("a large red circle on the left", **options).images
before = draw()
pipe.load_lora_weights({summary["lora_last"]!r})
print((draw() - before).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) > 1e-2, done.stderr[-1000:]


def test_the_alarm_stops_and_keeps_the_best(tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward 0, 1, 2, 3 by evaluation, judge 0.5, 0.7, 0.3: fooled at the third, and lora/ is the second."""
    points = iter([(0.0, 0.5), (1.0, 0.7), (2.0, 0.3), (9.0, 9.0)])
    evaluate = grpo.Aligner.evaluate

    def fake(self: grpo.Aligner, split: str) -> grpo.Evaluation:
        found = evaluate(self, split)
        if split == "val":
            reward, judged = next(points)
            noise = np.linspace(-0.01, 0.01, len(found.reward))
            found.reward, found.judge = reward + noise, judged + noise
        return found

    monkeypatch.setattr(grpo.Aligner, "evaluate", fake)
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
    split = grpo.read_prompts(config(tmp_path, prompts=str(file)))
    assert {k: len(v) for k, v in split.items()} == {"train": 24, "val": 3, "test": 3}
    assert len({t for texts in split.values() for t in texts}) == 30
    file.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="2 prompts"):
        grpo.read_prompts(config(tmp_path, prompts=str(file)))


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
    cond, conds = summed.cond(texts)
    assert len(conds) == 2
    x = torch.randn(3, *summed.shape, generator=torch.Generator().manual_seed(0))
    single = alone.reward_of(x, 0.0, *alone.cond(texts), texts)
    bright = torch.tensor(brightness(summed.generator.decode(x), texts))
    torch.testing.assert_close(summed.reward_of(x, 0.0, cond, conds, texts), 1.5 * single + 10 * bright)
    # At a noise level the picture is the one that the policy predicts, for a velocity a state.
    before = summed.calls[0]
    summed.reward_of(x, 0.5, cond, conds, texts)
    assert summed.calls[0] == before + 3


def test_spread_and_ceiling(tmp_path: Path, config, reward_folder: Path) -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = aligner(config(tmp_path), tmp_path / "a")
    texts = plain.prompts["val"][:3]
    one = plain.reward_of(x, 0.5, *plain.cond(texts), texts)
    # Two equal models have no spread; their sum is twice the one.
    twins = aligner(config(tmp_path, add_rewards=[str(reward_folder)], spread_penalty=3.0), tmp_path / "b")
    torch.testing.assert_close(twins.reward_of(x, 0.5, *twins.cond(texts), texts), 2 * one)
    drawn = [aligner(config(tmp_path, reward_draws=4, spread_penalty=p), tmp_path / f"d{p}") for p in (0.0, 1.0)]
    free, held = (a.reward_of(x, 0.5, *a.cond(texts), texts) for a in drawn)
    assert (held < free).all()
    capped = aligner(config(tmp_path, reward_ceiling=float(one.median())), tmp_path / "c")
    torch.testing.assert_close(capped.reward_of(x, 0.5, *capped.cond(texts), texts), one.clamp(max=float(one.median())))
    with pytest.raises(InputError, match="has no spread"):
        aligner(config(tmp_path, spread_penalty=1.0), tmp_path / "e")


def test_full_fine_tuning_saves_a_pipeline_of_its_own(tmp_path: Path, config) -> None:
    flags = {"train": "full", "lr": 1e-4, "kl_beta": 0.1, "updates": 3, "eval_every": 3}
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
    rollouts, _, cond = a.collect()
    with SavedBytes(a.generator.transformer) as kept:
        loss, _ = a.part_loss(rollouts.visits[0], torch.arange(4), cond)
    loss.backward()
    a.optimizer.step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    policy = a.generator.transformer
    grads = size(p.grad for p in a.trained if p.grad is not None)
    moments = size(t for s in a.optimizer.state.values() for t in s.values())
    average = size(a.ema.shadow_params) if a.ema is not None else 0
    used = size(policy.parameters()) + size(policy.buffers()) + grads + moments + average + kept.total
    planned = memory["total_checkpointed" if checkpointed else "total"] - sum(memory["beside"].values())
    blocks = len(policy.transformer_blocks)
    again = memory["activations"] // blocks if checkpointed else 0  # one block lives again while it is recomputed
    assert planned == pytest.approx(used + again, rel=0.2)
    real = {
        "vae": a.generator.pipe.vae,
        "text_encoder": a.generator.pipe.text_encoder,
        "reward model": a.rewards.models[0],
    }
    for name, model in real.items():
        assert memory["beside"][name] == pytest.approx(size(model.parameters()), rel=0.02)
