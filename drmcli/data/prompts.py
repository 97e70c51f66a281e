"""Prompts to draw, from the files they are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drmcli.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def read_prompts(path: str | Path, *, flag: str = "--prompts") -> list[str]:
    """The prompts of a file, in its order, doubles included.

    `.txt` (and any other ending): a prompt a line. `.jsonl`: texts, or objects with `prompt` (GenEval's metadata). `.json`: a list of
    texts (HPSv2's benchmark lists) or of such objects. Raises InputError naming `flag` for what cannot be read or holds none.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{flag} {path}: cannot be read: {reason}", hint="give a text file with a prompt a line"
        ) from None
    try:
        if path.suffix == ".json":
            entries = json.loads(text)
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = text.splitlines()
    except ValueError as error:
        raise InputError(
            f"{flag} {path}: damaged: {error}", hint="write a prompt a line, or JSON objects with `prompt`"
        ) from None
    if not isinstance(entries, list):
        raise InputError(f"{flag} {path}: not a list", hint="write a list of texts, or of objects with `prompt`")
    found = [_prompt(entry, i, path, flag) for i, entry in enumerate(entries)]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise InputError(f"{flag} {path}: holds no prompt", hint="write a prompt a line")
    return found


def _prompt(entry: Any, number: int, path: Path, flag: str) -> str:
    text = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise InputError(
            f"{flag} {path}: entry {number + 1} has no prompt", hint="write texts, or objects with `prompt`"
        )
    return text.strip()


def holds_prompts_only(path: str | Path) -> bool:
    """Is this a file of prompts, and not of preferences? By its ending, and by its first entry, which must name no picture.

    Any picture rules it out, whatever its column: lists as HPDv2 and ImageReward publish them, and pairs with a column misspelt,
    would else be drawn anew in place of being measured or refused.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return path.is_file()
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    try:
        text = path.read_text()
        first = json.loads(text)[0] if path.suffix == ".json" else json.loads(text.lstrip().splitlines()[0])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return False
    return isinstance(first, str) or (isinstance(first, dict) and "prompt" in first and not _names_picture(first))


def _names_picture(entry: dict[str, Any]) -> bool:
    values = [v for k, v in entry.items() if k != "prompt"]
    texts = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, str)]
    return bool({"chosen", "images"} & entry.keys()) or any(t.lower().endswith(PICTURES) for t in texts)
