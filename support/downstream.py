"""What generate.py and classify.py have in common, print, draw and write."""

import csv
import io
import json
import os
import shlex
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from support.checkpoint import TrainedModel, load_trained_model
from support.data import Reviews
from support.errors import ArgumentParser, UserError, first_line, positive_int
from support.files import ROOT, atomic_file, json_text, write_atomically
from support.screen import bold, heading, show_facts, show_note, show_text
from support.text import read_prefixes

KINDS = ("without calibration", "with calibration")


def model_arguments(description: str, batch_size: int) -> ArgumentParser:
    """A parser with the arguments that say which model to use, and where its results go."""
    parser = ArgumentParser(description=description)
    text = "model.pt to use, or its folder (default: the newest in outputs/)"
    parser.add_argument("checkpoint", nargs="?", default=SUPPRESS, help=text)
    parser.add_argument("--checkpoint", metavar="PATH", help="the same as a flag")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu, as in the YAML")
    text = f"at once (default: {batch_size})"
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, metavar="B", help=text)
    parser.add_argument("--out", metavar="FOLDER", help="where results are written (default: beside the model)")
    return parser


def load_model(args: Namespace) -> tuple[TrainedModel, Path]:
    """The model that the arguments name, and the folder for its results; UserError if it cannot be written to."""
    trained = load_trained_model(args.config, args.checkpoint, args.device)
    folder = Path(args.out) if args.out else trained.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{folder}: results cannot be written there ({error.strerror})"
        raise UserError(f"{problem}; name another folder with --out") from None
    return trained, folder


def show_next(*commands: list[str]) -> None:
    """Print commands to type next; the first word of each is a script of the package."""
    print("Next:")
    for script, *arguments in commands:
        print("  python " + shlex.join([os.path.relpath(ROOT / script), *map(str, arguments)]))
    print()


# --- generate.py ---


def prompt_groups(args: Namespace) -> Iterable[list[str]]:
    """The prompts that are continued together: all of them, or each line of standard input as it comes."""

    def repeated(prompts: list[str]) -> list[str]:
        return [prompt for prompt in prompts for _ in range(args.num_samples)]

    if not args.interactive:
        return [repeated(args.prompt or read_prefixes(args.prefixes))]
    if sys.stdin.isatty():
        print("Type a prompt and press Enter; end with Ctrl-D (on Windows Ctrl-Z and Enter).", flush=True)
    return (repeated([line.rstrip("\n")]) for line in sys.stdin if line.strip())


def show_generation_header(trained: TrainedModel, args: Namespace) -> None:
    """Print which model generates, and how it samples."""
    sampling = f"greedy (temperature 0), up to {args.max_new_tokens} new tokens"
    if args.temperature > 0:
        names = ("temperature", "top_k", "top_p", "seed")
        parts = [f"{name} {getattr(args, name):g}" for name in names if getattr(args, name) is not None]
        sampling = ", ".join([*parts, f"up to {args.max_new_tokens} new tokens"])
    elif args.top_k or args.top_p or args.seed or args.num_samples > 1:
        sampling += "; flags of sampling have no effect without --temperature"
    heading("generate")
    show_facts({**trained.facts(), "sampling": sampling})


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
        fit = f"that fit into {trained.config.model_config.n_positions} tokens"
        facts = f"{len(reviews.texts)} of {reviews.n_total} {fit}, {np.mean(reviews.labels):.1%} positive"
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
    p: torch.Tensor,
    predictions: list[list[int]],
    boundaries: list[float],
    calibrate: bool,
    seconds: float,
) -> None:
    """Print both accuracies; write classification.csv, .json and .png.

    p (N,) is p(positive) of each review. `predictions` and `boundaries` are without and with calibration;
    `calibrate` says which predictions are written; scoring took `seconds`.
    """
    p, named_boundaries = p.numpy(), dict(zip(KINDS, boundaries, strict=True))
    results = {"checkpoint": str(trained.path), "reviews": reviews.name, "n": len(p), "boundary": named_boundaries}
    table = {"row": reviews.rows, "text": reviews.texts, "p": p.tolist(), "prediction": predictions[calibrate]}
    rates, what = [np.mean(predicted) for predicted in predictions], "positive"
    if reviews.labels is not None:
        table["label"], labels = reviews.labels, np.array(reviews.labels)
        rates, what = [np.mean(np.array(predicted) == labels) for predicted in predictions], "accuracy"
        results["accuracy"] = dict(zip(KINDS, rates, strict=True))
        results["majority-share"] = max(labels.mean(), 1 - labels.mean())
        results["auc"] = area_under_roc(p, labels)
    for rate, (kind, boundary) in zip(rates, named_boundaries.items(), strict=True):
        print("  " + bold(f"{rate:6.1%}") + f"  {what} {kind}, boundary {boundary:.4f}")
    if reviews.labels is not None:
        print(f"  {0.5:6.1%}  a coin flip\n  {results['majority-share']:6.1%}  always this set's majority class")
        print(f"  {results['auc']:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative")
    print()

    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table, *zip(*table.values(), strict=True)])
    write_atomically(folder / "classification.csv", file.getvalue())
    write_atomically(folder / "classification.json", json_text({**results, "predictions": KINDS[calibrate]}))
    title = f"{trained.path}, {reviews.name}"
    plot_histogram(p, reviews.labels, named_boundaries, title, folder / "classification.png")
    flag = [] if calibrate else ["--calibrate"]
    show_next(["classify.py", trained.path, *flag, "--data", "my_reviews.csv"], ["generate.py", trained.path])
    print(f"{len(p)} reviews in {seconds:.1f} s, written to {folder / 'classification'}.csv, .json, .png")


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
        names = {"truly bad": "#c2513c", "truly good": "#2f8f6b"}
        groups = [(name, colour, p[np.array(labels) == n]) for n, (name, colour) in enumerate(names.items())]
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
