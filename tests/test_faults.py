"""Every kind of bad input and fault: the right exit code, one line that says it, a hint, no traceback, no internal error."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from faults import Fault, every

ROWS = every()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_fault(row: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    for name, content in row.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if row.make is not None:
        row.make(tmp_path)
    for key, value in row.env.items():
        monkeypatch.setenv(key, value)
    if row.stdin is not None:
        data = row.stdin if isinstance(row.stdin, bytes) else row.stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    result = drm(*row.command)
    both = result.out + result.err
    assert result.code == row.code, both[-2000:]
    assert re.search(row.says, both), both[-2000:]
    assert "internal" not in both and "Traceback" not in both
    assert not row.never or not re.search(row.never, both), both[-2000:]
    lines = [line for line in result.err.splitlines() if line.startswith(("error:", "hint:"))]
    if row.code == 0:
        assert not lines
        if "--json" in row.command:
            json.loads(result.out)
    elif not result.out:
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
        assert all(len(line) <= 1000 for line in lines), "a message is a line, not a page"


def test_there_are_many() -> None:
    assert len(ROWS) >= 150
