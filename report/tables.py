"""From report/results to the numbers, tables and figures of answers.tex. Nothing here trains or loads a model.

A function per question draws its figures and returns TeX by name: answers.tex shows it with \\result{NAME}. A name
without measured runs is left out; answers.tex asks for it with \\ifresult.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from figures import plot_curves, plot_histogram

from support.data import load_corpus, unigram_entropy
from support.tokenizer import get_tokenizer

REPORT = Path(__file__).resolve().parent
CONFIGS, RESULTS, GENERATED, FIGURES = (REPORT / name for name in ("configs", "results", "generated", "figures"))
OUTPUTS = Path("outputs/report")  # as in the configurations, from the root
SCHEDULES = {"2.5-d64-l8-lr8e-3": "cosine", "2.2-constant": "constant"}
OTHER_RATES = ("2.2-lr4e-3", "2.2-lr16e-3")  # with the cosine


def settings(question: str) -> list[str]:
    """Names of the configurations of a question."""
    return sorted(path.stem for path in CONFIGS.glob(f"{question}-*.yaml"))


def run_name(setting: str, seed: int) -> str:
    """Name of a run's output folder and of its results."""
    return f"{setting}-seed{seed}" if seed else setting


def result(name: str) -> dict:
    """report/results/NAME.json, {} if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measured(question: str) -> dict[str, dict]:
    """Results of the measured runs of seed 0, by setting."""
    return {setting: found for setting in settings(question) if (found := result(setting))}


def curve(run: str) -> np.ndarray:
    """(step, running mean of the training loss), a row each."""
    return np.loadtxt(RESULTS / f"{run}.csv", delimiter=",", skiprows=1)


def table(header: list[str], rows: list[tuple]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [" & ".join(map(str, row)) + r" \\" for row in rows]
    body = " ".join([r"\toprule", " & ".join(header) + r" \\", r"\midrule", *lines, r"\bottomrule"])
    return rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}} {body} \end{{tabular}}"


def power_of_ten(value: float) -> str:
    """$5.0 \\cdot 10^{13}$ for 49991300284416"""
    digits, exponent = f"{value:.1e}".split("e")
    return rf"${digits} \cdot 10^{{{int(exponent)}}}$"


def signed(value: float, digits: int) -> str:
    """A number with its sign, for which TeX has another character than the hyphen."""
    return f"${value:+.{digits}f}$"


def with_interval(values: list[float], show) -> str:
    """A value with its 95% interval, unless the interval is a point: then every resample gave the same."""
    value, low, high = map(show, values)
    return f"{value} ({low} to {high})" if values[1] < values[2] else value


def tex(text: str) -> str:
    """Generated text in one line of TeX; a character that the font lacks becomes "?"."""
    line = text.strip().replace("\n", " / ").encode("latin-1", "replace").decode("latin-1")
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    line = "".join(c if c.isprintable() else "?" for c in line)
    return re.sub(r"[\\~^#$%&_{}<>|]", lambda found: special.get(found[0], f"\\{found[0]}"), line)


def schedules() -> dict[str, str]:
    """2.2: cosine against a constant rate, at the seeds that both have."""
    rows, gaps = [], []
    for seed in (0, 1):
        names = [run_name(setting, seed) for setting in SCHEDULES]
        runs = [result(name) for name in names]
        if not all(runs):
            continue
        gaps.append(signed(runs[1]["val-loss"] - runs[0]["val-loss"], 3))
        for name, run, schedule in zip(names, runs, SCHEDULES.values(), strict=True):
            steps, losses = curve(name).T
            last, loss = losses[steps >= 0.9 * steps[-1]].mean(), run["val-loss"]
            rows.append((schedule, seed, f"{last:.3f}", f"{loss:.3f}", f"{math.exp(loss):,.0f}"))
    if not rows:
        return {}
    header = ["rate", "seed", "training loss, last tenth", "validation loss", "perplexity"]
    run = result(next(iter(SCHEDULES)))
    values = {"2.2-flops": power_of_ten(run["flops"]), "2.2-rate": f"{run['config']['max_lr']:g}"}
    values["2.2-shape"] = "{n_embd} × {n_layer}".format(**run["config"]["model_config"])
    others = [found for name in OTHER_RATES if (found := result(name))]
    by_rate = sorted((r["config"]["max_lr"], r["val-loss"]) for r in (run, *others))
    values["2.2-rates"] = ", ".join(f"{rate:g} gives {loss:.3f}" for rate, loss in by_rate)
    return values | {"2.2-table": table(header, rows), "2.2-gap": " and ".join(gaps)}


def lengths() -> dict[str, str]:
    """2.3: GPT-tiny, and half as many steps with a schedule of their own."""
    runs = measured("2.3")
    steps = {name: f"{run['config']['num_training_steps']:,} steps" for name, run in runs.items()}
    losses = {name: run["val-loss"] for name, run in runs.items()}
    curves = {name: curve(name) for name in runs}
    plot_curves(
        FIGURES / "2.3-GPT-tiny.pdf",
        {steps[name]: curves[name] for name in runs},
        {steps[name]: losses[name] for name in runs},
    )
    third, last = (part[:, 1].mean() for part in np.array_split(curves["2.3-2000"][50:], 4)[2:])  # quarters
    loss, half = losses["2.3-2000"], losses.get("2.3-1000")
    values = {"2.3-loss": f"{loss:.3f}", "2.3-perplexity": f"{math.exp(loss):,.0f}"}
    values["2.3-falling"] = f"{third - last:.3f}"
    return values | ({"2.3-half": f"{half:.3f}", "2.3-gain": f"{half - loss:.3f}"} if half else {})


FAULTS = {"2.4-expected": "expected", "2.4-low-rate": "case 1", "2.4-high-rate": "case 2"}


def faults() -> dict[str, str]:
    """2.4: the two broken runs of the handout's figure 3, made with a small model."""
    runs = measured("2.4")
    if runs.keys() < FAULTS.keys():
        return {}
    expected, low, high = (curve(setting) for setting in FAULTS)
    rates = [runs[setting]["config"]["max_lr"] for setting in FAULTS]
    labels = [f"{name}: rate {rate:g}" for name, rate in zip(FAULTS.values(), rates, strict=True)]
    n_vocab = get_tokenizer().n_vocab
    unigrams = unigram_entropy(load_corpus("sample", n_vocab).train, n_vocab)
    curves = dict(zip(labels, (expected, low, high), strict=True))
    level = f"word frequencies alone: {unigrams:.2f}", unigrams
    plot_curves(FIGURES / "2.4-faults.pdf", curves, level=level, log_x=True)
    first = [[points[points[:, 1] < loss, 0][0] for loss in (10, 9.5)] for points in (expected, low)]
    return {
        "2.4-slower": f"{rates[0] / rates[1]:.1f}",
        "2.4-late": " and ".join(f"{late / on_time:.1f}" for on_time, late in zip(*first, strict=True)),
        "2.4-faster": f"{rates[2] / rates[0]:.0f}",
        "2.4-peak": f"{high[:, 1].max():.0f}",
        "2.4-plateau": f"{high[high[:, 0] >= 200, 1].mean():.1f}",
    }


