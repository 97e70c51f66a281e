"""What an alignment leaves on disk beside its checkpoints: the policy with a card, rows of its tables, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from drmcli.algorithms import Scored
from drmcli.cards import policy_card
from drmcli.config import Grpo, to_dict
from drmcli.data.preferences import text_id
from drmcli.evaluation import Evaluation
from drmcli.plots import reward_and_judge
from drmcli.recipes.alignment import Alignment, State
from drmcli.run import Run, atomic_folder, guarded, write_text
from drmcli.sheets import Block, Tile, by_prompt, note_of, score_text, sheet

IN_GRID = 32
"""Pictures of an evaluation's grid."""


def product(config: Grpo) -> str:
    """Folder of the best policy; the last one has -last in its name."""
    return "lora" if config.train == "lora" else "generator"


def best_folder(a: Alignment) -> Path:
    """Where the best policy is kept while the run goes on: a LoRA where it belongs, of a whole transformer the weights alone."""
    return a.run.folder / (product(a.config) if a.config.train == "lora" else "best")


def save_best(a: Alignment, update: int) -> None:
    """Keep the policy as the best so far, as small as it can be."""
    if a.main:
        with atomic_folder(best_folder(a)) as part:
            a.policy.save_weights(part)
            write_card(part, a.config, update)


def save_product(a: Alignment, target: Path, update: int) -> None:
    """The policy as plain diffusers loads it, with a card: a LoRA, or a whole pipeline."""
    if a.main:
        with atomic_folder(target) as part:
            a.policy.save_pipeline(part)
            write_card(part, a.config, update)


def write_card(folder: Path, config: Grpo, update: int, summary: dict[str, Any] | None = None) -> None:
    """README.md of a saved policy. summary: what was measured of it, once it was."""
    kind = (
        "lora" if config.train == "lora" else "generator" if (folder / "model_index.json").exists() else "transformer"
    )
    write_text(folder / "README.md", policy_card(to_dict(config), update, kind=kind, summary=summary))


def record(
    a: Alignment, state: State, texts: list[str], scored: list[Scored], row: dict[str, float], seconds: float
) -> None:
    """A row of metrics, and every reward of the update. All processes call it; the main one writes what all of them drew."""
    found = a.share.gather(torch.stack([s.columns() for s in scored], 1)).cpu()  # [P, steps, K, 5]
    if not a.main:
        return
    rewards = found[..., 0]
    shown = row | {
        "reward_mean": float(rewards.mean()),
        "group_std": float(rewards.std(-1).mean()),
        "skipped_groups": float(1 - found[..., 0, 4].mean()),
        "seconds": seconds,
    }
    a.tables.metrics.add(update=state.update, lr=a.optimizer.param_groups[0]["lr"], **shown)
    a.accelerator.log(shown, step=state.update)
    for j, step in enumerate(scored):
        for i, text in enumerate(texts):
            for c, (reward, advantage, log_prob, kept, _) in enumerate(found[i, j].tolist()):
                a.tables.rollouts.add(
                    update=state.update, prompt_id=text_id(text), prompt=text, group=i, step=step.step, sigma=step.sigma,
                    sigma_next=step.sigma_next, candidate=c, score=reward, kept=kept > 0,
                    advantage=None if advantage != advantage else advantage, log_prob=None if log_prob != log_prob else log_prob,
                )  # fmt: skip
    judge = {"judge": state.history[-1]["judge"]} if a.judge else {}
    a.run.reporter.progress(
        "align",
        state.update,
        a.config.updates,
        reward=shown["reward_mean"],
        **judge,
        spread=shown["group_std"],
        ratio=shown["ratio"],
        clipped=shown["clip_fraction"],
        kl=shown["kl"],
        **{"images/s": rewards.numel() / max(seconds, 1e-9)},
    )


def picture_grid(run: Run, found: Evaluation, prompts: Sequence[str], seeds: int, update: int) -> None:
    """samples/step-N/grid.png: the first 32 pictures of an evaluation with their seeds and rewards."""
    count = min(IN_GRID, len(found.images))
    texts = [prompts[i // seeds] for i in range(count)]
    notes = [note_of(i % seeds, float(found.reward[i])) for i in range(count)]
    with guarded(run.folder):
        grid = sheet(by_prompt(texts, found.images[:count], notes), title=f"update {update}: seed and reward")
        grid.save(run.path("samples", f"step-{update:06d}", "grid.png"))


def before_and_after(run: Run, ways: Mapping[str, Evaluation], prompts: Sequence[str], seeds: int) -> None:
    """before_after.png: the first seed of up to eight test prompts, drawn in each way, with reward and judge."""
    blocks = []
    for first in range(0, min(8 * seeds, len(ways["before"].images)), seeds):
        tiles = []
        for way, found in ways.items():
            judged = score_text(float(found.judge[first]))
            note = f"{way}\nreward {score_text(float(found.reward[first]))}" + (f"\njudge {judged}" if judged else "")
            tiles.append(Tile(found.images[first], note=note))
        blocks.append(Block(tiles, prompts[first // seeds]))
    sheet(blocks).save(run.path("before_after.png"))


def curve(run: Run, history: list[dict[str, Any]]) -> None:
    """curve.png: reward and judge by update."""
    rows = [row | {"judge": float("nan") if row["judge"] is None else row["judge"]} for row in history]
    reward_and_judge(run.folder / "curve.png", rows, title=run.folder.name)
