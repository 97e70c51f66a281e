"""Rows of a file, good and bad: a table's header and rows, and the count of what cannot be used."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Collection, Iterator

from drmcli.data.text import cut, kind, short, sound
from drmcli.errors import DrmWarning, InputError

MAX_BAD = 1.0
"""Percent of bad rows, or of bad pictures, above which a file is refused."""
DELIMITERS = (",", ";", "\t")


class BadRow(InputError):
    """One row that cannot be used. Readers of many rows count it in `LeftOut` and go on."""


class LeftOut:
    """Bad rows of one file: named, counted and left out, as long as they are few."""

    def __init__(self, max_bad: float = MAX_BAD):
        self.max_bad = max_bad
        self.faults: list[BadRow] = []

    def add(self, fault: BadRow) -> None:
        self.faults.append(fault)

    @property
    def names(self) -> list[str]:
        return [fault.message for fault in self.faults]

    def settle(self, total: int) -> None:
        """Raise InputError with the first fault when more than `max_bad` percent of `total` rows, or all, are bad."""
        count = len(self.faults)
        if count and (count >= total or 100 * count > self.max_bad * total):
            first = self.faults[0]
            many = f" ({count} of {total} rows cannot be used)" if total > 1 else ""
            raise InputError(f"{first.message}{many}", hint=first.hint)

    def tell(self, name: str) -> None:
        """One DrmWarning with the count and the first fault; nothing when there is none."""
        if self.faults:
            rows = "1 row" if len(self.faults) == 1 else f"{len(self.faults)} rows"
            text = f"{name}: left out {rows} that cannot be used, the first: {cut(self.faults[0].message, 300)}"
            warnings.warn(text, DrmWarning, stacklevel=3)


class Table:
    """A table with a header, separated by commas, semicolons (as spreadsheets write it in much of Europe) or tabs.

    Names in the header lose the spaces around them, and are lower case where that makes one of `known`. Raises InputError naming the
    file for a table without a header or with a column twice; iterating gives (line number, fields by column) and raises it for what is
    no table. A row of another length than the header raises BadRow through `bad`.
    """

    def __init__(self, text: str, name: str, known: Collection[str]):
        self.name = name
        sep, first, rest = "", *_partition(text)
        if first.lower().startswith("sep=") and len(first) == 5:  # what spreadsheets put in front for themselves
            sep, text = first[4], rest
        self._delimiter = sep or _delimiter(text, known)
        self._lines_before = 1 if sep else 0
        self._line = 0
        self._reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)
        try:
            found = next((fields for fields in self._reader if fields), [])
        except csv.Error as error:
            raise self._damaged(error) from None
        self._line = self._reader.line_num + self._lines_before
        self.columns = [low if (low := field.strip().lower()) in known else field.strip() for field in found]
        twice = [column for i, column in enumerate(self.columns) if column and column in self.columns[:i]]
        if twice:
            raise InputError(
                f"{name}: the column {short(twice[0])} is there twice", hint="rename or remove one of them"
            )

    def rows(self, bad: Callable[[BadRow], None]) -> Iterator[tuple[int, dict[str, str]]]:
        """(line number, fields by column) of every row that has as many fields as the header."""
        try:
            for fields in self._reader:
                if not fields:
                    continue
                line = self._line = self._reader.line_num + self._lines_before
                extra = fields[len(self.columns) :]
                if len(fields) < len(self.columns) or any(extra):
                    bad(
                        BadRow(
                            f"{self.name}: line {line} has another number of fields than the header",
                            hint='put text with commas in quotes: "a cat, asleep"',
                        )
                    )
                    continue
                yield line, {column: value for column, value in zip(self.columns, fields) if column}
        except csv.Error as error:
            raise self._damaged(error) from None

    def _damaged(self, error: csv.Error) -> InputError:
        return InputError(
            f"{self.name}: not CSV after line {self._line} ({error})",
            hint='put text with commas or quotes in quotes: "a ""big"" cat"',
        )


def sound_prompt(value: object, place: str) -> str:
    """A prompt of a row. Raises BadRow for a null, something else than text, an empty text, and what is no UTF-8."""
    if not isinstance(value, str):
        raise BadRow(f"{place}: prompt is {kind(value)}, not text", hint="give each row its prompt as text")
    if not value.strip():
        raise BadRow(f"{place}: the prompt is empty", hint="give the prompt, or remove the row")
    try:
        return sound(value, f"{place}: prompt")
    except InputError as error:
        raise BadRow(error.message, hint=error.hint) from None


def _partition(text: str) -> tuple[str, str]:
    first, _, rest = text.partition("\n")
    return first.rstrip("\r"), rest


def _delimiter(text: str, known: Collection[str]) -> str:
    """The delimiter by which the header has most known columns; of equals, the one that makes most columns."""

    def fit(delimiter: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text[:100_000], newline=""), delimiter=delimiter), [])
        except csv.Error:
            return 0, 0
        return sum(field.strip().lower() in known for field in header), len(header)

    return max(DELIMITERS, key=fit)
