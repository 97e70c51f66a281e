"""Prompts to draw, from the files they are published in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drmcli.config import package_path
from drmcli.data.rows import MAX_BAD, BadRow, LeftOut, Table, sound_prompt
from drmcli.data.text import lines, parse_json, read_text, short
from drmcli.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff")
COLUMNS = ("prompt", "prompts", "prompt_en", "text", "caption", "captions")
"""Where a table or an object has its prompt; the first that is there is taken, upper or lower case."""
KEYS = tuple(column for column in COLUMNS if column != "text")
"""Where an object has it: an object with `text` may be anything."""
TABLES = (".csv", ".tsv")


def _shapes() -> dict[str, list[str]]:
    from drmcli.tiny import world  # with numpy, which takes longer to import than a file of prompts to read

    return {split: list(world.captions(split)) for split in world.SPLITS}


PROMPT_SETS: dict[str, Callable[[], dict[str, list[str]]]] = {"shapes": _shapes}
"""Sets of prompts that are made, not read: their prompts by split (train, val, test)."""
_HINT = "write a prompt a line, JSON texts or objects with `prompt`, or a table with a column `prompt`"


def read_prompts(
    path: str | Path, *, flag: str = "--prompts", every: bool = False, max_bad: float = MAX_BAD
) -> list[str]:
    """The prompts of a file, in its order, doubles included.

    `.txt` (and any other ending): a prompt a line, blank lines not counted. `.csv`, `.tsv`: a table with a header and a column of
    `COLUMNS`, separated by commas, semicolons or tabs. `.jsonl`: texts, or objects with such a key (GenEval's metadata). `.json`: a list
    of texts (HPSv2's benchmark lists) or of such objects.

    Empty and null prompts, and up to `max_bad` percent of damaged rows, are left out with one DrmWarning; with `every`
    nothing may be left out, for prompts that belong to something in the same order. Raises InputError naming `flag` for what cannot be
    read or holds no prompt.
    """
    path = Path(path)
    name = f"{flag} {path}"
    text = read_text(path, name=name, hint="give a text file with a prompt a line")
    bad, empty, found = LeftOut(0 if every else max_bad), LeftOut(0 if every else 100), []
    for place, value in _entries(path, text, name, bad):
        if value is None or (isinstance(value, str) and not value.strip()):
            empty.add(BadRow(f"{place} has no prompt but {'null' if value is None else 'empty text'}", hint=_HINT))
            continue
        try:
            found.append(sound_prompt(value, place).strip())
        except BadRow as fault:
            bad.add(fault)
    total = len(found) + len(bad.faults) + len(empty.faults)
    for left_out in (bad, empty):
        left_out.settle(total)
        left_out.tell(name)
    if not found:
        raise InputError(f"{name}: holds no prompt", hint=_HINT)
    return found


def _entries(path: Path, text: str, name: str, bad: LeftOut) -> Iterator[tuple[str, Any]]:
    """(place, prompt or what stands for it) of each entry."""
    ending = path.suffix.lower()
    if ending in TABLES:
        table = Table(text, name, COLUMNS)
        column = next((column for column in COLUMNS if column in table.columns), None)
        if column is None:
            shown = ", ".join(short(column, 40) for column in table.columns[:8]) or "nothing"
            raise InputError(
                f"{name}: no column `prompt`: found {shown}",
                hint="name the column of prompts `prompt` in the first line, or save a prompt a line as .txt",
            )
        yield from ((f"{name}: line {line}", fields[column]) for line, fields in table.rows(bad.add))
    elif ending == ".json":
        content = parse_json(text, f"{name}:", hint=_HINT)
        if not isinstance(content, list):
            raise InputError(f"{name}: not a list", hint="write a list of texts, or of objects with `prompt`")
        for number, entry in enumerate(content, 1):
            yield from _value(entry, f"{name}: entry {number}", bad)
    elif ending == ".jsonl":
        for number, line in enumerate(lines(text), 1):
            if line.strip():
                place = f"{name}: line {number}"
                try:
                    entry = parse_json(line, place, hint=_HINT)
                except InputError as error:
                    bad.add(BadRow(error.message, hint=error.hint))
                    continue
                yield from _value(entry, place, bad)
    else:
        yield from ((f"{name}: line {n}", line) for n, line in enumerate(lines(text), 1) if line.strip())


def _value(entry: Any, place: str, bad: LeftOut) -> Iterator[tuple[str, Any]]:
    if isinstance(entry, dict):
        lower = {str(key).lower(): value for key, value in entry.items()}
        column = next((key for key in KEYS if key in lower), None)
        if column is None:
            shown = ", ".join(short(key, 40) for key in list(entry)[:8]) or "nothing"
            bad.add(BadRow(f"{place} has no prompt: found {shown}", hint="write texts, or objects with `prompt`"))
            return
        entry = lower[column]
    yield place, entry


def of_generators(dataset: str) -> bool:
    """Does a benchmark's dataset measure what a generator draws, and not how pairs are judged?"""
    return dataset in ("geneval", "shapes-prompts") or holds_prompts_only(package_path(dataset))


def holds_prompts_only(path: str | Path) -> bool:
    """Is this a file of prompts, and not of preferences? By its ending, and by its first entry, which must name no picture.

    Any picture rules it out, whatever its column: lists as HPDv2 and ImageReward publish them, and pairs with a column misspelt,
    would else be drawn anew in place of being measured or refused.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".txt", ".json", ".jsonl", *TABLES) or not path.is_file():
        return False
    if ending == ".txt":
        return True
    try:
        text = read_text(path)
        if ending in TABLES:
            table = Table(text, str(path), COLUMNS)
            first: Any = next((dict(row) for _, row in table.rows(lambda _: None)), None)
            if first is None:
                first = dict.fromkeys(table.columns, "")
        else:
            whole = ending == ".json"
            line = text if whole else next((line for line in lines(text) if line.strip()), "")
            first = parse_json(line, str(path), hint=_HINT)
            first = first[0] if whole else first
    except (InputError, LookupError, TypeError):
        return False
    return isinstance(first, str) or (isinstance(first, dict) and _asks(first) and not _names_picture(first))


def _asks(entry: dict[str, Any]) -> bool:
    return any(str(key).lower() in COLUMNS for key in entry)


def _names_picture(entry: dict[str, Any]) -> bool:
    values = [v for k, v in entry.items() if str(k).lower() not in COLUMNS]
    texts = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, str)]
    keys = {str(key).lower() for key in entry}
    return bool({"chosen", "images"} & keys) or any(t.lower().endswith(PICTURES) for t in texts)
