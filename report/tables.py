"""From report/results to the tables and figures of the answers. Nothing here trains or loads a model."""

import json
import math
import re
from pathlib import Path

import numpy as np
from figures import plot_curves, plot_fit, plot_histogram

from support.corpus import load_corpus, unigram_entropy
from support.tokenizer import get_tokenizer

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
CONFIGS, RESULTS, ANSWERS = REPORT / "configs", REPORT / "results", REPORT / "answers.md"
OUTPUTS = Path("outputs/report")  # as in the configurations, from the root
HIGHEST_SEED = 9


class NotMeasured(Exception):
    """Results that a table needs are not there."""


def settings(question: str) -> list[str]:
    """Names of the configurations of a question."""
    return sorted(path.stem for path in CONFIGS.glob(f"{question}-*.yaml"))


def run_name(setting: str, seed: int) -> str:
    """Name of a run's output folder and of its results."""
    return f"{setting}-seed{seed}" if seed else setting


def result(name: str) -> dict:
    """report/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise NotMeasured(f"report/results/{name}.json is not there")
    return json.loads(path.read_text(encoding="utf-8"))


def measured(question: str) -> dict[str, dict]:
    """Results of the measured runs of seed 0 by setting. Raises NotMeasured when there is none."""
    found = {name: result(name) for name in settings(question) if (RESULTS / f"{name}.json").exists()}
    if not found:
        raise NotMeasured(f"no run {question}-* in report/results")
    return found


def seeds(setting: str) -> list[dict]:
    """Results of all measured seeds of a setting. Raises NotMeasured when there is none."""
    names = [run_name(setting, seed) for seed in range(HIGHEST_SEED + 1)]
    found = [result(name) for name in names if (RESULTS / f"{name}.json").exists()]
    if not found:
        raise NotMeasured(f"no run {setting} in report/results")
    return found


def curve(name: str) -> np.ndarray:
    """(step, running mean of the loss), a row each, of a run."""
    return np.loadtxt(RESULTS / f"{name}.csv", delimiter=",", skiprows=1)


def markdown(header: str, rows: list[tuple]) -> str:
    """A table: the first column to the left, numbers to the right. pandoc reads its widths off the dashes."""
    rows = [[str(cell) for cell in row] for row in [header.split(" | "), *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    dashes = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], dashes, *rows[1:]])


def power_of_ten(value: float) -> str:
    """9.99e13 for 99900000000000.0"""
    return f"{value:.2e}".replace("e+", "e")


def mean_and_range(values: list[float], digits: int = 3) -> str:
    """Mean with the smallest and largest value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def model_text(config: dict) -> str:
    """64 × 8: width times layers"""
    return f"{config['model_config']['n_embd']} × {config['model_config']['n_layer']}"


# ---------------------------------------------------------------------------------------------------
# A function per question: draws its figures and returns its tables by name
# ---------------------------------------------------------------------------------------------------


def tying() -> dict[str, str]:
    """1.1, 1.2: tied against untied."""
    rows = []
    for setting, name in (
        ("1.1-tied", "tied"),
        ("1.1-untied", "untied, as many steps"),
        ("1.1-untied-same-count", "untied, as many FLOPs by the formula"),
    ):
        runs = seeds(setting)
        first = runs[0]
        loss = [run["val-loss"] for run in runs]
        steps = first["config"]["num_training_steps"]
        rows.append(
            (
                name,
                f"{first['parameters']:,}",
                steps,
                power_of_ten(first["flops"]),
                len(runs),
                mean_and_range(loss),
            )
        )
    return {"1.1": markdown("output matrix | parameters | steps | FLOPs (6 N) | seeds | validation loss", rows)}


def schedules() -> dict[str, str]:
    """2.2: cosine against a constant rate and no warm-up."""
    rows = []
    for setting in settings("2.2"):
        runs = seeds(setting)
        c = runs[0]["config"]
        shape = "constant" if c["max_lr"] == c["min_lr"] else f"cosine to {c['min_lr']:g}"
        warm_up = f"{c['num_warmup_steps']} steps" if c["num_warmup_steps"] else "none"
        loss = [run["val-loss"] for run in runs]
        rows.append(
            (f"{c['max_lr']:g}, {shape}", warm_up, f"{c['num_training_steps']:,}", len(runs), mean_and_range(loss))
        )
    return {"2.2": markdown("highest rate, annealing | warm-up | steps | seeds | validation loss", rows)}


