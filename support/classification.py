"""What classify.py prints and writes."""

import numpy as np

from support.checkpoint import TrainedModel
from support.files import json_text, write_atomically
from support.plots import plot_classification
from support.reviews import Reviews
from support.screen import bold, show_facts, show_note

KINDS = ("without calibration", "with calibration")


def area_under_roc(p: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a random positive has a larger p than a random negative; ties count half.

    p and labels (0 or 1) have shape (N,). NaN if a class is missing. This is the Mann-Whitney statistic.
    """
    positive, negative = p[labels == 1], np.sort(p[labels == 0])
    if not (len(positive) and len(negative)):
        return float("nan")
    smaller, not_larger = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((smaller + not_larger).mean() / (2 * len(negative)))


def show_classification_header(
    trained: TrainedModel, reviews: Reviews, template: str, label_map: dict[int, str]
) -> None:
    """Print which model classifies which reviews, and the prompt."""
    if reviews.note:
        show_note(reviews.note)
    show_facts(
        {
            **trained.facts(),
            "reviews": f"{reviews.name}: {len(reviews.texts)} of {reviews.n_read} fit into "
            f"{trained.model.n_positions} tokens, {np.mean(reviews.labels):.1%} positive",
            "prompt": f"{template!r}, then {label_map[1]!r} or {label_map[0]!r}",
        }
    )


def report_classification(
    trained: TrainedModel,
    reviews: Reviews,
    p: np.ndarray,
    predictions: list[list[int]],
    boundaries: list[float],
    calibrate: bool,
    seconds: float,
) -> None:
    """Print both accuracies; write classification.json and classification.png beside the checkpoint.

    p (N,) is p(positive) of each review. `predictions` and `boundaries` are without and with calibration;
    `calibrate` says which predictions are written; scoring took `seconds`.
    """
    labels = np.array(reviews.labels)
    accuracies = [float(np.mean(np.array(predicted) == labels)) for predicted in predictions]
    majority = max(np.mean(labels), 1 - np.mean(labels))
    auc = area_under_roc(p, labels)
    for kind, accuracy, boundary in zip(KINDS, accuracies, boundaries, strict=True):
        print("  " + bold(f"{accuracy:6.1%}") + f"  accuracy {kind}, boundary {boundary:.4f}")
    print(f"  {0.5:6.1%}  a coin flip\n  {majority:6.1%}  always this set's majority class")
    print(f"  {auc:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative\n")

    results = {
        "checkpoint": str(trained.path),
        "reviews": reviews.name,
        "n": len(labels),
        "accuracy": dict(zip(KINDS, accuracies, strict=True)),
        "boundary": dict(zip(KINDS, boundaries, strict=True)),
        "majority-share": majority,
        "auc": auc,
        "row": reviews.rows,
        "predictions": {"kind": KINDS[calibrate], "label": predictions[calibrate]},
        "true-label": reviews.labels,
        "p-positive": p.tolist(),
    }
    write_atomically(trained.folder / "classification.json", json_text(results))
    figure = trained.folder / "classification.png"
    plot_classification(p, labels, results["boundary"], f"{trained.path}, {reviews.name}", figure)
    print(f"{len(labels)} reviews in {seconds:.1f} s, written to {trained.folder}/classification.json, .png")
