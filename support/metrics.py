"""What a run measures: metrics.csv, a row per step, and the area under a ROC curve."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from support.files import write_atomically

COLUMNS = ("step", "tokens", "flops", "loss", "train-loss", "learning-rate")


class MetricsLog:
    """metrics.csv of one run. Rows reach the file at every step; a full disk only delays them."""

    def __init__(self, path: Path, start_step: int = 0):
        """Begin the file, or keep its rows before start_step when a run is continued. May raise OSError."""
        rows = [row for row in read_rows(path) if int(row[0]) < start_step] if start_step else []
        write_atomically(path, "".join(map(_line, [COLUMNS, *rows])))
        self._file = path.open("ab", buffering=0)  # unbuffered: what write() took is in the file
        self._pending = b""

    def append(self, *row: float) -> None:
        """Add one row, in the order of COLUMNS. Floats are written so that they read back exactly."""
        self._pending += _line(row).encode()
        with suppress(OSError):  # kept, and tried again with the next row; `sync` tells
            self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:  # a disk may take a part of a line and fail with the rest
            self._pending = self._pending[self._file.write(self._pending) :]

    def sync(self) -> None:
        """Wait until all rows are on the disk. May raise OSError."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def _line(row) -> str:
    return ",".join(map(str, row)) + "\n"


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a metrics.csv without its header, none that a crash cut short or that is foreign."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [line.split(",") for line in lines[1:-1]]  # what stands after the last line break is no whole row
    return [row for row in rows if len(row) == len(COLUMNS) and _is_numeric(row)]


def _is_numeric(row: list[str]) -> bool:
    try:
        return bool([int(row[0]), *map(float, row)])
    except ValueError:
        return False


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a metrics.csv by name."""
    columns = np.array(read_rows(path), dtype=float).reshape(-1, len(COLUMNS)).T
    return dict(zip(COLUMNS, columns, strict=True))


def area_under_roc(p: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a random positive has a larger p than a random negative, ties counting half.

    NaN when one class is missing. This is the Mann-Whitney statistic (Hanley and McNeil 1982).
    """
    values, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of tied values, from 1
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    rank_sum = middle_rank[inverse][labels == 1].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
