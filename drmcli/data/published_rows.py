"""Comparisons from the entries of published lists, whatever holes they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from drmcli.data.archives import stays_inside
from drmcli.data.preferences import ranked_pairs
from drmcli.data.text import kind, short, sound


class Row(NamedTuple):
    """One comparison, as `assemble` takes it. A tuple: HPDv3 has a million."""

    prompt: str
    prompt_id: str
    pair_id: str
    first: str
    second: str
    label: float
    source_first: str | None = None
    source_second: str | None = None
    source: str | None = None
    category: str | None = None
    agreement: float = np.nan


class Table:
    """Rows for `assemble`, collected from the entries of a publisher's list."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.dropped: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    def _once(self, text: Any) -> Any:
        """A text, the same object wherever it comes again: prompts and pictures are in many pairs."""
        return self._texts.setdefault(text, text) if isinstance(text, str) else text

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def add(self, row: Row) -> None:
        if not 0 <= row.label <= 1:
            raise ValueError(f"the label {short(row.label)} is not in [0, 1]")
        first, second = picture_names([row.first, row.second])
        self.rows.append(Row(*map(self._once, row._replace(first=first, second=second))))

    def ranking(
        self, prompt: str, prompt_id: str, names: Sequence[str], ranks: Sequence[float | None], *,
        raw: Sequence[Sequence[float]] = (), ties: bool = True, category: str | None = None,
    ) -> None:  # fmt: skip
        """All pairs of one list. `raw` [annotators, n]: their own ranks. Without `ties`, tied pairs are dropped.

        A picture without a rank is left out of its list and counted; annotators who did not rank all pictures are not counted.
        """
        if len(names) != len(ranks):
            raise ValueError(f"{len(names)} pictures with the ranks {short(list(ranks))}")
        known = [i for i, rank in enumerate(ranks) if not is_null(rank)]
        rank = np.array([ranks[i] for i in known], dtype=float)
        if not np.isfinite(rank).all():
            raise ValueError(f"{len(names)} pictures with the ranks {short(list(ranks))}")
        if len(known) < len(names):
            if len(known) < 2:
                raise ValueError(f"the rank of {len(names) - len(known)} of {len(names)} pictures is missing")
            self.dropped["picture without a rank"] = (
                self.dropped.get("picture without a rank", 0) + len(names) - len(known)
            )
        names = picture_names([names[i] for i in known])
        full = [row for row in raw if row is not None and not any(map(is_null, row))]
        votes = np.array([[row[i] for i in known] for row in full if len(row) == len(ranks)], dtype=float)
        votes = votes.reshape(-1, len(names))
        for a, b, label in zip(*ranked_pairs(rank.tolist()), strict=True):
            if label == 0.5 and not ties:
                self.drop("order not known")
                continue
            share = float((0.5 - 0.5 * np.sign(votes[:, a] - votes[:, b])).mean()) if len(votes) else np.nan
            pair_id = f"{prompt_id}:{known[a]}-{known[b]}"
            self.add(Row(prompt, prompt_id, pair_id, names[a], names[b], label, category=category, agreement=share))


def is_null(value: Any) -> bool:
    return value is None or value != value


def picture_names(names: Sequence[Any]) -> list[str]:
    """Names of pictures, with this system's separators: lists that were made on Windows have backslashes."""
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"a picture is {kind(name)}, not named by a string")
        sound(name, "a picture's name")
    return [name.replace("\\", "/") if "\\" in name and stays_inside(name) else name for name in names]


def published_prompt(value: Any) -> str:
    """A prompt as it is published; empty ones are. Raises TypeError for what is no text, InputError for what is no UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"prompt is {kind(value)}, not text")
    return sound(value, "prompt")


def agreement_of(votes: Any) -> float:
    """The share of votes for the winner; NaN where votes are not known, as some of HPDv3's are not."""
    if votes is None or any(map(is_null, votes)) or not sum(votes) > 0:
        return np.nan
    return float(max(votes) / sum(votes))