def tuning() -> dict[str, str]:
    """2.5: settings at one budget, the best first, by the mean over the measured seeds."""
    runs = measured("2.5")
    losses = {
        name: [run["val-loss"] for seed in range(3) if (run := result(run_name(name, seed)))] for name in runs
    }
    mean = {name: np.mean(losses[name]) for name in runs}
    best, second, *_ = ranked = sorted(runs, key=mean.get)
    configs = {name: runs[name]["config"] for name in runs}
    shape = {name: "{n_embd} × {n_layer}".format(**c["model_config"]) for name, c in configs.items()}
    rows = []
    for name in ranked:
        n, c = len(losses[name]), configs[name]
        spread = f"{min(losses[name]):.3f} to {max(losses[name]):.3f}" if n > 1 else ""
        of_run = f"{c['max_lr']:g}", f"{runs[name]['parameters'] / 1e6:.2f}", f"{c['num_training_steps']:,}", n
        rows.append((shape[name], *of_run, f"{mean[name]:.3f}", spread, f"{math.exp(mean[name]):,.0f}"))
    header = ["width × layers", "max. rate", "parameters (M)", "steps", "seeds", "loss", "range", "perplexity"]
    values = {
        "2.5-table": table(header, rows),
        "2.5-best": best,
        "2.5-best-shape": shape[best],
        "2.5-best-rate": f"{configs[best]['max_lr']:g}",
        "2.5-best-perplexity": f"{math.exp(mean[best]):.0f}",
        "2.5-gap": f"{mean[second] - mean[best]:.3f}",
        "2.5-flops": power_of_ten(runs[best]["flops"]),
    }
    if any(len(loss) > 1 for loss in losses.values()):
        values["2.5-spread"] = f"{max(max(loss) - min(loss) for loss in losses.values()):.3f}"
    rates = [c["max_lr"] for name, c in configs.items() if shape[name] == shape[best]]
    widths = [c["model_config"]["n_embd"] for c in configs.values()]
    for key, tried, value in (
        ("rate", rates, configs[best]["max_lr"]),
        ("width", widths, configs[best]["model_config"]["n_embd"]),
    ):
        if min(tried) < value < max(tried):  # the best is not at the edge of what was tried
            values[f"2.5-{key}-bracketed"] = f"{min(tried):g} to {max(tried):g}"
    return values


