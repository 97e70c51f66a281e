"""Sampling and search: equivalences between modes, with diffusers, and between runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.errors import InputError, RunError
from drmcli.generator import Generator
from drmcli.recipes.sample import picture_text
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.run import Interruptions
from drmcli.sampling import Search, resample, sample
from drmcli.tiny import world

PROMPTS = list(world.captions("test"))[:3]
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> Generator:
    return Generator.load(str(generator_folder), max_sequence_length=1)


@pytest.fixture(scope="module")
def reward(reward_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(reward_folder)


def draw(generator: Generator, reward: RewardModel | None, seeds=(0, 1, 2), prompts=None, **search: object):
    prompts = prompts or PROMPTS[: len(seeds)]
    cond = generator.encode_prompts(prompts)
    negative = generator.encode_prompts([""]) if search.get("guidance_scale", 1.0) > 1 else None
    options = Search(**({"num_inference_steps": 5} | search))  # type: ignore[arg-type]
    return sample(generator, reward, cond, cond, list(seeds), options, negative=negative, shape=SHAPE)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("mode", ["plain", "stepwise"])
def test_noise_level_zero_is_the_diffusers_pipeline(
    generator: Generator, reward: RewardModel, mode: str, guidance: float
) -> None:
    ours = draw(generator, reward, mode=mode, beams=1, noise_level=0.0, step_rule="cps", guidance_scale=guidance)
    theirs = generator.pipe(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=guidance,
        max_sequence_length=1,
        generator=[torch.Generator().manual_seed(s) for s in (0, 1, 2)],
        output_type="latent",
    ).images
    vae = generator.pipe.vae.config
    torch.testing.assert_close(ours.latents, theirs, atol=1e-4, rtol=0)
    assert vae.scaling_factor


def test_a_shift_with_the_resolution_is_the_pipelines(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens of the picture, at its own size and at another."""
    scheduler = type(generator.pipe.scheduler).from_config(generator.pipe.scheduler.config, use_dynamic_shifting=True)
    monkeypatch.setattr(generator.pipe, "scheduler", scheduler)
    levels = set()
    for height, width in ((32, 32), (16, 24)):
        shape = generator.latent_shape(height, width)
        theirs = generator.pipe(
            PROMPTS[0], height=height, width=width, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=1,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        options = Search(num_inference_steps=4, step_rule="ode")
        ours = sample(generator, None, generator.encode_prompts(PROMPTS[:1]), None, [0], options, shape=shape)
        torch.testing.assert_close(ours.latents, theirs, atol=1e-4, rtol=0)
        levels.add(float(generator.sigmas(4, shape[1:])[1]))
    assert len(levels) == 2


def test_sigmas_are_the_schedulers(generator: Generator) -> None:
    generator.pipe.scheduler.set_timesteps(7)
    assert torch.equal(generator.sigmas(7), generator.pipe.scheduler.sigmas)


@pytest.mark.parametrize("mode", ["plain", "best-of-n", "stepwise", "beam", "halving", "smc"])
def test_a_picture_does_not_depend_on_its_batch(generator: Generator, reward: RewardModel, mode: str) -> None:
    search = {
        "mode": mode,
        "beams": 4,
        "starts": 4 if mode != "beam" else 2,
        "keep": 2,
        "max_batch": 5,
        "temperature": 0.01,
    }
    whole = draw(generator, reward, **search)
    for i in range(3):
        alone = draw(generator, reward, seeds=[i], prompts=[PROMPTS[i]], **search)
        torch.testing.assert_close(whole.latents[i : i + 1], alone.latents, atol=1e-3, rtol=0)
    assert torch.isfinite(whole.score).all()


def test_one_candidate_is_plain_sampling(generator: Generator, reward: RewardModel) -> None:
    a = draw(generator, reward, mode="stepwise", beams=1, step_rule="cps", noise_level=0.7)
    b = draw(generator, reward, mode="plain", step_rule="cps", noise_level=0.7)
    assert torch.equal(a.latents, b.latents)
    assert a.candidates == []


def test_the_best_candidate_is_kept(generator: Generator, reward: RewardModel) -> None:
    out = draw(generator, reward, mode="stepwise", beams=4)
    assert len(out.candidates) == 4, "five steps, the last without noise"
    for step in out.candidates:
        assert step.score.shape == (3, 4)
        assert torch.equal(step.kept.int().argmax(1), step.score.argmax(1))
        assert (step.kept.sum(1) == 1).all()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("mode", ["stepwise", "beam"])
def test_shared_blocks_change_the_cost_alone(
    generator: Generator, generator_folder: Path, mode: str, guidance: float
) -> None:
    """A frozen reward model of 4 of 6 blocks: the kept candidate's velocity needs the other 2."""
    frozen = RewardModel.from_generator(
        str(generator_folder), backbone="frozen", drop_layers=2, head_width=8, seed=1
    ).eval()
    flags = {"mode": mode, "beams": 3, "keep": 2, "guidance_scale": guidance, "max_batch": 5}
    apart = draw(generator, frozen, **flags)
    shared = draw(generator, frozen, **flags, share=True)
    torch.testing.assert_close(shared.latents, apart.latents, atol=1e-4, rtol=0)
    for a, b in zip(shared.candidates, apart.candidates, strict=True):
        assert torch.equal(a.kept, b.kept)
    n = 3 * (2 if mode == "beam" else 1)
    assert shared.calls.shared == 4 * n
    assert shared.calls.generator == apart.calls.generator - 4 * n
    assert shared.calls.cost(4 / 6) == pytest.approx(apart.calls.cost(4 / 6) - 4 * n * 4 / 6)


def test_calls_are_counted(generator: Generator, reward: RewardModel) -> None:
    """Three pictures, five steps. Candidates share one velocity, so step-wise search costs no generator call more."""
    plain = draw(generator, reward)
    assert (plain.calls.generator, plain.calls.reward) == (15, 3)
    guided = draw(generator, reward, guidance_scale=2.0)
    assert guided.calls.generator == 30
    stepwise = draw(generator, reward, mode="stepwise", beams=4)
    assert (stepwise.calls.generator, stepwise.calls.reward) == (15, 3 * 4 * 4 + 3)
    several = draw(generator, reward, mode="best-of-n", starts=4)
    assert (several.calls.generator, several.calls.reward) == (60, 12)
    window = draw(generator, reward, mode="stepwise", beams=4, branch_steps=(0, 1))
    assert window.calls.reward == 3 * 4 * 2 + 3
    early = draw(generator, reward, mode="stepwise", beams=4, branch_sigmas=(0.9, 1.0))
    assert [c.step for c in early.candidates] == [s for s in range(5) if generator.sigmas(5)[s] >= 0.9]


def test_best_of_n_keeps_the_best_of_its_own(generator: Generator, reward: RewardModel) -> None:
    """The first of the N trajectories is plain sampling's, so the best is never worse."""
    plain, best = draw(generator, reward), draw(generator, reward, mode="best-of-n", starts=4)
    assert (best.score >= plain.score - 1e-4).all()
    assert (best.score > plain.score + 1e-4).any()


def test_halving_drops_the_worse_half(generator: Generator, reward: RewardModel) -> None:
    out = draw(generator, reward, mode="halving", starts=8, halving_sigmas=(0.95, 0.8))
    assert [c.score.shape[1] for c in out.candidates] == [8, 4]
    assert [int(c.kept.sum()) for c in out.candidates] == [12, 6]
    for c in out.candidates:
        worst_kept = c.score.masked_fill(~c.kept, math.inf).min(1).values
        best_dropped = c.score.masked_fill(c.kept, -math.inf).max(1).values
        assert (worst_kept >= best_dropped).all()


def test_clean_scores_reuse_their_velocity(generator: Generator, reward: RewardModel) -> None:
    """Each candidate needs a velocity to be seen clean; the kept one's serves the next step: 1 + 3 x 4 + last 0 + ..."""
    out = draw(generator, reward, seeds=[0], mode="stepwise", beams=4, score_at="clean")
    assert out.calls.generator == 1 + 4 * 4
    other = draw(generator, reward, seeds=[0], mode="stepwise", beams=4)
    assert (out.latents - other.latents).abs().max() > 1e-3


def test_resampling_follows_the_weights() -> None:
    """One particle has e^10 times the weight of the others: it takes every place. Equal weights stay as they are."""
    rngs = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    keep = resample(torch.tensor([[0.0, 10.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 4, Search(mode="smc"), rngs)
    assert keep.tolist() == [[1, 1, 1, 1], [0, 1, 2, 3]]


def test_corrected_noise_is_what_the_model_is_told(generator: Generator, reward: RewardModel) -> None:
    told = []
    original = RewardModel.score

    class Told:
        def __init__(self) -> None:
            self.config = reward.config

        def score(self, latents, sigma, cond):
            told.append(float(torch.as_tensor(sigma).reshape(-1)[0]))
            return original(reward, latents, sigma, cond)

    for correct in (False, True):
        draw(generator, Told(), seeds=[0], mode="stepwise", beams=2, step_rule="flow-sde", noise_level=0.7,
             correct_noise=correct)  # type: ignore[arg-type]  # fmt: skip
    sigmas = generator.sigmas(5)[1:].tolist()
    half = len(told) // 2
    assert told[:5] == pytest.approx(sigmas, abs=1e-6)
    assert all(a > b for a, b in zip(told[half : half + 4], sigmas))


def test_latents_that_are_not_finite_name_the_step(
    generator: Generator, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "velocity", lambda x, *a: x * float("nan"))
    with pytest.raises(RunError, match="step 0 of 5"):
        draw(generator, reward)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_scheduler_in_a_stock_pipeline_is_our_sampler(
    generator: Generator, reward: RewardModel, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    from drmcli.scheduler import StepwiseScheduler

    pipe, seeds = generator.pipe, [3, 4]
    ours = draw(generator, reward, seeds=seeds, mode="stepwise", beams=3, guidance_scale=guidance)
    scheduler = StepwiseScheduler.from_pipe(pipe, reward, prompt=PROMPTS[:2], beams=3, seed=seeds)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    for _ in range(2):  # a second call starts anew
        theirs = pipe(
            PROMPTS[:2],
            num_inference_steps=5,
            guidance_scale=guidance,
            max_sequence_length=1,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="latent",
        ).images
        torch.testing.assert_close(theirs, ours.latents, atol=1e-4, rtol=0)
    assert [c.step for c in scheduler.candidates] == [c.step for c in ours.candidates]
    with pytest.raises(InputError, match="made for 2 pictures"):
        pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, max_sequence_length=1)


FLAGS = ["--steps", "4", "--stepwise", "--beams", "3", "--num-images", "3", "--batch-size", "2"]


def test_the_command(reward_folder: Path, tmp_path: Path, drm) -> None:
    result = drm(
        "sample", *PROMPTS[:2], *FLAGS, "--reward", reward_folder, "--trace", "--json", "--out", tmp_path / "run"
    )
    assert result.code == 0, result.err
    summary = result.json
    assert summary.keys() >= {
        "images",
        "mode",
        "beams",
        "steps",
        "generator_calls",
        "reward_calls",
        "seed",
        "device",
        "dtype",
    }
    assert [row["seed"] for row in summary["images"]] == [0, 1, 2] * 2
    first = summary["images"][0]
    text = picture_text(Path(first["path"]))
    assert (text["prompt"], text["seed"]) == (PROMPTS[0], "0")
    assert float(text["score"]) == pytest.approx(first["score"], abs=1e-5)
    assert json.loads(text["settings"])["beams"] == 3
    candidates = read(tmp_path / "run" / "candidates.parquet")
    assert len(candidates) == 6 * 3 * 3
    assert candidates.groupby(["image_id", "step"])["kept"].sum().eq(1).all()
    assert len(read(tmp_path / "run" / "images.parquet")) == 6
    assert (tmp_path / "run" / "grid.png").exists()
    assert len(list((tmp_path / "run" / "traces").glob("*.png"))) == 6


def test_interrupted_goes_on(reward_folder: Path, tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*PROMPTS[:2], *FLAGS, "--reward", reward_folder, "--json"]
    whole = drm("sample", *flags, "--out", tmp_path / "whole")
    enter = Interruptions.__enter__

    def asked(self: Interruptions) -> Interruptions:
        self.asked = True
        return enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(Interruptions, "__enter__", asked)
        assert drm("sample", *flags, "--out", tmp_path / "parts").code == 130
        assert drm("sample", *flags, "--out", tmp_path / "parts").code == 130
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts" / "images").glob("*.png")}
    assert len(made) == 4
    parts = drm("sample", *flags, "--out", tmp_path / "parts")
    assert {n: (tmp_path / "parts" / "images" / n).stat().st_mtime_ns for n in made} == made
    for name in ("images.parquet", "candidates.parquet"):
        assert read(tmp_path / "whole" / name).equals(read(tmp_path / "parts" / name))
    for file in (tmp_path / "whole" / "images").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / "images" / file.name).read_bytes()
    assert whole.json["generator_calls"] == parts.json["generator_calls"]


def test_without_a_reward_model(tmp_path: Path, drm) -> None:
    result = drm("sample", PROMPTS[0], "--reward", "none", "--steps", "2", "--json")
    assert result.json["images"][0]["score"] is None


def test_a_preset_without_a_reward_model_draws(tmp_path: Path, generator_folder: Path, drm) -> None:
    """Plain sampling needs no scorer: none of the presets of real models has one."""
    sets = ["--preset", "sd35-medium", "--generator", generator_folder, "--resolution", "32", "--steps", "2", "--json"]
    sets += ["--set", "max_sequence_length=1", "--guidance-scale", "1"]
    result = drm("sample", PROMPTS[0], *sets, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.json["images"][0]["score"] is None and result.json["reward_calls"] == 0
    plan = drm("sample", PROMPTS[0], *sets, "--dry-run").json["plan"]
    assert plan["scores a picture, about"] == 0


@pytest.mark.parametrize(
    "words, flag",
    [
        ("sample x --stepwise", "--mode stepwise"),
        ("sample x --stepwise --reward none", "--mode stepwise"),
        ("sample x --mode best-of-n --starts 2", "--mode best-of-n"),
        ("sample x --mode auto --budget 30", "--mode auto"),
        ("sample x --refine 1", "--refine"),
        ("sample --tune prompts.txt", "--tune"),
        ("score a.png --prompt x", "--reward"),
        ("bench", "--reward"),
        ("grpo", "--reward"),
        ("grpo --dry-run", "--reward"),
    ],
)
def test_a_missing_scorer_is_told_before_anything_is_loaded(
    words: str, flag: str, tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    (tmp_path / "prompts.txt").write_text("a circle")
    monkeypatch.setattr(Generator, "load", lambda *a, **k: pytest.fail("a generator is loaded"))
    result = drm(*words.split(), "--preset", "sd35-medium", "--out", "run")
    assert result.code == 2 and result.err.startswith(f"error: {flag}: "), result.err
    assert "hint: give --reward" in result.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "tiny"], "PROMPT: none"),
        ([" "], "a prompt is empty"),
        (["x", "--height", "33"], "--height 33: not a multiple of 4"),
        (["x", "--height", "4096", "--width", "4096"], "too many pixels"),
        (["x", "--height", "512", "--width", "32"], "knows 128 pixels at most"),
        (["x", "--stepwise", "--mode", "smc"], "given together"),
        (["x", "--stepwise", "--step-rule", "ode"], "all be the same"),
        (["x", "--branch-sigmas", "1"], "not two rising numbers"),
        (["x", "--mode", "fastest"], "--mode"),
        (["x", "--beams", "0"], "--beams"),
        (["x", "--prompts", "gone.txt"], "cannot be read"),
        (["x", "--negative-prompt", "a blue square"], "--negative-prompt: --guidance-scale 1 makes no second pass"),
        (["x", "--true-cfg-scale", "3"], "--true-cfg-scale: this generator takes no second pass"),
    ],
)
def test_bad_input(args: list[str], says: str, drm) -> None:
    result = drm("sample", *args)
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("note: drm sample on")]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert says in lines[0]


def test_share_score(drm, tmp_path: Path, generator_folder: Path, reward_folder: Path) -> None:
    """Through the command: the same pictures for less, and a clear refusal for a backbone that was trained."""
    frozen = tmp_path / "frozen"
    base = "{package}/tiny/weights/generator"
    RewardModel.from_generator(
        base, backbone="frozen", drop_layers=2, head_width=8, max_sequence_length=1
    ).save_pretrained(frozen)
    flags = ["sample", PROMPTS[0], "--stepwise", "--steps", "4", "--reward", frozen, "--json"]
    apart = drm(*flags, "--out", tmp_path / "a")
    shared = drm(*flags, "--share-score", "--out", tmp_path / "b")
    assert shared.code == 0, shared.err
    assert shared.json["cost"] < apart.json["cost"]
    pictures = [Image.open(x.json["images"][0]["path"]) for x in (apart, shared)]
    assert np.abs(np.asarray(pictures[0]).astype(int) - np.asarray(pictures[1])).max() <= 1
    refused = drm(
        "sample", PROMPTS[0], "--stepwise", "--share-score", "--reward", reward_folder, "--out", tmp_path / "c"
    )
    assert refused.code == 2
    assert "--share-score: the reward model's backbone was trained" in refused.err
