"""metrics.csv: one row per training step; validation.csv: one per validation loss.

While a run is unfinished, they are called metrics.partial.csv and validation.partial.csv (run_folder.py).
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.files import write_atomically

COLUMNS = ("step", "tokens", "flops", "loss", "train-loss", "learning-rate")
VALIDATION_COLUMNS = ("step", "val-loss")


class MetricsLog:
    """One of these files. Each row is written at once; while the disk is full, rows wait in memory."""

    def __init__(self, path: Path, n_rows: int = 0, columns: tuple[str, ...] = COLUMNS):
        """Start the file, or keep its first n_rows rows if a run is resumed. May raise OSError."""
        rows = path.read_text(errors="replace").splitlines(keepends=True)[1:] if path.exists() else []
        write_atomically(path, ",".join(columns) + "\n" + "".join(rows[:n_rows]))
        self._file = path.open("ab", buffering=0)  # unbuffered: what was written is in the file
        self._pending = b""

    def append(self, *row: float) -> None:
        """Add one row in the order of the columns, with floats that read back exactly."""
        self._pending += (",".join(map(str, row)) + "\n").encode()
        with suppress(OSError):  # tried again with the next row; `sync` raises
            self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:  # a disk may take only a part of a line
            self._pending = self._pending[self._file.write(self._pending) :]

    def sync(self) -> None:
        """Flush all rows to the disk. May raise OSError."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a metrics.csv or validation.csv by name, one float per row."""
    names, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return dict(zip(names, np.array(rows, dtype=float).reshape(-1, len(names)).T, strict=True))
