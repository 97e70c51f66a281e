"""Errors that a user can act on: one line of fact, one hint, an exit code. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class DrmError(Exception):
    """Something the user can mend.

    `message` names the flag or file first and then the fact; `hint` says what to do next. `exit_code` is the process's:
    1 the run failed, 2 usage, config or input, 3 a model, dataset or access is missing, 130 interrupted.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str):
        super().__init__(message)
        self.message = message
        self.hint = hint


class DrmWarning(UserWarning):
    """Something that was left out or taken otherwise than written. The command line shows it as a line `warning: ...`."""


class RunError(DrmError):
    """The run itself failed: a loss that is not finite, a full disk, too many bad images."""

    exit_code = 1


class InputError(DrmError):
    """A flag, a config key or an input file is wrong."""

    exit_code = 2


class MissingError(DrmError):
    """A model, a dataset or the access to it is missing."""

    exit_code = 3


class Interrupted(DrmError):
    """Ctrl-C or SIGTERM; progress is saved."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, where PyTorch raises a RuntimeError for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        mark in said for mark in ("out of memory", "allocate memory", "bad_alloc")
    )
