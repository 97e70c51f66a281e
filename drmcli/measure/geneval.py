"""GenEval (arXiv 2310.11513): what a picture must show, and whether what was found in it does.

The rules are those of the reference evaluation (github djghosh13/geneval, evaluation/evaluate_images.py and summary_scores.py): every
`include` clause must hold and no `exclude` clause may; only as many of the surest detections of a class are looked at as the clause
asks for. Finding objects and colours is the business of `drmcli.measure.detect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drmcli.data.rows import MAX_BAD, BadRow, LeftOut, sound_prompt
from drmcli.data.text import kind, lines, parse_json, read_text, short
from drmcli.errors import InputError
from drmcli.measure.intervals import mean_ci

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence above which a detection counts, and the same for the task `counting`."""
MAX_OBJECTS = 16
"""Detections kept of each class."""
MAX_COUNT = 100
"""Largest count of a clause."""
POSITION_THRESHOLD = 0.1
"""Share of two objects' summed sides by which their centres must be apart."""


@dataclass
class Detection:
    """One object that was found."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, pixels."""
    mask: Any = None
    """bool [H, W] of its pixels, or None."""
    color: str | None = None
    """Its colour, where the detector knows it."""


@dataclass(frozen=True)
class Clause:
    """At least (include) or fewer than (exclude) `count` objects of a class; perhaps of a colour or in a relation."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """Relation, and the number of the include clause whose objects it is to."""


@dataclass(frozen=True)
class Item:
    """One prompt of the benchmark."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a line of the published metadata."""

        def plain(clause: Clause) -> dict[str, Any]:
            out: dict[str, Any] = {"class": clause.label, "count": clause.count}
            if clause.color:
                out["color"] = clause.color
            if clause.position:
                out["position"] = list(clause.position)
            return out

        made = {"tag": self.tag, "include": [plain(c) for c in self.include]}
        return made | ({"exclude": [plain(c) for c in self.exclude]} if self.exclude else {}) | {"prompt": self.prompt}


_METADATA_HINT = "each line is {tag, include, exclude?, prompt}, as in GenEval's evaluation_metadata.jsonl"


def read_item(entry: Any, where: str) -> Item:
    """One line of the metadata. Raises BadRow naming `where` for one of another form."""
    if not isinstance(entry, dict):
        raise BadRow(f"{where}: not GenEval metadata: {kind(entry)}, not an object", hint=_METADATA_HINT)
    try:
        clauses = [tuple(_clause(c, where) for c in entry.get(part) or []) for part in ("include", "exclude")]
        item = Item(str(entry["tag"]), sound_prompt(entry["prompt"], where), *clauses)
    except KeyError as error:
        raise BadRow(f"{where}: not GenEval metadata: lacks {error.args[0]!r}", hint=_METADATA_HINT) from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadRow(f"{where}: not GenEval metadata: {error}", hint=_METADATA_HINT) from None
    if item.tag not in TASKS or not item.include:
        raise BadRow(f"{where}: task {short(item.tag)} is none of GenEval's", hint=f"tasks are {', '.join(TASKS)}")
    return item


def _clause(entry: dict[str, Any], where: str) -> Clause:
    count, position = entry["count"], entry.get("position")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MAX_COUNT:
        raise BadRow(f"{where}: the count {short(count)} is not from 1 to {MAX_COUNT}", hint=_METADATA_HINT)
    if not isinstance(entry["class"], str):
        raise BadRow(f"{where}: a class is {kind(entry['class'])}, not text", hint=_METADATA_HINT)
    place = None if position is None else (str(position[0]), int(position[1]))
    return Clause(entry["class"], count, entry.get("color"), place)