def lengths() -> dict[str, str]:
    """2.3: GPT-tiny for 2,000, 4,000 and 8,000 steps."""
    runs = sorted(measured("2.3").items(), key=lambda item: item[1]["flops"])
    rows, before = [], None
    for _, r in runs:
        loss, steps = r["val-loss"], r["config"]["num_training_steps"]
        gain = f"{before - loss:.3f}" if before else "–"
        row = (f"{steps:,}", power_of_ten(r["flops"]), f"{loss:.3f}", f"{r['val-perplexity']:.0f}", gain)
        rows.append((*row, f"{r['seconds'] / 60:.0f}"))
        before = loss
    curves = {f"{r['config']['num_training_steps']:,} steps": curve(name) for name, r in runs}
    dots = {f"{r['config']['num_training_steps']:,} steps": r["val-loss"] for _, r in runs}
    plot_curves("2.3-GPT-tiny.png", curves, top=9.0, dots=dots)
    return {"2.3": markdown("steps | FLOPs | validation loss | perplexity | gained by doubling | minutes", rows)}


FAULTS = {  # of 2.4, in the order of the table; the first three are drawn thick
    "expected": "expected",
    "low-rate": "case 1: rate / 6.7",
    "high-rate": "case 2: × 500, no warm-up",
    "long-warmup": "warm-up as long as the run",
    "few-steps": "a sixth of the steps",
    "small-batch": "a quarter of the batch",
    "high-rate-warmup": "rate × 500 with warm-up",
    "no-warmup": "no warm-up, right rate",
}
LEVELS = (10.0, 8.4, 7.9)


def first_below(losses: np.ndarray, level: float) -> float:
    """The step at which the running mean first falls below a level; NaN if it never does."""
    below = np.flatnonzero(losses[:, 1] < level)
    return float(losses[below[0], 0]) if len(below) else math.nan


def faults() -> dict[str, str]:
    """2.4: the two broken runs of figure 3, and other explanations."""
    curves = {key: curve(f"2.4-{key}") for key in FAULTS if (RESULTS / f"2.4-{key}.csv").exists()}
    if "expected" not in curves:
        raise NotMeasured("no run 2.4-expected in report/results")
    reference = [first_below(curves["expected"], level) for level in LEVELS]
    rows = []
    for key, losses in curves.items():
        c = result(f"2.4-{key}")["config"]
        steps = [first_below(losses, level) for level in LEVELS]
        cells = [
            "never" if math.isnan(s) else f"{s:.0f}" + (f" (×{s / r:.1f})" if key != "expected" else "")
            for s, r in zip(steps, reference, strict=True)
        ]
        setup = f"{c['max_lr']:g}", c["num_warmup_steps"]
        rows.append((FAULTS[key], *setup, *cells, f"{losses[:12, 1].max():.1f}", f"{losses[-1, 1]:.2f}"))
    n_vocab = get_tokenizer().n_vocab
    unigram = unigram_entropy(load_corpus("sample", n_vocab).train, n_vocab)
    plot_curves(
        "2.4-faults.png",
        {FAULTS[key]: losses for key, losses in curves.items()},
        levels={"unigram entropy": unigram},
        thick=3,
        log_x=True,
    )
    header = "run | rate | warm-up | 10.0 at step | 8.4 at step | 7.9 at step | peak | end"
    return {"2.4": markdown(header, rows)}


def run_cells(r: dict) -> tuple:
    """The first columns of the tables of 2.5 and 2.6: what was trained."""
    c = r["config"]
    tokens = c["batch_size"] * c["seq_len"] * c["grad_accumulation_steps"]
    return (
        model_text(c),
        f"{r['parameters'] / 1e6:.2f} M",
        f"{c['max_lr']:g}",
        f"{c['num_training_steps']:,} × {tokens:,}",
        power_of_ten(r["flops"]),
    )


RUN_HEADER = "width × layers | parameters | max lr | steps × tokens | FLOPs"


def best_tuned() -> str:
    """The setting of 2.5 with the lowest loss on held-out C4."""
    runs = measured("2.5")
    return min(runs, key=lambda name: runs[name]["val-loss"])


