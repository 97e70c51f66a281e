"""Ctrl-C, SIGTERM, closed and full streams, and whatever a library raises: one line, the right exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drmcli import signals
from drmcli.errors import Interrupted
from drmcli.recipes import show as recipe

DRM = [sys.executable, "-m", "drmcli"]


def swallowed() -> None:
    """As a library does that catches BaseException and raises what is its own."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("cannot import name 'x'") from None


def raises(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


ENDS: dict[str, tuple[Callable[[], object], int, str, str]] = {
    "ctrl-c": (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "error: interrupted", "run the same command again"),
    "sigterm": (lambda: os.kill(os.getpid(), signal.SIGTERM), 130, "error: interrupted", "run the same command again"),
    "swallowed": (swallowed, 130, "error: interrupted", "run the same command again"),
    "keyboard": (raises(KeyboardInterrupt()), 130, "error: interrupted", "run the same command again"),
    "eof": (raises(EOFError("no data")), 1, "error: internal: EOFError: no data", "--debug"),
    "exit": (raises(SystemExit(0)), 1, "error: internal: something called sys.exit(0)", "--debug"),
    "memory": (raises(MemoryError()), 1, "error: out of memory", "smaller"),
    "cuda": (raises(RuntimeError("CUDA out of memory. Tried")), 1, "error: out of memory", "smaller"),
    "cpu": (raises(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")), 1, "error: out of memory", "--dry-run"),
    "disk": (raises(OSError(28, "No space left on device", "a/b")), 1, "error: a/b: cannot write", "make room"),
    "library's disk": (raises(RuntimeError("I/O error: No space left on device (os error 28)")), 1, "cannot write", "make room"),
    "pipe": (raises(BrokenPipeError(32, "Broken pipe")), 1, "error: internal: BrokenPipeError", "--debug"),
    "recursion": (raises(RecursionError("deep")), 1, "error: internal: RecursionError", "--debug"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_how_a_command_ends(kind: str, monkeypatch: pytest.MonkeyPatch, drm) -> None:
    end, code, error, hint = ENDS[kind]
    monkeypatch.setattr(recipe, "gather", lambda run: end())
    before = [signal.getsignal(number) for number in signals.STOPPING]
    result = drm("show", "somewhere")
    assert result.code == code
    lines = result.err.splitlines()
    assert len(lines) == 2
    assert error in lines[0]
    assert hint in lines[1]
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert not signals.came()


def test_a_loop_stops_at_a_step_and_the_second_signal_at_once() -> None:
    with signals.watched():
        with signals.Interruptions() as interruptions:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruptions.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="interrupted: half is done"):
            signals.check("half is done")
        with signals.Interruptions() as interruptions:  # a second loop of the same command, as in a demo
            assert interruptions.asked
    signals.check()


def test_a_signal_while_libraries_are_imported(tmp_path: Path) -> None:
    """The first line is said before the imports; a signal after it is answered, whatever was being imported."""
    command = [*DRM, "sample", "a circle", "--steps", "1", "--reward", "none", "--out", str(tmp_path / "o")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("note: drm sample on cpu in fp32, seed 0, into ")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.splitlines() == ["error: interrupted", "hint: run the same command again to go on"]
    assert out == ""


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("{drm} config list > /dev/full", 1, "error: stdout: cannot be written: No space left on device"),
        ("{drm} config list >&-", 1, "error: stdout: cannot be written: is closed"),
        ("{drm} --help > /dev/full", 1, "error: stdout: cannot be written: No space left on device"),
        ("{drm} config show tiny --command train-reward | head -1", 0, ""),
        ("{drm} config show nope 2>&-", 2, ""),
    ],
)
def test_streams(shell: str, code: int, says: str) -> None:
    """Full, closed and read only in part."""
    command = f"set -o pipefail; {shell.format(drm=' '.join(DRM))}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert not done.stderr if not says else [x.split(":")[0] for x in done.stderr.splitlines()] == ["error", "hint"]


def test_what_a_library_prints_is_not_the_result(monkeypatch: pytest.MonkeyPatch, drm) -> None:
    from drmcli.recipes import score

    def run(config: object, reporter: object) -> dict[str, object]:
        print("a library's print")
        return {"command": "score"}

    monkeypatch.setattr(score, "run", run)
    Path("a.png").touch()
    result = drm("score", "a.png", "--prompt", "x", "--json")
    assert result.json == {"command": "score"}
    assert "a library's print" in result.err
