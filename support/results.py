"""What generate.py and classify.py share: their arguments, and what they print, draw and write."""

import csv
import io
import json
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from support.checkpoint import TrainedModel, load_trained_model
from support.data import Reviews
from support.errors import ArgumentParser, UserError, first_line, positive_int
from support.files import atomic_file, json_text, write_atomically
from support.screen import bold, command, heading, show_facts, show_note, show_text
from support.text import read_prefixes

KINDS = ("without calibration", "with calibration")
CHECKPOINT_HELP = "model.pt to use, or its folder (default: the newest in outputs/)"


def model_arguments(description: str, batch_size: int) -> ArgumentParser:
    """A parser with the arguments that say which model to use, how, and where its results go."""
    parser = ArgumentParser(description=description)
    parser.add_argument("checkpoint", nargs="?", default=SUPPRESS, help=CHECKPOINT_HELP)
    parser.add_argument("--checkpoint", metavar="PATH", help="the same as a flag")
    parser.add_argument("--config", help="training YAML of the model; it is then <output_dir>/model.pt")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu, as in the YAML")
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, metavar="B", help="texts at once")
    parser.add_argument("--out", metavar="FOLDER", help="where results are written (default: beside the model)")
    return parser


def load_model(args: Namespace) -> tuple[TrainedModel, Path]:
    """The model that the arguments name, and the folder for its results; UserError if it cannot be written to."""
    trained = load_trained_model(args.config, args.checkpoint, args.device)
    folder = Path(args.out) if args.out else trained.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{folder}: results cannot be written there ({error.strerror})"
        raise UserError(f"{problem}; name another folder with --out") from None
    return trained, folder


def prompt_groups(args: Namespace) -> Iterator[list[str]]:
    """The prompts that are continued together: all of them, or each line of standard input as it comes."""
    groups = [] if args.interactive else [args.prompt or read_prefixes(args.prefixes)]
    if args.interactive:
        groups = ([line.rstrip("\n")] for line in sys.stdin if line.strip())
        if sys.stdin.isatty():
            print("Type a prompt and press Enter; end with Ctrl-D (on Windows Ctrl-Z and Enter).")
    for group in groups:
        yield [prompt for prompt in group for _ in range(args.num_samples)]


def show_generation_header(trained: TrainedModel, args: Namespace) -> None:
    """Print which model generates, and how it samples."""
    heading("generate")
    names = ("temperature", "top_k", "top_p", "seed")
    settings = [f"{name} {getattr(args, name):g}" for name in names if getattr(args, name) is not None]
    sampling = ", ".join(settings) if args.temperature > 0 else "greedy (temperature 0)"
    show_facts({**trained.facts(), "sampling": f"{sampling}, up to {args.max_new_tokens} new tokens"})


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
    records = [{"prefix": prompt, "generation": text} for prompt, text in pairs]
    path = folder / "generation.jsonl"
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"Next:\n  {command('generate.py', trained.path, '--interactive', '--temperature', 0.8)}")
    print(f"  {command('classify.py', trained.path, '--data', 'sample')}\n")
    print(f"{len(pairs)} text{'s' * (len(pairs) != 1)} in {seconds:.1f} s, written to {path}")


def show_classification_header(trained: TrainedModel, reviews: Reviews, template: str, labels: dict) -> None:
    """Print which model classifies which reviews, and the prompt."""
    heading("classify")
    if reviews.note:
        show_note(reviews.note)
    facts, n_positions = f"{reviews.name}: {len(reviews.texts)}", trained.config.model_config.n_positions
    if reviews.labels is None:
        facts += ", without labels"
    else:
        facts += f" that fit into {n_positions} tokens, {np.mean(reviews.labels):.1%} positive"
    answers = f"{labels[1]!r} or {labels[0]!r}"
    show_facts({**trained.facts(), "reviews": facts, "prompt": repr(template), "answers": answers})


def show_accuracies(
    reviews: Reviews, p: torch.Tensor, predictions: list[list[int]], thresholds: list[float]
) -> dict:
    """Print and return both accuracies or, for texts without labels, only how many are called positive.

    p (N,) is p(positive) of each review. `predictions` and `thresholds` are without and with calibration.
    """
    threshold = dict(zip(KINDS, thresholds, strict=True))
    labels, what = (1, "positive") if reviews.labels is None else (np.array(reviews.labels), "accuracy")
    rates = {kind: np.mean(np.array(row) == labels) for kind, row in zip(KINDS, predictions, strict=True)}
    for kind, rate in rates.items():
        print("  " + bold(f"{rate:6.1%}") + f"  {what} {kind}, threshold {threshold[kind]:.4f}")
    summary = {"reviews": reviews.name, "n": len(p), "boundary": threshold}
    if reviews.labels is None:
        return summary
    majority, auc = max(labels.mean(), 1 - labels.mean()), area_under_roc(p.numpy(), labels)
    print(f"  {0.5:6.1%}  a coin flip\n  {majority:6.1%}  always the more frequent label")
    print(f"  {auc:6.3f}  AUC: 0.5 is chance, 1 ranks every positive above every negative")
    return {**summary, "accuracy": rates, "majority-share": majority, "auc": auc}


def write_classification(
    trained: TrainedModel,
    folder: Path,
    reviews: Reviews,
    p: torch.Tensor,
    predictions: list[list[int]],
    args: Namespace,
    summary: dict,
    seconds: float,
) -> None:
    """Write classification.csv, .json and .png; args.calibrate chooses the predictions, scoring took `seconds`."""
    table = {"text": reviews.texts, "p": p.tolist(), "prediction": predictions[args.calibrate]}
    if reviews.labels is not None:
        table["label"] = reviews.labels
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table, *zip(*table.values(), strict=True)])
    write_atomically(folder / "classification.csv", file.getvalue())
    summary = {"checkpoint": str(trained.path), **summary, "predictions": KINDS[args.calibrate]}
    write_atomically(folder / "classification.json", json_text(summary))
    try:
        title = f"{trained.path}, {reviews.name}"
        plot_histogram(p.numpy(), reviews.labels, summary["boundary"], title, folder / "classification.png")
    except Exception as error:  # no matplotlib, for example
        show_note(f"Could not draw classification.png: {first_line(error)}")
    print(f"\nNext:\n  {command('generate.py', trained.path, '--temperature', 0.8)}\n")
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
    p: np.ndarray, labels: list[int] | None, thresholds: dict[str, float], title: str, path: Path
) -> None:
    """Plot how p(positive) is distributed among the bad and the good texts, with the thresholds."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    groups = {"all": p}
    if labels is not None:
        groups = {"truly bad": p[np.array(labels) == 0], "truly good": p[np.array(labels) == 1]}
    axes = (figure := Figure((8, 4.5), layout="constrained")).subplots()
    bins = np.linspace(p.min(), p.max() + 1e-6, 41)
    for (name, values), colour in zip(groups.items(), ("#c2513c", "#2f8f6b"), strict=False):
        axes.hist(values, bins, color=colour, alpha=0.55, label=f"{name} ({len(values)} texts)")
    for (name, threshold), line in zip(thresholds.items(), (":", "--"), strict=True):
        axes.axvline(threshold, color="#333333", linestyle=line, label=f"threshold {name} = {threshold:.3f}")
    axes.set(xlabel='p(positive): share of " good" against " bad" as the next token', ylabel="texts", title=title)
    axes.legend(frameon=False, loc="best")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
