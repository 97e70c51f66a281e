"""The one way Parquet files are opened to be read: by Python, which takes a path as it stands.

pyarrow itself reads a path as more than a path: `~` at its head as the home folder, `s3:` and `file:` as places that are not on this
disk; and it cannot open a name that is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file, to be read in parts."""
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        yield file


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file, or some of its columns."""
    with path.open("rb") as raw:
        return pq.read_table(raw, columns=columns)
