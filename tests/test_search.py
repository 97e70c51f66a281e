"""Search beyond the first pass: calls counted ahead, shared starts, refinement, several scorers as one, methods by budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from drmcli.config import resolve
from drmcli.expected import expected_calls
from drmcli.generator import Generator
from drmcli.recipes import methods
from drmcli.recipes.methods import check_search, search_of
from drmcli.reward import RewardModel
from drmcli.run import Interruptions
from drmcli.sampling import Search, sample
from drmcli.scorers import load_scorer
from drmcli.scorers.combine import COMBINE, Combined, Term
from drmcli.tiny import world
from drmcli.tiny.judge import judge

PROMPTS = list(world.captions("test"))[:3]
CPS = {"step_rule": "cps", "noise_level": 1.0}
BEAM = CPS | {"mode": "beam", "keep": 2, "beams": 2, "branch_sigmas": (0.5, 0.9)}


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> Generator:
    return Generator.load(str(generator_folder), max_sequence_length=1)


@pytest.fixture(scope="module")
def reward(reward_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(reward_folder)


def draw(generator: Generator, reward, told=None, count=3, first=0, **options):
    search = Search(**({"num_inference_steps": 5} | options))
    prompts = PROMPTS[first : first + count]
    cond = generator.encode_prompts(prompts)
    negative = generator.encode_prompts([""]) if search.guidance_scale != 1.0 else None
    seeds = list(range(first, first + count))
    return sample(generator, reward, cond, told or cond, seeds, search, negative=negative, shape=(4, 16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "best-of-n", "starts": 3},
        CPS | {"mode": "best-of-n", "starts": 3, "share_first": True, "guidance_scale": 2.0},
        {"mode": "stepwise", "beams": 3},
        {"mode": "stepwise", "beams": 3, "step_rule": "flow-sde"},
        {"mode": "stepwise", "beams": 3, "score_at": "clean", "guidance_scale": 2.0},
        {"mode": "halving", "starts": 6, "refine": 1},
        {"mode": "smc", "starts": 3},
        BEAM,
        BEAM | {"starts": 4, "first_cut": 0.9, "share_first": True, "refine": 2, "refine_beams": 2},
        BEAM | {"starts": 3, "first_cut": 0.2},
    ],
    ids=str,
)
def test_calls_are_known_ahead(generator: Generator, reward: RewardModel, options: dict) -> None:
    found = draw(generator, reward, **options).calls
    want = expected_calls(Search(**({"num_inference_steps": 5} | options)), generator.sigmas(5))
    assert (found.generator, found.reward) == (3 * want.generator, 3 * want.reward)


def test_starts_share_the_first_forward(generator: Generator, reward: RewardModel) -> None:
    """Five steps of three starts: 1 + 4 x 3 forwards a picture in place of 15, and three different ends."""
    out = draw(generator, reward, **CPS, mode="best-of-n", starts=3, share_first=True)
    assert (out.calls.generator, out.calls.reward) == (3 * 13, 3 * 3)
    one = draw(generator, reward, **CPS, mode="best-of-n", starts=1, share_first=True)
    plain = draw(generator, reward, **CPS)
    assert torch.equal(one.latents, plain.latents)
    assert (out.score >= one.score - 1e-4).all()


def test_beam_cuts_its_starts_once(generator: Generator, reward: RewardModel) -> None:
    """Levels of five steps: 1, .90, .75, .50, .009, 0. Four starts are cut to two at .75, then two children each are cut to two."""
    out = draw(generator, reward, **(BEAM | {"starts": 4, "first_cut": 0.8, "branch_sigmas": (0.4, 0.8)}))
    assert [(c.score.shape[1], int(c.kept.sum(1)[0])) for c in out.candidates] == [(4, 2), (4, 2), (4, 2)]
    assert out.candidates[0].sigma_next <= 0.8 < out.candidates[0].sigma


def test_refinement_never_makes_it_worse(generator: Generator, reward: RewardModel) -> None:
    plain = draw(generator, reward, **CPS)
    refined = draw(generator, reward, **CPS, refine=3, refine_beams=2)
    assert (refined.score >= plain.score - 1e-5).all()
    better = refined.score > plain.score + 1e-5
    assert better.any(), "three tries on three pictures"
    for i in range(3):
        assert torch.equal(refined.latents[i], plain.latents[i]) != bool(better[i])
    steps = sorted({c.step for c in refined.candidates})
    assert steps[0] >= 5, "counted on over the first way down"
    assert len(steps) == 3 * len([c for c in refined.candidates if c.step < 10])


def test_a_refined_picture_does_not_depend_on_its_batch(generator: Generator, reward: RewardModel) -> None:
    options = BEAM | {
        "starts": 3,
        "first_cut": 0.8,
        "share_first": True,
        "refine": 1,
        "refine_beams": 2,
        "max_batch": 4,
    }
    whole = draw(generator, reward, **options)
    for i in range(3):
        alone = draw(generator, reward, count=1, first=i, **options)
        torch.testing.assert_close(whole.latents[i : i + 1], alone.latents, atol=1e-3, rtol=0)


def test_combined_scores() -> None:
    """Two scorers of three candidates: 1, 2, 6 and 20, 10, 15. Means 3 and 15, so -2, -1, 3 and 5, -5, 0 beyond them; level 9."""
    opinions = torch.tensor([[[1.0, 20.0], [2.0, 10.0], [6.0, 15.0]]])
    assert COMBINE["sum"](opinions).tolist() == [[21, 12, 21]]
    assert COMBINE["mean"](opinions).tolist() == [[10.5, 6, 10.5]]
    assert COMBINE["min"](opinions).tolist() == [[7, 4, 9]]
    assert COMBINE["mean-std"](opinions).tolist() == [[9 + 1.5 - 3.5, 9 - 3 - 2, 9 + 1.5 - 1.5]]
    for rule in COMBINE.values():
        assert rule(opinions[..., :1]).argmax(1).tolist() == [2]


def shapes(generator: Generator, *more: Term) -> Combined:
    scorer = load_scorer("shapes", device=torch.device("cpu"), dtype=torch.float32)
    return Combined([Term(scorer, 1.0), *more], generator.decode)


@pytest.mark.parametrize("mode", ["best-of-n", "stepwise", "halving"])
def test_a_scorer_of_pictures_chooses(generator: Generator, mode: str) -> None:
    """The score is the judge's of the decoded picture; candidates on the way are seen by what they point to."""
    combined = shapes(generator)
    assert combined.pictures
    told = combined.encode(PROMPTS, lambda scorer: None)
    options = {"mode": mode, "starts": 3, "beams": 3, "pictures": True}
    out = draw(generator, combined, told, **options)
    pixels = np.stack([np.asarray(p) for p in generator.decode(out.latents)])
    np.testing.assert_allclose(out.score, judge(pixels, PROMPTS).score, atol=1e-5)
    want = expected_calls(Search(**({"num_inference_steps": 5} | options)), generator.sigmas(5))
    assert (out.calls.generator, out.calls.reward) == (3 * want.generator, 3 * want.reward)
    if mode != "best-of-n":
        assert all(0 <= float(c.score.min()) <= float(c.score.max()) <= 1 for c in out.candidates)
        assert want.generator > 5, "a velocity for each candidate"


