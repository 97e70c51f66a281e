"""Checkpoints: whole or not at all, damaged ones are noticed, the one before is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from drmcli.recipes.checkpoints import Checkpoints, finite, load_optimizer, optimizer_tensors
from drmcli.results import Parts, read
from drmcli.run import Run, Silent


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def kept(tmp_path: Path):
    """Two checkpoints, at 10 and 20, with a row of a table each."""
    run = Run(tmp_path, "grpo", "x", resumed=False, reporter=Listening())
    table = Parts(tmp_path / "evals", "train_reward_evals", "x")
    checkpoints = Checkpoints(run, [table], keep=2)
    for step in (10, 20):
        table.add(step=step, sigma=0.0, accuracy=50.0, n_pairs=1)
        checkpoints.save(step, {"w": torch.full((3,), float(step))}, {"seen": step, "worst": float("nan")})
    return checkpoints


def test_the_newest_is_taken(kept: Checkpoints) -> None:
    found = kept.newest()
    assert found.step == 20
    assert found.tensors()["w"].tolist() == [20, 20, 20]
    assert found.state() == {"seen": 20, "worst": None}
    assert kept.run.reporter.said == []
    assert read(kept.run.folder / "evals")["step"].tolist() == [10, 20]


def test_a_damaged_one_is_noticed_and_the_older_one_taken(kept: Checkpoints) -> None:
    newest = kept.run.folder / "checkpoints" / "step-000020"
    (newest / "state.json").write_text('{"seen": 30}')
    assert kept.newest().step == 10
    assert len(kept.run.reporter.said) == 1
    assert "step-000020 is damaged" in kept.run.reporter.said[0]
    assert read(kept.run.folder / "evals")["step"].tolist() == [10]  # rows of the lost future are gone
    kept.save(15, {"w": torch.zeros(1)}, {})
    assert kept.newest().step == 15
    assert (newest.parent / "step-000010").exists()  # the damaged one is not counted among those that are kept


def test_none_yet_leaves_no_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, "grpo", "x", resumed=False, reporter=Silent())
    table = Parts(tmp_path / "evals", "train_reward_evals", "x")
    table.add(step=1, sigma=0.0, accuracy=50.0, n_pairs=1)
    table.flush(1)
    assert Checkpoints(run, [table], keep=2).newest() is None
    assert not list((tmp_path / "evals").iterdir())


def test_an_interrupted_save_leaves_the_one_before(kept: Checkpoints) -> None:
    with pytest.raises(KeyboardInterrupt), kept.saving(30) as part:
        (part / "half").write_text("x")
        raise KeyboardInterrupt
    assert kept.newest().step == 20


def test_numbers_that_json_does_not_know() -> None:
    found = finite({"a": [1.0, float("inf"), (float("nan"), "x")], "b": {"c": -float("inf")}})
    assert found == {"a": [1.0, None, [None, "x"]], "b": {"c": None}}
    assert json.dumps(found, allow_nan=False)


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    def made() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    (a, adam), (b, other) = made(), made()
    a[0].grad = torch.tensor([1.0, -2.0])
    adam.step()
    load_optimizer(other, b, optimizer_tensors(adam, a))
    assert other.state[b[0]]["exp_avg"].tolist() == adam.state[a[0]]["exp_avg"].tolist()
    assert float(other.state[b[0]]["step"]) == 1
    assert not other.state[b[1]]
