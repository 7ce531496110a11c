"""What generate.py and classify.py have in common, print, draw and write."""

import csv
import io
import json
import os
import shlex
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from support.arguments import ArgumentParser
from support.checkpoint import TrainedModel
from support.data import Reviews
from support.errors import RunStopped, UserError, first_line
from support.files import atomic_file, json_text, write_atomically
from support.paths import ROOT
from support.screen import bold, heading, show_facts, show_note, show_text

KINDS = ("without calibration", "with calibration")


def model_arguments(description: str) -> ArgumentParser:
    """A parser with the arguments that say which model to use, and where its results go."""
    parser = ArgumentParser(description=description)
    text = "model.pt to use, or its folder (default: the newest in outputs/)"
    parser.add_argument("checkpoint", nargs="?", default=SUPPRESS, help=text)
    parser.add_argument("--checkpoint", metavar="PATH", help="the same as a flag")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu, as in the YAML")
    parser.add_argument("--out", metavar="FOLDER", help="where results are written (default: beside the model)")
    return parser


def results_folder(out: str | None, trained: TrainedModel) -> Path:
    """The folder for the results, created if --out names a new one; UserError if it cannot be written to."""
    folder = Path(out) if out else trained.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{folder}: results cannot be written there ({error.strerror})"
        raise UserError(f"{problem}; name another folder with --out") from None
    return folder


def show_next(*commands: list[str]) -> None:
    """Print commands to type next; the first word of each is a script of the package."""
    print("Next:")
    for script, *arguments in commands:
        print("  python " + shlex.join([os.path.relpath(ROOT / script), *map(str, arguments)]))
    print()


# --- generate.py ---


def show_generation_header(trained: TrainedModel, args: Namespace) -> None:
    """Print which model generates, and how it samples."""
    parts = ["greedy (temperature 0)" if args.temperature == 0 else f"temperature {args.temperature:g}"]
    parts += [f"top_k {args.top_k}"] if args.top_k else []
    parts += [f"top_p {args.top_p:g}"] if args.top_p else []
    parts += [f"seed {args.seed}"] if args.temperature > 0 else []
    parts += [f"up to {args.max_new_tokens} new tokens"]
    heading("generate")
    show_facts({**trained.facts(), "sampling": ", ".join(parts)})
    defaults = {"top_k": None, "top_p": None, "seed": 0, "num_samples": 1}
    unused = [f"--{name}" for name, default in defaults.items() if getattr(args, name) != default]
    if unused and args.temperature == 0:
        show_note(f"{', '.join(unused)}: no effect at temperature 0; sample with --temperature 0.8, for example.")


def typed_prompts() -> Iterator[list[str]]:
    """Each line of standard input as a list of one prompt."""
    if sys.stdin.isatty():
        print("  Type a prompt and press Enter; end with Ctrl-D (on Windows Ctrl-Z and Enter).\n", flush=True)
    for line in sys.stdin:
        if line.strip():
            yield [line.rstrip("\n")]


def show_texts(trained: TrainedModel, prompts: list[str], texts: list[str]) -> list[tuple[str, str]]:
    """Print and return each prompt with its continuation."""
    n_positions = trained.config.model_config.n_positions
    for prompt, text in zip(prompts, texts, strict=True):
        n_tokens = len(trained.tokenizer.encode_ordinary(prompt))
        if n_tokens > n_positions:
            show_note(f"A prompt of {n_tokens:,} tokens: the model reads the last {n_positions}.")
        show_text(prompt, text)
    return list(zip(prompts, texts, strict=True))


def write_texts(trained: TrainedModel, folder: Path, pairs: list[tuple[str, str]], seconds: float) -> None:
    """Write prompts and continuations to generation.jsonl; generating took `seconds`."""
    lines = [
        json.dumps({"prefix": prompt, "generation": text}, ensure_ascii=False) + "\n" for prompt, text in pairs
    ]
    path = folder / "generation.jsonl"
    write_atomically(path, "".join(lines))
    show_next(["generate.py", trained.path, "--interactive", "--temperature", 0.8], ["classify.py", trained.path])
    print(f"{len(pairs)} text{'s' * (len(pairs) != 1)} in {seconds:.1f} s, written to {path}")


# --- classify.py ---


def show_classification_header(trained: TrainedModel, reviews: Reviews, template: str, labels: dict) -> None:
    """Print which model classifies which reviews, and the prompt."""
    heading("classify")
    if reviews.note:
        show_note(reviews.note)
    facts = f"{len(reviews.texts)} texts without labels"
    if reviews.labels is not None:
        fit = f"fit into {trained.config.model_config.n_positions} tokens"
        facts = f"{len(reviews.texts)} of {reviews.n_read} {fit}, {np.mean(reviews.labels):.1%} positive"
    show_facts(
        {
            **trained.facts(),
            "reviews": f"{reviews.name}: {facts}",
            "prompt": f"{template!r}, then {labels[1]!r} or {labels[0]!r}",
        }
    )