def test_states_and_pictures_together(generator: Generator, reward_folder: Path, reward: RewardModel) -> None:
    """A weighted sum of a reward model, which sees the noisy states, and the judge."""
    model = load_scorer(str(reward_folder), device=torch.device("cpu"), dtype=torch.float32)
    combined = shapes(generator, Term(model, 0.5))
    told = combined.encode(PROMPTS, lambda scorer: None)
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = combined.score(x, 0.6, told, clean=clean)
    pixels = np.stack([np.asarray(p) for p in generator.decode(clean)])
    np.testing.assert_allclose(found[:, 0], judge(pixels, PROMPTS).score, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(found[:, 1], 0.5 * reward.score(x, 0.6, generator.encode_prompts(PROMPTS)))
    picked = told[torch.tensor([2, 0])]
    assert picked.texts == [PROMPTS[2], PROMPTS[0]]
    assert len(picked.conds[0]) == 2


# --- the command

FAST = ["--steps", "4", "--num-images", "2", "--json"]


def test_two_rewards(reward_folder: Path, tmp_path: Path, drm) -> None:
    """`--reward A --reward B --combine min`: both are asked, and one call counts once."""
    flags = ["sample", PROMPTS[0], *FAST, "--mode", "best-of-n", "--starts", "3", "--reward", reward_folder]
    one = drm(*flags, "--out", tmp_path / "one")
    two = drm(*flags, "--reward", "shapes=2", "--combine", "min", "--out", tmp_path / "two")
    assert two.code == 0, two.err
    assert two.json["reward_calls"] == one.json["reward_calls"] == 6
    assert two.json["cost"] == one.json["cost"], "a scorer of pictures is no forward pass"
    assert [row["score"] for row in two.json["images"]] != [row["score"] for row in one.json["images"]]


def test_beams_are_candidates_a_step_in_every_mode(tmp_path: Path, drm) -> None:
    """An earlier version's `--mode best-of-n --beams 3` goes on working, with a note, and is `--starts 3`."""
    flags = ["sample", PROMPTS[0], *FAST, "--mode", "best-of-n"]
    old = drm(*flags, "--beams", "3", "--out", tmp_path / "old")
    new = drm(*flags, "--starts", "3", "--out", tmp_path / "new")
    assert (
        "trajectories are --starts now"
        in drm(*flags[:-3], "--mode", "best-of-n", "--beams", "3", "--out", tmp_path / "said").err
    )
    assert old.json["starts"] == new.json["starts"] == 3
    assert [r["score"] for r in old.json["images"]] == [r["score"] for r in new.json["images"]]


TABLE = {
    "steps": 4,
    "guidance_scale": 1.0,
    "methods": [
        {"name": "one", "cost": 5, "judge": 0.5, "settings": {"mode": "plain"}},
        {"name": "two", "cost": 9, "judge": 0.7, "settings": {"mode": "best-of-n", "starts": 2}},
        {"name": "worse", "cost": 12, "judge": 0.6, "settings": {"mode": "best-of-n", "starts": 3}},
    ],
}


@pytest.mark.parametrize(("budget", "starts"), [(5, 1), (8.9, 1), (9, 2), (100, 2)])
def test_auto_is_the_best_within_the_budget(budget: float, starts: int) -> None:
    Path("m.yaml").write_text(yaml.safe_dump(TABLE))
    flags = {"mode": "auto", "budget": budget, "methods": "m.yaml", "steps": 4, "prompts": ["x"]}
    told: list[str] = []
    assert search_of(methods.settled(resolve("sample", flags=flags), told.append)).trajectories() == starts
    assert len(told) == 1


@pytest.mark.parametrize("preset", ["tiny"])
def test_shipped_tables(preset: str) -> None:
    """Costs in the table are those that the settings have; every method is one that can be drawn."""
    config = resolve("sample", preset=preset, flags={"mode": "auto", "budget": 1000.0})
    table, _ = methods.read_table(config)
    generator = Generator.load(config.generator, max_sequence_length=1, components=("text",))
    reward = load_scorer(config.reward, device=torch.device("cpu"), dtype=torch.float32)
    for row in table["methods"]:
        search = search_of(resolve("sample", preset=preset, flags=row["settings"]))
        check_search(search)
        assert row["cost"] == pytest.approx(expected_calls(search, generator.sigmas(config.steps)).cost(reward.cost), abs=0.01)  # type: ignore[attr-defined]  # fmt: skip
    settings = [row["settings"] for row in table["methods"]]
    assert len(settings) == len({json.dumps(s, sort_keys=True) for s in settings})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--mode", "auto"], "--mode auto: no budget is given"),
        (["--mode", "auto", "--budget", "1"], "--budget 1: too little"),
        (["--mode", "auto", "--budget", "0"], "--budget"),
        (["--mode", "auto", "--budget", "30", "--steps", "7"], "measured with steps 10, not 7"),
        (
            ["--mode", "auto", "--budget", "30", "--preset", "paper", "--reward", "pickscore"],
            "nothing was measured for preset paper",
        ),
        (["--mode", "auto", "--budget", "30", "--methods", "gone.yaml"], "--methods gone.yaml: cannot be read"),
        (["--mode", "auto", "--budget", "30", "--methods", "bad.yaml"], "--methods bad.yaml: no table of methods"),
        (["--mode", "auto", "--budget", "30", "--methods", "odd.yaml"], "--methods odd.yaml: odd: starts: "),
        (["--refine", "1", "--steps", "1"], "--refine: one step"),
        (["--refine", "1", "--reward", "none"], "--refine: needs a scorer"),
        (["--refine", "1", "--refine-beams", "2"], "--refine-beams: candidates of the ODE"),
        (["--mode", "best-of-n", "--share-first"], "--share-first: trajectories of the ODE"),
        (["--mode", "beam", "--starts", "1"], "--starts 1: fewer than the 2"),
        (["--combine", "max"], "--combine"),
        (["--reward", "pickscor"], "--reward pickscor: there is no such scorer"),
    ],
)
def test_bad_input(args: list[str], says: str, drm) -> None:
    Path("bad.yaml").write_text("methods: [1]")
    odd = {"name": "odd", "cost": 9, "judge": 0.7, "settings": {"mode": "best-of-n", "starts": -2}}
    Path("odd.yaml").write_text(yaml.safe_dump({"steps": 10, "guidance_scale": 1.0, "methods": [odd]}))
    result = drm("sample", PROMPTS[0], *args)
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.startswith(("error", "hint"))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert says in lines[0]


