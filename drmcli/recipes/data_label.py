"""`drm data label`: a page on this machine where people say which of two pictures is better; its votes become a file for `--data`."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from drmcli.config.making import DataLabel
from drmcli.data.ballot import Ballot
from drmcli.errors import InputError, Interrupted
from drmcli.files import read_object
from drmcli.run import Reporter
from drmcli.service.server import address, listen, need, serve


def run(config: DataLabel, reporter: Reporter, ready: Callable[[str], None]) -> dict[str, Any]:
    """Serve the page until a signal; `ready` is told its address. Returns a summary when every pair has a vote, else raises Interrupted."""
    need("drm data label", "starlette", "uvicorn")
    folder = Path(config.folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"DIR {folder}: is no folder of `drm data make`",
            hint=f"drm data make PROMPTS --label people --out {folder}",
        )
    if not (folder / "summary.json").is_file():
        raise InputError(f"DIR {folder}: is not finished", hint="run `drm data make` on it again")
    if (read_object(folder / "summary.json", f"DIR {folder}") or {}).get("label") not in (["people"], ["none"]):
        raise InputError(
            f"DIR {folder}: its pairs are labelled by a scorer, and votes would replace them",
            hint="make another with --label people",
        )
    ballot = Ballot(folder, seed=config.seed, limit=config.limit)
    if ballot.damaged:
        reporter.warn(f"{folder}: {ballot.damaged} lines of votes.jsonl cannot be read and are passed over")
    if config.active:
        ballot.least_sure(scores(config, ballot, reporter))
    token = secrets.token_urlsafe(12)
    with contextlib.closing(listen(config.host, config.port)) as listening:
        from drmcli.service.labelling import make_app

        if config.host not in ("127.0.0.1", "::1", "localhost"):
            reporter.warn(f"--host {config.host}: whoever has the link and reaches this machine can vote")
        ballot.write("")  # what a killed process left
        serve(make_app(ballot, token), listening, lambda: ready(f"{address(listening)}/?token={token}"), grace=5)
    return closed(config, ballot, folder)


def closed(config: DataLabel, ballot: Ballot, folder: Path) -> dict[str, Any]:
    """Write the pairs and sum up."""
    n_pairs = ballot.write("")
    agreement, twice = ballot.agreement()
    left = len(set(ballot.asked) - {pair for votes in ballot.votes.values() for pair in votes})
    summary = {
        "command": "data-label", "run": str(folder), "data": str(folder), "n_pairs": n_pairs, "n_left": left,
        "votes": {name: len(votes) for name, votes in ballot.votes.items() if votes},
        "agreement": agreement, "n_voted_twice": twice,
    }  # fmt: skip
    if left:
        votes = sum(map(len, ballot.votes.values()))
        said = "" if agreement is None else f", labellers agree on {agreement:.0f} % of {twice}"
        raise Interrupted(
            f"interrupted: {votes} votes on {n_pairs} pairs are in {folder}{said}; {left} pairs are left",
            hint=f"run the same command again to go on, or drm train-reward --data {folder}",
        )
    return summary


def scores(config: DataLabel, ballot: Ballot, reporter: Reporter) -> np.ndarray:
    """Scores [pictures] of the reward model that pairs are chosen for."""
    from drmcli.data.images import FileImage, load_image
    from drmcli.generator import pick_device, pick_dtype
    from drmcli.kernels import Kernels
    from drmcli.scorers import load_scorer

    device = pick_device(config.device)
    assert config.active
    scorer = load_scorer(
        config.active, device=device, dtype=pick_dtype(config.dtype, device), flag="--active", seed=config.seed,
        kernels=Kernels.of(config, device),
    )  # fmt: skip
    found = []
    for at in range(0, len(ballot.pictures), 32):
        names = ballot.pictures[at : at + 32]
        opened = [load_image(FileImage(name, ballot.folder / name)) for name in names]
        found.append(scorer.score_images(opened, ballot.prompts[at : at + 32]).double().numpy())
        reporter.progress("score", at + len(names), len(ballot.pictures))
    return np.concatenate(found)