def report_classification(
    trained: TrainedModel,
    folder: Path,
    reviews: Reviews,
    p: np.ndarray,
    predictions: list[list[int]],
    boundaries: list[float],
    calibrate: bool,
    seconds: float,
) -> None:
    """Print both accuracies; write classification.csv, .json and .png.

    p (N,) is p(positive) of each review. `predictions` and `boundaries` are without and with calibration;
    `calibrate` says which predictions are written; scoring took `seconds`.
    """
    if not np.isfinite(p).all():
        raise RunStopped(
            "the model's logits are not finite numbers: its training diverged; use another checkpoint"
        )
    results = {"checkpoint": str(trained.path), "reviews": reviews.name, "n": len(p)}
    results |= {"boundary": dict(zip(KINDS, boundaries, strict=True)), "predictions": KINDS[calibrate]}
    table = {"row": reviews.rows, "text": reviews.texts, "p": p.tolist(), "prediction": predictions[calibrate]}
    if reviews.labels is None:
        for kind, predicted, boundary in zip(KINDS, predictions, boundaries, strict=True):
            print("  " + bold(f"{np.mean(predicted):6.1%}") + f"  positive {kind}, boundary {boundary:.4f}")
        print()
    else:
        table["label"] = reviews.labels
        results |= show_accuracies(p, np.array(reviews.labels), predictions, boundaries)

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([table, *zip(*table.values(), strict=True)])
    write_atomically(folder / "classification.csv", file.getvalue())
    write_atomically(folder / "classification.json", json_text(results))
    title = f"{trained.path}, {reviews.name}"
    plot_histogram(p, reviews.labels, results["boundary"], title, folder / "classification.png")
    other = [] if calibrate else ["--calibrate"]
    show_next(["classify.py", trained.path, *other, "--data", "my_reviews.csv"], ["generate.py", trained.path])
    print(f"{len(p)} reviews in {seconds:.1f} s, written to {folder / 'classification'}.csv, .json, .png")


def show_accuracies(
    p: np.ndarray, labels: np.ndarray, predictions: list[list[int]], boundaries: list[float]
) -> dict:
    """Print and return how often the predictions are right, and what they compare with."""
    accuracies = [float(np.mean(np.array(predicted) == labels)) for predicted in predictions]
    majority = max(np.mean(labels), 1 - np.mean(labels))
    auc = area_under_roc(p, labels)
    for kind, accuracy, boundary in zip(KINDS, accuracies, boundaries, strict=True):
        print("  " + bold(f"{accuracy:6.1%}") + f"  accuracy {kind}, boundary {boundary:.4f}")
    print(f"  {0.5:6.1%}  a coin flip\n  {majority:6.1%}  always this set's majority class")
    print(f"  {auc:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative\n")
    return {"accuracy": dict(zip(KINDS, accuracies, strict=True)), "majority-share": majority, "auc": auc}


def area_under_roc(p: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a random positive has a larger p than a random negative; ties count half.

    p and labels (0 or 1) have shape (N,). NaN if a class is missing. This is the Mann-Whitney statistic.
    """
    positive, negative = p[labels == 1], np.sort(p[labels == 0])
    if not (len(positive) and len(negative)):
        return float("nan")
    smaller, not_larger = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((smaller + not_larger).mean() / (2 * len(negative)))


def plot_histogram(
    p: np.ndarray, labels: list[int] | None, boundaries: dict[str, float], title: str, path: Path
) -> None:
    """Plot histograms of p(positive), (N,), with the decision boundaries; a failure costs only a note."""
    groups = [("all", "#1f6fb2", p)]
    if labels is not None:
        groups = [
            (name, colour, p[np.array(labels) == label])
            for label, name, colour in ((0, "truly bad", "#c2513c"), (1, "truly good", "#2f8f6b"))
        ]
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display

        figure = Figure((8, 4.5), layout="constrained")
        axes = figure.subplots()
        bins = np.linspace(p.min(), p.max() + 1e-6, 41)
        for name, colour, values in groups:
            axes.hist(values, bins, color=colour, alpha=0.55, label=f"{name} ({len(values)} texts)")
        for (name, boundary), line in zip(boundaries.items(), (":", "--"), strict=True):
            axes.axvline(boundary, color="#333333", linestyle=line, label=f"boundary {name} = {boundary:.3f}")
        axes.set(
            xlabel='p(positive): share of " good" against " bad" as the next token', ylabel="texts", title=title
        )
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, loc="upper left")
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=130)
    except Exception as error:
        show_note(f"Could not draw {path.name}: {first_line(error)}")
