"""What a run measures: metrics.csv, a row per step, and the area under a ROC curve."""

import csv
import os
from pathlib import Path

import numpy as np

COLUMNS = ("step", "tokens", "flops", "loss", "train-loss", "learning-rate")


class MetricsLog:
    """metrics.csv of one run. Rows reach the disk at every step; a full disk only delays them."""

    def __init__(self, path: Path, start_step: int = 0):
        """Begin the file, or keep its rows before start_step when a run is continued."""
        rows = [row for row in read_rows(path) if int(row[0]) < start_step] if start_step else []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._pending: list[tuple] = [COLUMNS, *rows]
        self._good_bytes = 0
        self._flush()

    def append(self, *row: float) -> None:
        """Add one row, in the order of COLUMNS. Floats are written so that they read back exactly."""
        self._pending.append(row)
        self._flush()

    def _flush(self) -> None:
        try:
            self._writer.writerows(self._pending)
            self._file.flush()
        except OSError:  # keep the rows, and no half-written line, until there is room again
            self._file = _reopened(self._file, self._good_bytes)
            self._writer = csv.writer(self._file, lineterminator="\n")
            return
        self._pending.clear()
        self._good_bytes = self._file.tell()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def _reopened(file, size: int):
    """The same file without what its failed writes left in the buffer and past `size` bytes."""
    os.truncate(file.name, size)
    descriptor = file.fileno()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)  # closing flushes the rest of the buffer: let it go nowhere
    os.close(null)
    file.close()
    reopened = open(file.name, "a", newline="", encoding="utf-8")  # noqa: SIM115 (the log owns it)
    return reopened


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a metrics.csv without its header; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = list(csv.reader(lines[1:-1]))  # what stands after the last line break is no whole row
    return [row for row in rows if len(row) == len(COLUMNS)]


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