def test_tune(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods are measured by the judge, interrupted and gone on with; auto reads the table, which says the same as the pictures."""
    monkeypatch.setattr(
        methods, "METHODS", {k: methods.METHODS[k] for k in ("plain, CPS", "best of 2", "best of 2, refined twice")}
    )
    monkeypatch.setattr(methods, "RIVALS", ("plain, CPS", "best of 2"))
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["sample", "--tune", "prompts.txt", "--judge", "shapes", "--steps", "4", "--num-images", "2", "--json"]
    enter = Interruptions.__enter__

    def asked(self: Interruptions) -> Interruptions:
        self.asked = True
        return enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(Interruptions, "__enter__", asked)
        assert drm(*flags, "--out", tmp_path / "tune").code == 130
    found = drm(*flags, "--out", tmp_path / "tune")
    assert found.code == 0, found.err
    rows = {row["name"]: row for row in found.json["methods"]}
    assert rows["best of 2, refined twice"]["rival"] == "best of 2"
    table = tmp_path / "tune" / "methods.yaml"
    settings = rows["best of 2"]["settings"]
    cost = rows["best of 2"]["cost"]
    way = [
        "--mode",
        "best-of-n",
        "--starts",
        settings["starts"],
        "--share-first",
        "--step-rule",
        "cps",
        "--noise-level",
        "1",
    ]
    drawn = [
        drm("sample", prompt, *way, *FAST, "--seed", 2 * i, "--out", tmp_path / f"again-{i}").json
        for i, prompt in enumerate(PROMPTS)
    ]
    rows_drawn = [row for one in drawn for row in one["images"]]
    from PIL import Image

    pictures = np.stack([np.asarray(Image.open(row["path"])) for row in rows_drawn])
    texts = [row["prompt"] for row in rows_drawn]
    assert rows["best of 2"]["judge"] == pytest.approx(judge(pictures, texts).score.mean(), abs=1e-4)
    assert drawn[0]["cost"] == pytest.approx(cost, abs=0.01)
    auto = drm(
        "sample", PROMPTS[0], "--mode", "auto", "--budget", "1000", "--methods", table, *FAST, "--out", tmp_path / "x"
    )
    assert auto.code == 0, auto.err
    best = max(rows.values(), key=lambda row: row["judge"])["settings"]
    assert (auto.json["mode"], auto.json["refine"]) == (best["mode"], best.get("refine", 0))


def test_tuning_without_a_judge_warns(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", {"plain, CPS": methods.METHODS["plain, CPS"]})
    monkeypatch.setattr(methods, "RIVALS", ())
    Path("prompts.txt").write_text(PROMPTS[0])
    found = drm("sample", "--tune", "prompts.txt", "--steps", "2", "--json", "--out", tmp_path / "tune")
    assert found.code == 0, found.err
    assert "no --judge is named" in found.err
    assert found.json["methods"][0]["judge_ci95"] is None, "one prompt has no interval"