def tuning() -> dict[str, str]:
    """2.5: settings at an equal budget, the best first; the best one's YAML."""
    runs = measured("2.5")
    rows = []
    for name in sorted(runs, key=lambda name: runs[name]["val-loss"]):
        of_seeds = seeds(name)
        loss = [r["val-loss"] for r in of_seeds]
        wikipedia = [r["wikipedia-loss"] for r in of_seeds]
        perplexities = f"{math.exp(np.mean(loss)):.0f}", f"{math.exp(np.mean(wikipedia)):.0f}"
        rows.append((*run_cells(runs[name]), len(of_seeds), mean_and_range(loss), *perplexities))
    plot_curves("2.5-tuning.png", {name: curve(name) for name in runs}, top=8.0, x="FLOPs", flops=runs)
    header = f"{RUN_HEADER} | seeds | loss on C4 | perplexity | on Wikipedia"
    yaml_text = (CONFIGS / f"{best_tuned()}.yaml").read_text(encoding="utf-8")
    return {"2.5": markdown(header, rows), "2.5-yaml": f"```yaml\n{yaml_text}```\n"}


def final_row(r: dict) -> tuple:
    """What the table of 2.6 says of a run."""
    return (
        *run_cells(r),
        f"{r['val-loss']:.3f}",
        f"{r['val-perplexity']:.0f}",
        f"{math.exp(r['c4-loss']):,.0f}",
        f"{r['seconds'] / 60:.0f}",
    )


FINAL_HEADER = f"{RUN_HEADER} | val loss | perplexity | on C4 | minutes"


def fit_power_law(flops: np.ndarray, loss: np.ndarray, floor: float, at: float) -> tuple[float, float, float]:
    """Loss at `at` FLOPs by floor + a C^-b, least squares in the logarithms, and its 95% prediction interval."""
    x, y = np.log(flops), np.log(loss - floor)
    n, x_mean = len(x), np.log(flops).mean()
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    s2 = (residual**2).sum() / (n - 2)
    width = STUDENT_T[n - 2] * math.sqrt(
        s2 * (1 + 1 / n + (math.log(at) - x_mean) ** 2 / ((x - x_mean) ** 2).sum())
    )
    middle = slope * math.log(at) + intercept
    return tuple(floor + math.exp(v) for v in (middle, middle - width, middle + width))


STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}  # 97.5% quantiles by degrees of freedom
FLOORS = (0.0, 1.69)  # no floor, and the one that Hoffmann et al. 2022 fitted for their data and vocabulary


def final() -> dict[str, str]:
    """2.6: the final run, the model's losses over FLOPs and what they predict for 1e17."""
    last = result("2.6-final")
    of_model: dict[int, dict] = {}  # the best run at each budget
    for r in measured("2.6").values():
        budget = round(math.log10(r["flops"]) * 4)
        if r["config"]["model_config"] == last["config"]["model_config"] and (
            budget not in of_model or r["val-loss"] < of_model[budget]["val-loss"]
        ):
            of_model[budget] = r
    runs = sorted(of_model.values(), key=lambda r: r["flops"])
    if len(runs) < 3:
        raise NotMeasured("the power law needs three budgets of the final model")
    flops = np.array([r["flops"] for r in runs])
    losses = {
        "held-out Wikipedia": np.array([r["val-loss"] for r in runs]),
        "C4": np.array([r["c4-loss"] for r in runs]),
    }
    rows, fits = [], {}
    for data, loss in losses.items():
        for floor in FLOORS:
            middle, low, high = fit_power_law(flops, loss, floor, 1e17)
            perplexities = [f"{math.exp(v):,.0f}" for v in (middle, low, high)]
            rows.append((data, f"{floor:g}", f"{middle:.2f}", perplexities[0], " to ".join(perplexities[1:])))
            fits[data, floor] = [
                (c, fit_power_law(flops, loss, floor, c)[0]) for c in np.geomspace(flops[0], 1e17, 50)
            ]
    plot_fit("2.6-scaling.png", flops, losses, fits)
    plot_curves("2.6-final.png", {"final run": curve("2.6-final")}, top=8.0, dots={"final run": last["val-loss"]})
    header = "evaluated on | floor (nats) | loss at 1e17 | perplexity | 95% prediction interval"
    tables = {"2.6": markdown(FINAL_HEADER, [final_row(r) for r in runs]), "2.6-fit": markdown(header, rows)}
    file = result("model-file")
    loss = file["val-loss"]
    rows = [(f"{file['bytes']:,}", f"{loss['float32']:.4f}", f"{loss['bfloat16']:.4f}")]
    tables["2.6-file"] = markdown("bytes of model.pt | loss before storing | loss of model.pt", rows)
    return tables


RIVALS_OF = "2.6-1e14"  # the configurations gpt2-* are its own but for the model and the rate


