"""The figures: the training curve and the histogram of p(positive)."""

from functools import wraps
from pathlib import Path

import numpy as np

from support.errors import first_line
from support.files import atomic_file
from support.metrics import read_metrics
from support.screen import show_note

INK, TRAIN, RATE, BAD, GOOD = "#333333", "#1f6fb2", "#d98c2b", "#c2513c", "#2f8f6b"


def never_fails(draw):
    """Decorator: a figure that cannot be drawn (no disk space, no matplotlib) costs a note, not the run."""

    @wraps(draw)
    def drawn(*args) -> None:
        try:
            draw(*args)
        except Exception as error:
            show_note(f"Could not draw {args[-1].name}: {first_line(error)}")

    return drawn


def _figure(width: float, height: float, n_rows: int = 1, **kwargs):
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK}
    with rc_context(style):
        figure = Figure((width, height), layout="constrained")
        return figure, figure.subplots(n_rows, 1, **kwargs)


def _save(figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


@never_fails
def plot_curve(
    metrics_csv: Path, val_loss: float, ln_vocab: float, unigram: float, title: str, path: Path
) -> None:
    """Plot the training loss with two reference lines (in nats), and the learning rate below it, over steps.

    Validation losses come from a validation.csv beside metrics_csv, if there is one.
    """
    metrics = read_metrics(metrics_csv)
    if len(metrics["step"]) == 0:  # train() never called on_step
        return
    figure, (above, below) = _figure(8, 6, n_rows=2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    steps = metrics["step"]
    above.plot(steps, metrics["loss"], color=TRAIN, alpha=0.25, linewidth=0.8, label="each step")
    above.plot(steps, metrics["train-loss"], color=TRAIN, linewidth=1.8, label="mean of the last 20 steps")
    above.axhline(ln_vocab, color=INK, linestyle=":", linewidth=1, label=f"uniform guess, ln V = {ln_vocab:.2f}")
    above.axhline(unigram, color=INK, linestyle="--", linewidth=1, label=f"word frequencies only = {unigram:.2f}")
    validation_csv = metrics_csv.with_name("validation.csv")
    at_the_end = {"step": steps[-1:], "val-loss": [val_loss]}
    validation = read_metrics(validation_csv) if validation_csv.exists() else at_the_end
    label = f"validation, {val_loss:.3f} at the end"
    above.plot(validation["step"], validation["val-loss"], "o-", color=GOOD, clip_on=False, label=label)
    above.set(ylabel="loss (nats per token)", title=title)
    above.legend(frameon=False)
    below.plot(steps, metrics["learning-rate"], color=RATE, linewidth=1.8)
    below.set(ylabel="learning rate", xlabel="training step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _save(figure, path)


@never_fails
def plot_classification(
    p: np.ndarray, labels: np.ndarray, boundaries: dict[str, float], title: str, path: Path
) -> None:
    """Plot histograms of p(positive), (N,), for bad and good texts (labels 0 and 1), with decision boundaries."""
    figure, axes = _figure(8, 4.5)
    bins = np.linspace(p.min(), p.max() + 1e-6, 41)
    for label, name, colour in ((0, "bad", BAD), (1, "good", GOOD)):
        n = int((labels == label).sum())
        axes.hist(p[labels == label], bins, color=colour, alpha=0.55, label=f"truly {name} ({n} texts)")
    for (name, boundary), line in zip(boundaries.items(), (":", "--"), strict=True):
        axes.axvline(boundary, color=INK, linestyle=line, label=f"boundary {name} = {boundary:.3f}")
    axes.set(xlabel='p(positive): share of " good" against " bad" as the next token', ylabel="texts", title=title)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper left")
    _save(figure, path)
