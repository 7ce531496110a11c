"""From report/results to the numbers, tables and figures of answers.tex. Nothing here trains or loads a model.

A function per question draws its figures and returns TeX by name: answers.tex shows it with \\result{NAME}. A name
whose runs are not measured yet is left out; answers.tex asks for it with \\ifresult.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from figures import plot_curves, plot_histogram

from support.corpus import load_corpus, unigram_entropy
from support.tokenizer import get_tokenizer

REPORT = Path(__file__).resolve().parent
CONFIGS, RESULTS, GENERATED, FIGURES = (REPORT / name for name in ("configs", "results", "generated", "figures"))
OUTPUTS = Path("outputs/report")  # as in the configurations, from the root
SCHEDULES = {"2.5-d128-l6": "cosine", "2.2-constant": "constant"}


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


def losses_of_seeds(setting: str) -> list[float]:
    """Validation losses of the measured seeds of a setting."""
    runs = [result(run_name(setting, seed)) for seed in range(3)]
    return [run["val-loss"] for run in runs if run]


def curve(run: str) -> np.ndarray:
    """(step, running mean of the training loss), a row each."""
    return np.loadtxt(RESULTS / f"{run}.csv", delimiter=",", skiprows=1)


# ---------------------------------------------------------------------------------------------------
# TeX
# ---------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[tuple]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [" & ".join(map(str, row)) + r" \\" for row in rows]
    body = " ".join([r"\toprule", " & ".join(header) + r" \\", r"\midrule", *lines, r"\bottomrule"])
    return rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}} {body} \end{{tabular}}"


def power_of_ten(value: float) -> str:
    """$5.0 \\cdot 10^{13}$ for 49991300284416"""
    digits, exponent = f"{value:.1e}".split("e")
    return rf"${digits} \cdot 10^{{{int(exponent)}}}$"


def minus(value: float, digits: int) -> str:
    """A signed number with TeX's minus."""
    return f"${value:+.{digits}f}$"


def tex(text: str) -> str:
    """Generated text in one line of TeX; a character that the font lacks becomes "?"."""
    line = text.strip().replace("\n", " / ").encode("latin-1", "replace").decode("latin-1")
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    line = "".join(c if c.isprintable() else "?" for c in line)
    return re.sub(r"[\\~^#$%&_{}<>|]", lambda found: special.get(found[0], f"\\{found[0]}"), line)


# ---------------------------------------------------------------------------------------------------
# A function per question
# ---------------------------------------------------------------------------------------------------


def schedules() -> dict[str, str]:
    """2.2: cosine against a constant rate, at the seeds that both have."""
    runs = {(s, seed): run for s in SCHEDULES for seed in (0, 1) if (run := result(run_name(s, seed)))}
    seeds = [seed for seed in (0, 1) if all((setting, seed) in runs for setting in SCHEDULES)]
    if not seeds:
        return {}
    rows, losses = [], {name: [] for name in SCHEDULES.values()}
    for setting, name in SCHEDULES.items():
        for seed in seeds:
            points = curve(run_name(setting, seed))
            last = points[points[:, 0] >= 0.9 * points[-1, 0], 1].mean()
            loss = runs[setting, seed]["val-loss"]
            losses[name].append(loss)
            rows.append((name, seed, f"{last:.3f}", f"{loss:.3f}", f"{math.exp(loss):.0f}"))
    header = ["rate", "seed", "training loss, last tenth", "validation loss", "perplexity"]
    gaps = np.subtract(losses["constant"], losses["cosine"])
    return {
        "2.2-table": table(header, rows),
        "2.2-gap": " and ".join(minus(gap, 3) for gap in gaps),
        "2.2-flops": power_of_ten(runs["2.2-constant", 0]["flops"]),
        "2.2-rate": f"{runs['2.2-constant', 0]['config']['max_lr']:g}",
    }


