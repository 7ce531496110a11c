"""The figures of the answers. Colours are those of Okabe and Ito, distinct with every kind of colour vision."""

import os
from pathlib import Path

import numpy as np

os.environ.setdefault("MPLBACKEND", "Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, GREEN = COLOURS = ("#0072B2", "#D55E00", "#009E73")
DASHES = ("-", "--", "-.")
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
SIZE = (7.2, 2.8)  # inches, about the width of the text, so that letters keep their size


def save(figure, path: Path) -> None:
    """Without the date, so that the same numbers give the same file."""
    figure.savefig(path, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(figure)


def plot_curves(
    path: Path,
    curves: dict[str, np.ndarray],
    ends: dict[str, float] | None = None,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
) -> None:
    """Training losses, rows of (step, running mean), by label; `ends` are validation losses, `level` a line."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        for (label, losses), colour, dashes in zip(curves.items(), COLOURS, DASHES, strict=False):
            steps = losses[:, 0] + 1
            axes.plot(steps, losses[:, 1], dashes, color=colour, linewidth=2, label=label)
            if ends:
                axes.plot(steps[-1], ends[label], "o", markersize=8, color=colour, clip_on=False)
        if ends:
            axes.plot([], [], "o", markersize=8, color="#555555", label="validation loss")
        if level:
            axes.axhline(level[1], color="#333333", linewidth=1.2, linestyle=":", label=level[0])
        if log_x:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss, mean of\n20 steps (nats per token)")
        axes.legend()
        save(figure, path)


def plot_histogram(path: Path, p: np.ndarray, labels: np.ndarray, boundaries: dict[str, float]) -> None:
    """p(positive) of the truly negative and positive reviews, over the range of nearly all of them."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        low, high = np.quantile(p, [0.005, 0.995])
        bins = np.linspace(low, high, 31)
        inside = np.clip(p, low, high)
        axes.hist(inside[labels == 0], bins, color=ORANGE, alpha=0.45, label="negative reviews")
        axes.hist(inside[labels == 1], bins, color=BLUE, histtype="step", linewidth=2, label="positive reviews")
        for (rule, boundary), dashes in zip(boundaries.items(), ("-", "--", ":"), strict=False):
            if low <= boundary <= high:
                axes.axvline(boundary, color="#333333", linestyle=dashes, label=f"{rule}: {boundary:.3f}")
        axes.set_xlim(low, high)
        axes.set_xlabel('p(positive): share of " good" against " bad" as the next token')
        axes.set_ylabel("reviews")
        axes.legend()
        save(figure, path)
