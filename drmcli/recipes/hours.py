"""The kinds of work of each command with their counts, for the hours of `--dry-run`; `drmcli.recipes.timing` times them."""

from __future__ import annotations

from typing import Any

from drmcli.config import Bench, Grpo, Sample, Score, TrainReward
from drmcli.expected import expected_calls, widest
from drmcli.flow import schedule
from drmcli.recipes.footprints import base_of, describe_reward, described_rewards, described_scorers
from drmcli.recipes.plan import Known
from drmcli.recipes.timing import Row, decoding, drawing, encoding, hours, learning, scoring, training_step
from drmcli.reward_config import RewardConfig
from drmcli.sampling import Search


def passes(sigmas: list[float], noise_samples: int) -> int:
    """Forward passes of a reward model a picture."""
    return sum(noise_samples if sigma > 0 else 1 for sigma in sigmas)


def of_train_reward(
    config: TrainReward, known: Known, settings: RewardConfig, facts: dict[str, Any], pictures: int
) -> dict[str, Any]:
    """Steps, encoding, evaluations. facts: what is said of the data; pictures: of a micro-batch."""
    side = known.latent_side(config.resolution)

    def rows() -> list[Row]:
        step = training_step(config, known, settings, pictures, side)
        size, live = (side, side), facts["prompts are"] == "live"
        picture, prompt = encoding(
            config, known, size, pictures=min(config.encode_batch_size, facts["pictures"]),
            prompts=min(config.encode_batch_size, facts["prompts"]),
        )  # fmt: skip
        evaluations = 1 + (max(0, config.steps - 1) // config.eval_every if config.eval_every else 0)
        scored = evaluations * 2 * config.eval_pairs * len(config.eval_sigmas)
        return [
            Row("steps", config.steps, step),
            Row("pictures encoded", facts["pictures"], picture),
            Row("prompts encoded", config.steps * config.batch_size if live else facts["prompts"], prompt),
            Row("scores of evaluations", scored, scoring(config, known, settings, config.eval_batch_size, size)),
        ]

    return hours(config, rows)


def of_bench(config: Bench, known: Known, facts: dict[str, Any]) -> dict[str, Any]:
    """Encoding, and the scores of every reward model that is compared."""
    side = known.latent_side(config.resolution)
    asked, others = described_scorers(config)

    def rows() -> list[Row]:
        picture, prompt = encoding(
            config, known, (side, side), pictures=min(config.encode_batch_size, facts["pictures"]),
            prompts=min(config.encode_batch_size, facts["prompts"]),
        )  # fmt: skip
        made = [Row("pictures encoded", facts["pictures"], picture), Row("prompts encoded", facts["prompts"], prompt)]
        count = facts["pictures"] * passes(config.sigmas, config.noise_samples)
        for ref, reward in asked.items():
            one = scoring(
                config, base_of(reward), reward, min(config.batch_size, max(1, facts["pictures"])), (side, side)
            )
            made.append(Row(f"scores of {ref}", count, one))
        return made

    return hours(config, rows, *others)


def of_score(config: Score) -> dict[str, Any]:
    """Encoding and scoring of the given pictures."""
    reward = describe_reward(config.reward, "--reward")
    if reward is None:
        return hours(config, lambda: [], config.reward)
    known = base_of(reward)
    side = known.latent_side(config.resolution or reward.resolution)
    images, prompts = len(config.images), len(set(config.prompts))

    def rows() -> list[Row]:
        count = min(config.batch_size, images)
        picture, prompt = encoding(config, known, (side, side), pictures=count, prompts=min(config.batch_size, prompts))
        one = scoring(config, known, reward, count, (side, side))
        return [
            Row("pictures encoded", images, picture),
            Row("prompts encoded", prompts, prompt),
            Row("scores", images * passes(config.sigmas, config.noise_samples), one),
        ]

    return hours(config, rows)


def of_sample(config: Sample, known: Known, search: Search, pictures: int, size: tuple[int, int]) -> dict[str, Any]:
    """Forward passes, scores and decoding. pictures: to draw in all; size: of their latents."""
    guided = known.family.guides(known.transformer, config.guidance_scale)
    calls = expected_calls(search, schedule(config.steps), trace=config.trace, guided=guided)
    together = max(1, min(config.batch_size, pictures))
    drawn, scored = widest(search, trace=config.trace)
    asked, others = described_rewards(config, needed=False)

    def rows() -> list[Row]:
        count = min(config.max_batch, together * drawn) * (2 if guided else 1)
        _, prompt = encoding(config, known, size, prompts=min(together, len(set(config.prompts))))
        made = [
            Row("prompts encoded", len(set(config.prompts)), prompt),
            Row("forward passes", pictures * calls.generator, drawing(config, known, count, size)),
            Row("pictures decoded", pictures, decoding(config, known, size, together)),
        ]
        for name, reward in asked.items():
            one = scoring(config, base_of(reward), reward, min(config.max_batch, together * scored), size)
            made.append(Row(f"scores of the {name}", pictures * calls.reward, one))
        return made

    return hours(config, rows, *others)


def of_grpo(
    config: Grpo, known: Known, lora: Any, prompts: dict[str, list[str]], counts: dict[str, int]
) -> dict[str, Any]:
    """An update's parts and the evaluations. counts: `velocities`, `rewards`, `states` of an update; prompts: by split."""
    side = known.latent_side(config.resolution)
    asked, unseen = described_rewards(config, needed=True)
    unseen += [ref for ref in (config.judge, config.refresh_by) if ref and ref != "none"]

    def rows() -> list[Row]:
        size, many = (side, side), config.prompts_per_update * config.group_size
        velocity, state, optimizer = learning(config, known, lora, side)
        rewards = sum(
            scoring(config, base_of(reward), reward, min(config.max_batch, many), size) for reward in asked.values()
        )
        texts = min(len(prompts["train"]), config.updates * config.prompts_per_update)
        _, prompt = encoding(config, known, size, prompts=1)
        evaluated = {split: len(prompts[split][: config.eval_prompts]) for split in ("val", "test")}
        looks = 2 + (max(0, config.updates - 1) // config.eval_every if config.eval_every else 0)
        pictures = config.eval_seeds * (looks * evaluated["val"] + 2 * evaluated["test"])
        drawn = config.steps * velocity + rewards + decoding(config, known, size, min(config.max_batch, many))
        return [
            Row("updates: drawing", config.updates, counts["velocities"] * velocity),
            Row("updates: rewards", config.updates, counts["rewards"] * config.reward_draws * rewards),
            Row("updates: learning", config.updates, config.inner_epochs * (counts["states"] * state + optimizer)),
            Row("pictures of evaluations", pictures, drawn),
            Row("prompts encoded", texts + sum(evaluated.values()), prompt),
        ]

    return hours(config, rows, *unseen)