def lengths() -> dict[str, str]:
    """2.3: GPT-tiny for 2,000, 4,000 and 8,000 steps."""
    runs = sorted(measured("2.3").items(), key=lambda item: item[1]["flops"])
    rows, curves, ends, before = [], {}, {}, math.nan
    for name, run in runs:
        steps, loss = f"{run['config']['num_training_steps']:,}", run["val-loss"]
        gain = "" if math.isnan(before) else f"{before - loss:.3f}"
        rows.append((steps, f"{loss:.3f}", f"{math.exp(loss):.0f}", gain))
        curves[f"{steps} steps"], ends[f"{steps} steps"], before = curve(name), loss, loss
    if not rows:
        return {}
    plot_curves(FIGURES / "2.3-GPT-tiny.pdf", curves, ends)
    third, last = (part[:, 1].mean() for part in np.array_split(curve(runs[0][0])[50:], 4)[2:])
    values = {"2.3-loss": rows[0][1], "2.3-perplexity": rows[0][2], "2.3-falling": f"{third - last:.3f}"}
    if len(rows) > 1:
        header = ["steps", "validation loss", "perplexity", "gained by doubling"]
        values |= {"2.3-table": table(header, rows), "2.3-longest": rows[-1][0], "2.3-gain": rows[-1][3]}
    return values


FAULTS = {"2.4-expected": "expected", "2.4-low-rate": "case 1", "2.4-high-rate": "case 2"}


def faults() -> dict[str, str]:
    """2.4: the two broken runs of the handout's figure 3, made anew."""
    if measured("2.4").keys() < FAULTS.keys():
        return {}
    curves = {name: curve(setting) for setting, name in FAULTS.items()}
    rates = {name: result(setting)["config"]["max_lr"] for setting, name in FAULTS.items()}
    n_vocab = get_tokenizer().n_vocab
    unigrams = unigram_entropy(load_corpus("sample", n_vocab).train, n_vocab)
    labels = {name: f"{name}: rate {rates[name]:g}" for name in curves}
    plot_curves(
        FIGURES / "2.4-faults.pdf",
        {labels[name]: points for name, points in curves.items()},
        level=(f"word frequencies alone: {unigrams:.2f}", unigrams),
        log_x=True,
    )
    late = [first_below(curves["case 1"], level) / first_below(curves["expected"], level) for level in (10, 9)]
    end = curves["case 2"][:, 0] >= 200
    return {
        "2.4-slower": f"{rates['expected'] / rates['case 1']:.1f}",
        "2.4-late": " and ".join(f"{ratio:.1f}" for ratio in late),
        "2.4-faster": f"{rates['case 2'] / rates['expected']:.0f}",
        "2.4-peak": f"{curves['case 2'][:, 1].max():.0f}",
        "2.4-plateau": f"{curves['case 2'][end, 1].mean():.1f}",
        "2.4-unigrams": f"{unigrams:.1f}",
    }


def first_below(losses: np.ndarray, level: float) -> float:
    """The first step whose running mean is below a level."""
    return losses[np.flatnonzero(losses[:, 1] < level)[0], 0]


def tuning() -> dict[str, str]:
    """2.5: settings at one budget, the best first, by the mean over the measured seeds."""
    runs = measured("2.5")
    losses = {name: losses_of_seeds(name) for name in runs}
    ranked = sorted(runs, key=lambda name: np.mean(losses[name]))
    rows = []
    for name in ranked:
        c = runs[name]["config"]
        loss = losses[name]
        spread = f"{min(loss):.3f} to {max(loss):.3f}" if len(loss) > 1 else ""
        row = f"{c['model_config']['n_embd']} × {c['model_config']['n_layer']}", f"{c['max_lr']:g}"
        row += f"{runs[name]['parameters'] / 1e6:.2f}", f"{c['num_training_steps']:,}", len(loss)
        rows.append((*row, f"{np.mean(loss):.3f}", spread, f"{math.exp(np.mean(loss)):.0f}"))
    header = ["width × layers", "max. rate", "parameters (M)", "steps", "seeds", "loss", "range", "perplexity"]
    best, second = ranked[:2]
    values = {
        "2.5-table": table(header, rows),
        "2.5-best": best,
        "2.5-best-shape": rows[0][0],
        "2.5-best-rate": rows[0][1],
        "2.5-best-loss": rows[0][5],
        "2.5-best-perplexity": rows[0][7],
        "2.5-gap": f"{np.mean(losses[second]) - np.mean(losses[best]):.3f}",
        "2.5-flops": power_of_ten(runs[best]["flops"]),
    }
    spreads = [max(losses[name]) - min(losses[name]) for name in ranked if len(losses[name]) > 1]
    if spreads:
        values["2.5-spread"] = f"{max(spreads):.3f}"
    for key, of in {
        "rate": lambda c: (c["model_config"], c["max_lr"]),
        "width": lambda c: (c["max_lr"], c["model_config"]["n_embd"]),
    }.items():
        fixed, value = of(runs[best]["config"])
        tried = [v for f, v in (of(run["config"]) for run in runs.values()) if key == "width" or f == fixed]
        if min(tried) < value < max(tried):
            values[f"2.5-{key}-bracketed"] = f"{min(tried):g} to {max(tried):g}"
    return values