def against_gpt2() -> dict[str, str]:
    """2.6: ours against the GPT-2 of transformers at equal FLOPs, data and batches."""
    rows = []
    for setting, name in (
        (RIVALS_OF, "DecoderLM, tuned"),
        ("gpt2-gpt2", "GPT-2, usual settings"),
        ("gpt2-tuned", "GPT-2, our rate"),
    ):
        if (RESULTS / f"{setting}.json").exists():
            runs = seeds(setting)
            loss, c4 = [r["val-loss"] for r in runs], [r["c4-loss"] for r in runs]
            perplexity = f"{math.exp(np.mean(loss)):.0f}", f"{math.exp(np.mean(c4)):,.0f}"
            first = f"{runs[0]['config']['max_lr']:g}", f"{runs[0]['parameters'] / 1e6:.2f} M"
            rows.append((name, *first, len(runs), mean_and_range(loss), *perplexity))
    measured("gpt2")  # says so when there is none
    header = "model | highest rate | parameters | seeds | validation loss | perplexity | on C4"
    return {"gpt2": markdown(header, rows)}


def generations() -> dict[str, str]:
    """3.2: numbers and texts at each temperature."""
    r = result("3.2")
    keys = ("distinct-1", "distinct-2", "distinct-3", "entropy", "entropy-sampled", "perplexity")
    rows = []
    for name, m in r["measured"].items():
        digits = [f"{m[key]:.2f}" for key in keys[:-1]] + [f"{m['perplexity']:,.1f}"]
        rows.append(("held-out pages" if name == "people" else name, m["texts"], *digits))
    header = "temperature | texts | distinct-1 | -2 | -3 | entropy | after temperature | perplexity"
    texts = []
    for i, prefix in enumerate(r["prefixes"]):
        texts.append(f"*{prefix}* …\n")
        texts += [f"- {name}: {plain(shown[i])}" for name, shown in r["texts"].items()]
        texts.append("")
    return {"3.2": markdown(header, rows), "3.2-texts": "\n".join(texts)}


def plain(text: str) -> str:
    """Generated text on one line, escaped for Markdown; a character that TeX's fonts may lack becomes "?"."""
    line = text.strip().replace("\n", " / ").encode("latin-1", "replace").decode("latin-1")
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", "".join(c if c.isprintable() else "?" for c in line))


def more_training() -> dict[str, str]:
    """3.3: a tenth of the training against all of it."""
    rows = []
    for name, m in result("3.3").items():
        rows.append(
            (
                name,
                f"{math.exp(m['val-loss']):.0f}",
                f"{m['greedy']['distinct-3']:.2f}",
                f"{m['sampled']['distinct-3']:.2f}",
                f"{m['sampled']['entropy']:.2f}",
                f"{m['people']['perplexity']:.0f}",
            )
        )
    header = (
        "FLOPs | held-out perplexity | distinct-3, greedy | at 1.0 | entropy at 1.0 | perplexity of people's texts"
    )
    return {"3.3": markdown(header, rows)}


def plus_minus(value: float, interval: list[float], scale: float, digits: int) -> str:
    """A value with half the width of its 95% interval."""
    return f"{scale * value:.{digits}f} ± {scale * (interval[1] - interval[0]) / 2:.{digits}f}"


RULES = ("0.5", "contextual", "PMI", "median")


def sentiment() -> dict[str, str]:
    """3.5, 3.6: the shipped model's accuracies; its histogram of p(positive)."""
    r = result("3.6")
    rows = []
    for row in r["rows"]:
        cells = [plus_minus(m["accuracy"], m["interval"], 100, 1) for m in (row["rules"][rule] for rule in RULES)]
        rows.append((row["template"], row["words"], *cells, plus_minus(row["auc"], row["auc-interval"], 1, 3)))
    first = r["rows"][0]["rules"]
    p, labels = np.loadtxt(RESULTS / "3.6.csv", delimiter=",", skiprows=1).T
    plot_histogram("3.6-p-positive.png", p, labels, {rule: first[rule]["boundary"] for rule in RULES})
    brief = [
        (rule, f"{first[rule]['boundary']:.3f}", f"{100 * first[rule]['positive-share']:.1f}", accuracy)
        for rule, accuracy in zip(RULES, rows[0][2:6], strict=True)
    ]
    return {
        "3.5": markdown("boundary by | p(positive) above | called positive (%) | accuracy (%)", brief),
        "3.6": markdown(f"template | label words | {' | '.join(RULES)} | AUC", rows),
    }


DRAW = {
    "1.1": tying,
    "2.2": schedules,
    "2.3": lengths,
    "2.4": faults,
    "2.5": tuning,
    "2.6": final,
    "gpt2": against_gpt2,
    "3.2": generations,
    "3.3": more_training,
    "3.6": sentiment,
}