def read_metadata(path: str | Path, *, max_bad: float = MAX_BAD) -> list[Item]:
    """The published evaluation_metadata.jsonl: 553 prompts.

    Up to `max_bad` percent of damaged lines are left out with one DrmWarning. Raises InputError naming the line.
    """
    path = Path(path)
    bad, found = LeftOut(max_bad), []
    for number, line in enumerate(lines(read_text(path, hint="give GenEval's evaluation_metadata.jsonl")), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found.append(
                read_item(parse_json(line, f"{path}: cannot be read: line {number}", hint=_METADATA_HINT), where)
            )
        except BadRow as fault:
            bad.add(fault)
        except InputError as error:
            bad.add(BadRow(error.message, hint=error.hint))
    bad.settle(len(found) + len(bad.faults))
    bad.tell(str(path))
    if not found:
        raise InputError(f"{path}: holds no prompt", hint="give GenEval's evaluation_metadata.jsonl")
    return found


def surest(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count for a task, by class, surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        kept = found.setdefault(d.label, [])
        if d.score > least and len(kept) < MAX_OBJECTS:
            kept.append(d)
    return {label: kept for label, kept in found.items() if kept}


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is, seen from b: any of left of, right of, above, below.

    The offset of the centres, each axis shortened by a tenth of the summed sides, must point within 60 degrees of the direction.
    """
    boxes = np.array([a.box, b.box], dtype=float).reshape(2, 2, 2)  # object, corner, axis
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sides = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    beyond = np.sign(offset) * np.clip(np.abs(offset) - POSITION_THRESHOLD * sides, 0, None)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {
        name
        for name, holds in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        if holds
    }


ColorOf = Callable[[list[Detection], str], list[str]]
"""Colours of some detections of one class."""


def evaluate(item: Item, detections: Sequence[Detection], colors: ColorOf) -> tuple[bool, str]:
    """Does a picture with these detections show what the item asks for? With the reasons if not."""
    found, faults = surest(detections, item.tag), []
    groups: list[list[Detection] | None] = []
    for clause in item.include:
        fault, objects = None, found.get(clause.label, [])[: clause.count]
        if len(objects) < clause.count:
            fault = f"{len(objects)} of {clause.count} {clause.label}"
        if fault is None and clause.color:
            seen = colors(objects, clause.label)
            if seen.count(clause.color) < clause.count:
                fault = f"{clause.label} is {', '.join(seen)}, not {clause.color}"
        if fault is None and clause.position:
            relation, number = clause.position
            others = groups[number] if number < len(groups) else None
            if others is None:
                fault = f"nothing that {clause.label} could be {relation}"
            elif any(relation not in relations(a, b) for a in objects for b in others):
                fault = f"{clause.label} is not {relation} {item.include[number].label}"
        groups.append(objects if fault is None else None)
        if fault:
            faults.append(fault)
    for clause in item.exclude:
        if (count := len(found.get(clause.label, []))) >= clause.count:
            faults.append(f"{count} {clause.label}, not fewer than {clause.count}")
    return not faults, "; ".join(faults)


def summarize(tags: Sequence[str], prompts: Sequence[int], correct: Sequence[bool]) -> dict[str, Any]:
    """Accuracy of each task over its pictures, and the overall: the mean over tasks. In percent, intervals clustered by prompt.

    tags, prompts (which prompt a picture is of) and correct: one a picture.
    """
    tag, prompt, right = np.array(tags), np.array(prompts), np.array(correct, dtype=float)
    tasks = []
    for name in (t for t in TASKS if (tag == t).any()):
        mine = tag == name
        found = mean_ci(right[mine], prompt[mine])
        tasks.append(
            {
                "task": name, "correct": int(right[mine].sum()), "n": int(mine.sum()), "accuracy": 100 * found.value,
                "ci95": [100 * max(0.0, found.ci95[0]), 100 * min(1.0, found.ci95[1])],
            }
        )  # fmt: skip
    by_prompt = [right[prompt == p].max() for p in np.unique(prompt)]
    return {
        "tasks": tasks,
        "overall": float(np.mean([t["accuracy"] for t in tasks])),
        "correct_images": 100 * float(right.mean()),
        "correct_prompts": 100 * float(np.mean(by_prompt)),
        "n_prompts": len(by_prompt),
        "n_images": len(right),
    }
