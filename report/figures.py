"""The figures of the answers. Colours are those of Okabe and Ito, told apart with every kind of colour vision."""

import os
from pathlib import Path

import numpy as np

os.environ.setdefault("MPLBACKEND", "Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = Path(__file__).resolve().parent / "figures"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "-", "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _save(figure, name: str) -> None:
    figure.savefig(FIGURES / name, dpi=130, metadata={"Software": None})  # the same file from the same numbers
    plt.close(figure)


def plot_curves(
    name: str,
    curves: dict[str, np.ndarray],
    top: float | None = None,
    dots: dict[str, float] | None = None,
    levels: dict[str, float] | None = None,
    thick: int = 8,
    x: str = "training step",
    flops: dict[str, dict] | None = None,
    log_x: bool = False,
) -> None:
    """Running means of the training loss over steps, or over FLOPs; a dot is a validation loss at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for i, (label, losses) in enumerate(curves.items()):
            steps = losses[:, 0] + 1
            if flops:
                steps = steps / steps[-1] * flops[label]["flops"]
            axes.plot(
                steps,
                losses[:, 1],
                color=COLOURS[i],
                linestyle=DASHES[i] if len(curves) > 3 else "-",
                linewidth=2.2 if i < thick else 1.1,
                label=label,
            )
            if dots:
                axes.plot(steps[-1:], [dots[label]], "o", color=COLOURS[i], clip_on=False)
        for label, level in (levels or {}).items():
            axes.axhline(level, color="#333333", linewidth=1, linestyle=":")
            axes.annotate(f"{label} {level:.2f}", (1, level), va="bottom")
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(x)
        axes.set_ylabel("training loss, mean of 20 steps (nats)")
        axes.set_ylim(top=top)
        axes.legend(fontsize=9.5)
        if dots:
            axes.annotate("dots: validation loss", (0.99, 0.5), xycoords="axes fraction", ha="right", fontsize=9.5)
        _save(figure, name)


def plot_fit(name: str, flops: np.ndarray, losses: dict[str, np.ndarray], fits: dict) -> None:
    """Losses over FLOPs, both on logarithmic axes, with the power laws fitted to them."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for i, (data, loss) in enumerate(losses.items()):
            axes.plot(flops, loss, "os"[i], color=COLOURS[i], label=f"{data}, measured")
        for (data, floor), points in fits.items():
            colour = COLOURS[list(losses).index(data)]
            style = "--" if floor else "-"
            axes.plot(
                *zip(*points, strict=True), style, color=colour, linewidth=1.2, label=f"{data}, floor {floor:g}"
            )
        axes.axhline(np.log(50), color="#333333", linestyle=":")
        axes.annotate("perplexity 50", (flops[0], np.log(50)), va="bottom")
        axes.axvline(1e17, color="#333333", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("training FLOPs (6 N per token and attention)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(fontsize=9.5)
        _save(figure, name)


def plot_histogram(name: str, p: np.ndarray, labels: np.ndarray, boundaries: dict[str, float]) -> None:
    """Histograms of p(positive) for the truly negative and positive reviews, with the decision boundaries."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        bins = np.linspace(p.min(), p.max(), 41)
        for label, word, colour, style in (
            (0, "negative", COLOURS[1], "stepfilled"),
            (1, "positive", COLOURS[0], "step"),
        ):
            n = int((labels == label).sum())
            shown = {"alpha": 0.45} if style == "stepfilled" else {"linewidth": 2}
            axes.hist(p[labels == label], bins, color=colour, histtype=style, label=f"truly {word} ({n})", **shown)
        for (rule, boundary), style in zip(boundaries.items(), ("-", "--", "-.", ":"), strict=True):
            axes.axvline(boundary, color="#333333", linestyle=style, label=f"boundary, {rule}: {boundary:.3f}")
        axes.set_xlabel('p(positive): share of " good" against " bad" as the next token')
        axes.set_ylabel("reviews")
        axes.legend(fontsize=9.5)
        _save(figure, name)
