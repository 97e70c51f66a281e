"""Scorers of the user's own: what they raise is told as theirs, with the file and the line."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

from faults import fault
from faults.data import png

NUMBER = iter(range(1000))


def own(name: str, code: int, says: str, body: str, *, whole: str | None = None, function: str = "f", **more):
    """A module of its own name a row: Python imports one of a name once."""
    module = f"mine{next(NUMBER)}"
    source = whole if whole is not None else f"def f(images, prompts):\n    {body}\n"
    command = ["score", "a.png", "--prompt", "x", "--reward", f"{module}:{function}", "--json", "--out", "r"]
    return fault(
        f"scorer {name}",
        command,
        code,
        says.replace("FILE", rf"{module}\.py"),
        {f"{module}.py": source, "a.png": png()},
        **more,
    )


FAULTS = [
    own("raises", 1, r"--reward mine\d+:f: RuntimeError: no luck \(FILE line 2\)", 'raise RuntimeError("no luck")'),
    own("raises KeyError", 1, r"KeyError: 'x' \(FILE line 2\)", 'return {}["x"]'),
    own("raises ValueError", 1, r"ValueError: .*\(FILE line 2\)", 'return [int("x")]'),
    own("calls sys.exit", 1, r"called sys.exit: 0 \(FILE line 2\)", "import sys; sys.exit(0)"),
    own("recurses without end", 1, r"RecursionError: .*\(FILE line 2\)", "return f(images, prompts)"),
    own("imports what is not installed", 1, r"No module named 'no_such_library' \(FILE line 2\)", "import no_such_library"),
    own("divides by zero on import", 1, r"ZeroDivisionError: .*\(FILE line 1\)", "", whole="1 / 0\n"),
    own("exits on import", 1, r"called sys.exit: 0 \(FILE line 1\)", "", whole="import sys; sys.exit(0)\n"),
    own("has a syntax error", 1, r"SyntaxError: .*\(FILE line 1\)", "", whole="def f(:\n"),
    own("needs what is not installed", 2, "there is no module no_such_library", "", whole="import no_such_library\n"),
    own("has no such function", 2, "has no callable 'g'", "return 1", function="g"),
    own("has no name", 2, "has no callable", "", whole="f = 3\n"),
    own("gives text", 1, "gave list, not numbers", 'return ["a"] * len(images)'),
    own("gives nothing", 1, "gave NoneType, not numbers", "pass"),
    own("gives a huge number", 1, "gave list, not numbers", "return [10 ** 400]"),
    own("gives complex numbers", 1, "gave list, not numbers", "return [1j]"),
    own("gives NaN", 1, "a score is not finite", 'return [float("nan")]'),
    own("gives too many", 1, r"\[2\] scores for 1 pictures", "return [1.0, 2.0]"),
    own("gives a column", 1, r"\[1, 1\] scores for 1 pictures", "return [[1.0]]"),
    own("gives one number", 1, r"\[\] scores for 1 pictures", "return 1.0"),
    own("runs out of memory", 1, "out of memory", "raise MemoryError()"),
    own("asks for a terabyte", 1, "out of memory", "import torch; torch.empty(2 ** 46)"),
    own("is interrupted", 130, "interrupted", "raise KeyboardInterrupt"),
    own("prints", 0, r'"score": 0.5', 'print("noise {"); return [0.5]'),
    own("prints on import", 0, r'"score": 0.5', "", whole='print("noise {")\ndef f(images, prompts):\n    return [0.5] * len(images)\n'),
    fault("scorer weight nan", "grpo --add-reward shapes=nan --updates 1 --out r", 2, "--add-reward shapes=nan: the weight( nan)? is not finite"),
    fault("scorer is not there", ["score", "a.png", "--prompt", "x", "--reward", "nosuch:f"], 2, "there is no module nosuch", {"a.png": png()}),
    fault("scorer named as a file", ["score", "a.png", "--prompt", "x", "--reward", "nosuch.py:f"], 2, "there is no module", {"a.png": png()}),
]  # fmt: skip
