"""Votes of people on pairs of pictures: which pair comes next, votes on disk before anything else happens, and what they say together.

Votes are lines of JSON that are only ever appended to `votes.jsonl`, undoing too, each flushed to the disk: a killed process loses none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drmcli import results
from drmcli.data.datasets import PREFERENCES
from drmcli.data.preferences import text_id
from drmcli.errors import InputError
from drmcli.files import guarded

VOTES = "votes.jsonl"
CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}
"""What a person may say of a pair as shown, and what it says of the left picture."""
PAUSE = 60.0
"""Seconds after which the time between two votes was a break."""


class Ballot:
    """The pairs of a folder that `drm data make` wrote, and their votes. Positions count pictures in the order of its table."""

    def __init__(self, folder: Path, *, seed: int = 0, limit: int | None = None):
        """Raises InputError for a folder without drawn pictures."""
        self.folder, self.seed = folder, seed
        if not (folder / "drawn.parquet").is_file():
            raise InputError(
                f"{folder}: holds no drawn pictures",
                hint=f"make it: drm data make PROMPTS --label people --out {folder}",
            )
        table = results.read(folder / "drawn.parquet")
        if {"prompt", "path"} - set(table) or not all(isinstance(v, str) for c in ("prompt", "path") for v in table[c]):
            raise InputError(
                f"{folder / 'drawn.parquet'}: lacks a prompt or a path of a picture", hint="make the folder again"
            )
        self.prompts: list[str] = table["prompt"].tolist()
        self.pictures: list[str] = table["path"].tolist()
        root = folder.resolve()
        for name in self.pictures:
            if not (folder / name).resolve().is_relative_to(root):
                raise InputError(
                    f"{folder / 'drawn.parquet'}: the path {name!r} leaves the folder", hint="make the folder again"
                )
        by_prompt = table.groupby("prompt", sort=False).indices.values()
        self.pairs = [(int(a), int(b)) for rows in by_prompt for a, b in itertools.combinations(sorted(rows), 2)]
        """Positions of the two pictures of each pair."""
        rng = np.random.default_rng(seed)
        self.order: list[int] = rng.permutation(len(self.pairs)).tolist()
        """Pairs as they are asked; the same for all labellers, so that some are asked of several."""
        self.limit = limit
        self.votes: dict[str, dict[int, float | None]] = defaultdict(dict)
        """By labeller: of each pair, does the first picture win? 1, 0, 0.5 for a tie, None where it was skipped."""
        self.history: dict[str, list[int]] = defaultdict(list)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.damaged = 0
        """Lines that could not be read: a vote that was being written when the process was killed."""
        self._replay()

    def least_sure(self, scores: np.ndarray) -> None:
        """Ask first where the scores [pictures] of a pair are closest."""
        gaps = np.abs(np.array([scores[a] - scores[b] for a, b in self.pairs]))
        self.order = np.argsort(gaps, kind="stable").tolist()

    @property
    def asked(self) -> list[int]:
        return self.order[: self.limit]

    def swapped(self, labeller: str, pair: int) -> bool:
        """Is the pair's first picture shown on the right? Drawn for each labeller, so that no side is favoured."""
        return bool(hashlib.sha256(f"{self.seed} {labeller} {pair}".encode()).digest()[0] & 1)

    def waiting(self, labeller: str, count: int) -> list[int]:
        """The next pairs of a labeller."""
        done = self.votes[labeller]
        return list(itertools.islice((pair for pair in self.asked if pair not in done), count))

    def state(self, labeller: str) -> dict[str, Any]:
        """What the page shows: the pair, the one after it to be fetched ahead, progress and the time that is left."""
        done, total = len(set(self.votes[labeller]) & set(self.asked)), len(self.asked)
        gaps = [b - a for a, b in itertools.pairwise(self.times[labeller][-30:]) if b - a < PAUSE]
        upcoming = [self._shown(labeller, pair) for pair in self.waiting(labeller, 2)]
        return {
            "pair": upcoming[0] if upcoming else None, "ahead": upcoming[1] if len(upcoming) > 1 else None,
            "done": done, "total": total, "can_undo": bool(self.history[labeller]),
            "seconds_left": round(float(np.median(gaps)) * (total - done)) if gaps else None,
        }  # fmt: skip

    def _shown(self, labeller: str, pair: int) -> dict[str, Any]:
        left, right = self.pairs[pair][::-1] if self.swapped(labeller, pair) else self.pairs[pair]
        return {"pair": pair, "prompt": self.prompts[left], "left": left, "right": right}

    def vote(self, labeller: str, pair: int, choice: str) -> None:
        """Write a vote to the disk, then count it. Raises InputError for what is no choice or no pair."""
        if choice not in CHOICES:
            raise InputError(f"choice: {choice!r} is none", hint=f"one of {', '.join(CHOICES)}")
        if not 0 <= pair < len(self.pairs):
            raise InputError(f"pair: there is no pair {pair}", hint="reload the page")
        left = CHOICES[choice]
        first = 1 - left if left is not None and self.swapped(labeller, pair) else left
        a, b = self.pairs[pair]
        self._append({"labeller": labeller, "pair": pair, "first": self.pictures[a], "second": self.pictures[b],
                      "first_wins": first, "time": round(time.time(), 3)})  # fmt: skip

    def undo(self, labeller: str) -> None:
        """Take back a labeller's last vote; nothing to take back is no error."""
        if self.history[labeller]:
            self._append({"labeller": labeller, "undo": self.history[labeller][-1], "time": round(time.time(), 3)})

    def _append(self, row: dict[str, Any]) -> None:
        path = self.folder / VOTES
        with guarded(path), path.open("ab+") as file:
            if file.tell() and not self._whole(file):
                file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(row)

    @staticmethod
    def _whole(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

    def _replay(self) -> None:
        path = self.folder / VOTES
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
                a, b = self.pairs[row["pair" if "pair" in row else "undo"]]
                if "pair" in row and (row["first"], row["second"]) != (self.pictures[a], self.pictures[b]):
                    raise InputError(
                        f"{path}: its votes are of other pictures", hint="label in the folder where they were given"
                    )
                self._count(row)
            except (ValueError, KeyError, IndexError, TypeError):
                self.damaged += bool(line.strip())

    def _count(self, row: dict[str, Any]) -> None:
        labeller = row["labeller"]
        if "undo" in row:
            self.votes[labeller].pop(row["undo"], None)
            self.history[labeller].remove(row["undo"])
            return
        self.votes[labeller][row["pair"]] = row["first_wins"]
        self.history[labeller].append(row["pair"])
        self.times[labeller].append(row["time"])

    # --- together -----------------------------------------------------------------------------------------------------

    def said(self) -> dict[int, list[float]]:
        """The votes of each pair that was not skipped."""
        found: dict[int, list[float]] = defaultdict(list)
        for votes in self.votes.values():
            for pair, first in votes.items():
                if first is not None:
                    found[pair].append(first)
        return found

    def agreement(self) -> tuple[float | None, int]:
        """Percent of two labellers' votes on the same pair that are the same, and how many there are."""
        same = [a == b for votes in self.said().values() for a, b in itertools.combinations(votes, 2)]
        return (100 * sum(same) / len(same) if same else None), len(same)

    def write(self, run_id: str) -> int:
        """The file that `--data` takes: the share of votes as the label, their number as the weight. Returns the pairs in it."""
        rows = []
        for pair, votes in sorted(self.said().items()):
            label, (a, b) = sum(votes) / len(votes), self.pairs[pair]
            chosen, rejected = (a, b) if label >= 0.5 else (b, a)
            prompt = self.prompts[a]
            rows.append({"prompt": prompt, "prompt_id": text_id(prompt), "pair_id": str(pair), "chosen": self.pictures[chosen],
                         "rejected": self.pictures[rejected], "label": max(label, 1 - label), "weight": float(len(votes))})  # fmt: skip
        if rows:
            results.write(self.folder / PREFERENCES, "preferences", pd.DataFrame(rows), run_id)
        return len(rows)