def final() -> dict[str, str]:
    """2.6: the model that ships."""
    file = result("model-file")
    values = {}
    for name in ("c4", "wikipedia"):
        loss, *interval = file[f"{name}-loss"]
        values[f"2.6-{name}-loss"] = f"{loss:.3f}"
        values[f"2.6-{name}-perplexity"] = f"{math.exp(loss):.0f}"
        values[f"2.6-{name}-interval"] = " to ".join(f"{math.exp(end):.0f}" for end in interval)
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
    r = result("3.2")
    rows = []
    for name, m in r["measured"].items():
        new, loss, entropy = f"{m['distinct-3']:.0%}", f"{m['loss']:.1f}", f"{m['entropy']:.1f}"
        rows.append((name, m["texts"], new.replace("%", r"\%"), loss, entropy))
    header = ["temperature", "texts", "new trigrams", "loss", "entropy"]
    texts = []
    for i, prefix in enumerate(r["prefixes"]):
        shown = " ".join(rf"\continuation{{{t}}}{{{tex(texts[i])}}}" for t, texts in r["texts"].items())
        texts.append(rf"\prompt{{{tex(prefix)}}} {shown}")
    values = {"3.2-table": table(header, rows)}
    values |= {"3.2-texts": " ".join(texts[: r["bundled"]]), "3.2-own-texts": " ".join(texts[r["bundled"] :])}
    for name, m in r["measured"].items():
        key = name.replace(" ", "-")
        values[f"3.2-loss-{key}"] = f"{m['loss']:.1f}"
        values[f"3.2-new-{key}"] = f"{100 * m['distinct-3']:.0f}\\%"
        values[f"3.2-choices-{key}"] = f"{math.exp(m['entropy']):,.0f}"
    return values


def sentiment() -> dict[str, str]:
    """3.5 and 3.6: accuracies with their 95% intervals, and the histogram of p(positive)."""
    r = result("3.5")

    def percent(values: list[float]) -> str:
        """Accuracy and interval; a rule whose interval is a point gave every resample the same."""
        value, low, high = (100 * v for v in values)
        return f"{value:.1f}\\%" + (f" ({low:.1f} to {high:.1f})" if high > low else "")

    def signed(values: list[float]) -> str:
        """A difference of accuracies with its interval, in percentage points."""
        return "{} ({} to {})".format(*(minus(100 * v, 1) for v in values))

    rows, values = [], {"3.5-reviews": tex(r["reviews"]), "3.5-n": f"{r['n']:,}"}
    for name, m in r["rules"].items():
        difference = (
            "" if name == "median" else "{} ({} to {})".format(*(minus(100 * v, 1) for v in m["minus-median"]))
        )
        called = f"{100 * m['positive-share']:.1f}\\%"
        rows.append((name, f"{m['boundary']:.3f}", called, percent(m["accuracy"]), difference))
        values |= {f"3.5-{name}": percent(m["accuracy"]), f"3.5-{name}-called": called}
        values[f"3.5-{name}-boundary"] = f"{m['boundary']:.3f}"
    header = ["boundary", "p(positive) above", "called positive", "accuracy", "points against the median"]
    values["3.5-table"] = table(header, rows)
    values["3.5-auc"] = "{:.3f} ({:.3f} to {:.3f})".format(*r["auc"])
    values["3.5-majority"] = f"{100 * max(r['positive'], 1 - r['positive']):.1f}\\%"
    last = r["last-tokens"]
    values |= {"3.5-n-last": f"{last['n']}", "3.5-last": percent(last["accuracy"])}
    values["3.5-whole-minus-last"] = signed(last["whole-minus-last"])
    p, labels = np.loadtxt(RESULTS / "3.5.csv", delimiter=",", skiprows=1).T
    boundaries = {name: m["boundary"] for name, m in r["rules"].items()}
    plot_histogram(FIGURES / "3.5-p-positive.pdf", p, labels, boundaries)
    return values


DRAW = {
    "2.2": schedules,
    "2.3": lengths,
    "2.4": faults,
    "2.5": tuning,
    "2.6": final,
    "3.2": generations,
    "3.5": sentiment,
}