def final() -> dict[str, str]:
    """2.6: the model that ships."""
    file, values = result("model-file"), {"2.6-small": f"{result('2.6-small')['val-loss']:.3f}"}
    for name in ("c4", "wikipedia"):
        loss = file[f"{name}-loss"]
        values[f"2.6-{name}-loss"] = f"{loss[0]:.3f}"
        values[f"2.6-{name}-perplexity"] = f"{math.exp(loss[0]):.0f}"
        values[f"2.6-{name}-interval"] = " to ".join(f"{math.exp(end):.0f}" for end in loss[1:])
    return values | {
        "2.6-shape": f"{file['n_embd']} × {file['n_layer']}",
        "2.6-parameters": f"{file['parameters'] / 1e6:.2f}",
        "2.6-tokens": f"{file['tokens'] / 1e6:.1f}",
        "2.6-steps": f"{file['steps']:,}",
        "2.6-rate": f"{file['max_lr']:g}",
        "2.6-flops": power_of_ten(file["flops"]),
        "2.6-share": f"{1e17 / file['flops']:.0f}",
    }


def generations() -> dict[str, str]:
    """3.2: numbers at each temperature, and texts."""
    r, rows, values, texts = result("3.2"), [], {}, []
    for name, m in r["measured"].items():
        new, loss = f"{100 * m['distinct-3']:.0f}\\%", f"{m['loss']:.1f}"
        rows.append((name, m["texts"], new, loss, f"{m['entropy']:.1f}"))
        values |= {f"3.2-loss-{name}": loss, f"3.2-new-{name}": new}
        values[f"3.2-choices-{name}"] = f"{math.exp(m['entropy']):,.0f}"
    values["3.2-table"] = table(["temperature", "texts", "new trigrams", "loss", "entropy"], rows)
    for i, prefix in enumerate(r["prefixes"]):
        shown = " ".join(rf"\continuation{{{t}}}{{{tex(new[i])}}}" for t, new in r["texts"].items())
        texts.append(rf"\prompt{{{tex(prefix)}}} {shown}")
    n = r["bundled"]
    return values | {"3.2-texts": " ".join(texts[:n]), "3.2-own-texts": " ".join(texts[n:])}


def sentiment() -> dict[str, str]:
    """3.5 and 3.6: accuracies with their 95% intervals, and the histogram of p(positive)."""
    r, rows = result("3.5"), []

    def percent(share: float) -> str:
        return f"{100 * share:.1f}\\%"

    def points(difference: float) -> str:
        return signed(100 * difference, 1)

    values = {
        "3.5-reviews": tex(r["reviews"]),
        "3.5-n": f"{r['n']:,}",
        "3.5-majority": percent(max(r["positive"], 1 - r["positive"])),
        "3.5-auc": with_interval(r["auc"], "{:.3f}".format),
        "3.5-n-last": f"{r['n-last']}",
        "3.5-last": with_interval(r["last"], percent),
        "3.5-whole-minus-last": with_interval(r["whole-minus-last"], points),
    }
    for name, m in r["rules"].items():
        boundary, called = f"{m['boundary']:.3f}", percent(m["positive-share"])
        accuracy, minus_median = with_interval(m["accuracy"], percent), with_interval(m["minus-median"], points)
        rows.append((name, boundary, called, accuracy, "" if name == "median" else minus_median))
        values |= {f"3.5-{name}": accuracy, f"3.5-{name}-called": called, f"3.5-{name}-boundary": boundary}
    header = ["boundary", "p(positive) above", "called positive", "accuracy", "points against the median"]
    values["3.5-table"] = table(header, rows)
    p, labels = np.loadtxt(RESULTS / "3.5.csv", delimiter=",", skiprows=1).T
    boundaries = {name: m["boundary"] for name, m in r["rules"].items()}
    plot_histogram(FIGURES / "3.5-p-positive.pdf", p, labels, boundaries)
    return values


DRAW = {"2.2": schedules, "2.3": lengths, "2.4": faults, "2.5": tuning, "2.6": final}
DRAW |= {"3.2": generations, "3.5": sentiment}
