"""From report/results to the tables and figures of answers.tex, and to answers.pdf: python report/answers.py

A function per question writes its tables and figures, and returns further numbers by name, which are printed. The
sentences of answers.tex are written by hand; tests/package/test_report.py compares the numbers in them. The pdf
needs pdflatex: apt-get install texlive-latex-recommended texlive-fonts-recommended lmodern
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("MPLBACKEND", "Agg")
import matplotlib.pyplot as plt

REPORT = Path(__file__).resolve().parent
RESULTS, GENERATED = REPORT / "results", REPORT / "generated"
sys.path[:0] = [str(REPORT.parent), str(REPORT)]

from experiments import OUTPUTS, RUNS, run_name  # noqa: E402

from support.data import unigram_entropy  # noqa: E402

BLUE, ORANGE, GREEN, PURPLE = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito
N_MIXTURE, N_PARAMETERS = 73_295_224, 7_655_552  # tokens (data/README.md), and of model.pt
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def result(name: str) -> dict:
    """report/results/NAME.json"""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def curve(run: str) -> np.ndarray:
    """The columns step, loss (of the step) and mean (of the last 20)."""
    return np.genfromtxt(RESULTS / f"{run}.csv", delimiter=",", names=True)


def write_table(name: str, header: list[str], rows: list[list]) -> None:
    """The first column to the left, numbers to the right; an empty cell shows a dash."""
    lines = [" & ".join("--" if cell == "" else str(cell) for cell in row) + r" \\" for row in [header, *rows]]
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    columns = "l" + "r" * (len(header) - 1)
    (GENERATED / f"{name}.tex").write_text(f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n")


def figure(name: str, draw) -> None:
    """Call draw(axes) and save; without the date, so that the same numbers give the same file."""
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(figsize=(7.4, 2.2), layout="constrained")
        draw(axes)
        fig.savefig(GENERATED / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        plt.close(fig)


def log_steps(axes, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set(xlabel="training step", ylabel=ylabel)


def schedules() -> dict[str, float]:
    """2.2: a cosine and a constant rate, with the same seeds."""
    rows, losses = [], {}
    for setting, seed in RUNS["2.2"]:
        run = run_name(setting, seed)
        points, loss = curve(run), result(run)["losses"]["c4"]
        last = points["mean"][points["step"] >= 0.9 * points["step"][-1]].mean()
        rows.append([setting[4:], seed, f"{last:.3f}", f"{loss:.3f}", f"{math.exp(loss):,.0f}"])
        losses.setdefault(setting, []).append(loss)
    write_table("2.2", ["rate", "seed", "training loss, last tenth", "validation loss", "perplexity"], rows)
    cosine, constant = map(np.array, losses.values())
    return {f"gap of seed {seed}": gap for seed, gap in enumerate(constant - cosine)}


def lengths() -> dict[str, float]:
    """2.3: GPT-tiny, and other numbers of steps with a schedule of their own."""
    runs = {result(name)["config"]["num_training_steps"]: name for name, _ in RUNS["2.3"]}
    losses = {steps: result(name)["losses"]["c4"] for steps, name in sorted(runs.items())}

    def draw(axes) -> None:
        for steps, name in runs.items():
            points, tiny = curve(name), steps == 2000
            label = {2000: "training loss, GPT-tiny", max(runs): "training loss, other runs"}.get(steps)
            style = {"color": BLUE, "linewidth": 2, "zorder": 3} if tiny else {"color": "#999999", "linewidth": 1}
            axes.plot(points["step"] + 1, points["mean"], label=label, **style)
        axes.plot(*zip(*losses.items(), strict=True), "o", color=ORANGE, label="validation loss, each run")
        log_steps(axes, "loss, nats\n(mean of 20 steps)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    figure("2.3", draw)
    gains = ["", *(f"{gain:.3f}" for gain in -np.diff(list(losses.values())))]
    rows = [
        [f"{steps:,}", f"{loss:.3f}", f"{math.exp(loss):,.0f}", gain]
        for (steps, loss), gain in zip(losses.items(), gains, strict=True)
    ]
    write_table("2.3", ["steps", "validation loss", "perplexity", "gain by doubling"], rows)
    c = result(runs[max(runs)])["config"]
    return {"passes of the longest": tokens_read(c) / len(np.load(REPORT.parent / "data/sample.npz")["train"])}


def faults() -> dict[str, float]:
    """2.4: the two broken runs of the handout's figure 3 in a small model, and what separates their causes."""
    runs = {name[4:]: (curve(name), result(name)["config"]["max_lr"]) for name, _ in RUNS["2.4"]}
    labels = {"expected": "expected", "low-rate": "case 1", "high-rate": "case 2"}
    labels["high-rate-warmup100"] = "case 2, warm-up of 100"
    tokens = np.load(REPORT.parent / "data/sample.npz")["train"]
    unigrams = unigram_entropy(tokens, 50257)

    def draw(axes) -> None:
        for (name, label), colour, dashes in zip(labels.items(), COLOURS, ("-", "--", "-.", ":"), strict=True):
            losses, rate = runs[name]
            style = {"color": colour, "linestyle": dashes, "linewidth": 2, "label": f"{label} (rate {rate:g})"}
            axes.plot(losses["step"] + 1, losses["mean"], **style)
        axes.axhline(unigrams, color="#333333", linewidth=1, label="word frequencies alone")
        log_steps(axes, "training loss, nats\n(mean of 20 steps)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    figure("2.4", draw)
    (expected, rate), (low, low_rate), (_, high_rate) = map(runs.get, ("expected", "low-rate", "high-rate"))
    numbers = {"case 1: rate divided by": rate / low_rate, "case 2: rate multiplied by": high_rate / rate}
    for loss in (10.0, 9.5):
        on_time, late = (losses["step"][losses["mean"] < loss][0] for losses in (expected, low))
        numbers[f"case 1 later by, at {loss:g}"] = late / on_time
    for name, (losses, _) in runs.items():
        numbers[f"{name}: highest step"] = losses["loss"].max()
        numbers[f"{name}: mean from step 200"] = losses["loss"][losses["step"] >= 200].mean()
    return numbers


def tuning() -> dict[str, float]:
    """2.5: settings at one budget, compared at the same seed, and the spread of those with more seeds."""
    settings: dict[str, list[dict]] = {}
    for setting, seed in RUNS["2.5"]:
        settings.setdefault(setting, []).append(result(run_name(setting, seed)))
    rows = []
    for runs in settings.values():
        c, losses = runs[0]["config"], {h: [run["losses"][h] for run in runs] for h in ("choose", "report")}
        of_seeds = [
            f"{np.mean(half):.3f} ({min(half):.3f}--{max(half):.3f})" if len(runs) > 1 else ""
            for half in losses.values()
        ]
        setting = ["{n_embd} × {n_layer}".format(**c["model_config"]), f"{c['max_lr']:g}"]
        first = [f"{half[0]:.3f}" for half in losses.values()]
        steps, ppl = f"{c['num_training_steps']:,}", f"{math.exp(losses['report'][0]):,.0f}"
        rows.append([*setting, steps, *first, ppl, *of_seeds])
    header = [
        "width × layers",
        "max. rate",
        "steps",
        "half 1",
        "half 2",
        "perplexity",
        "3 seeds, half 1",
        "half 2",
    ]
    write_table("2.5", header, rows)
    numbers = {
        f"{row[0]} at {row[1]}, half 2, behind": float(row[4]) - min(float(r[4]) for r in rows) for row in rows
    }
    low, high = ([run["losses"]["choose"] for run in settings[f"2.5-d128-lr{rate}e-3"]] for rate in (4, 8))
    numbers |= {"seed 0, half 1: 0.004 leads by": high[0] - low[0], "range of 0.004": np.ptp(low)}
    numbers |= {"3 seeds, half 1: 0.008 leads by": np.mean(low) - np.mean(high)}
    for rate in (4, 8):
        losses = [run["losses"]["report"] for run in settings[f"2.5-d128-lr{rate}e-3"]]
        numbers[f"3 seeds, half 2: perplexity at 0.00{rate}"] = math.exp(np.mean(losses))
    return numbers | of_mixture(settings["2.5-d128-lr4e-3"][0]["config"])


def tokens_read(config: dict) -> int:
    sizes = ("num_training_steps", "grad_accumulation_steps", "batch_size", "seq_len")
    return math.prod(config[size] for size in sizes)


def of_mixture(config: dict) -> dict[str, float]:
    """How much of the mixture a run reads. The sample is in it five times."""
    passes = tokens_read(config) / N_MIXTURE
    return {"million tokens": tokens_read(config) / 1e6, "passes": passes, "C4 is read": 5 * passes}


def final() -> dict[str, float]:
    """2.6: the model that ships."""
    numbers = {}
    for name, loss in result("2.6-model")["losses"].items():
        numbers |= {f"{name}: loss": loss, f"{name}: perplexity": math.exp(loss)}
    run, small = result("2.6-final"), result("2.5-d128-lr4e-3")
    numbers |= {"times 2.5": run["flops"] / small["flops"], "minutes": run["seconds"] / 60}
    numbers |= {"steps": run["config"]["num_training_steps"], "max. rate": run["config"]["max_lr"]}
    numbers |= {"tokens per parameter": tokens_read(run["config"]) / N_PARAMETERS}
    return numbers | of_mixture(run["config"])


def tex(text: str) -> str:
    """Generated text in one line of TeX; a character that the font may lack becomes "?"."""
    line = text.strip().replace("\n", " / ")
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    line = "".join(c if c.isprintable() and (ord(c) < 256 or c in "‘’“”–—…") else "?" for c in line)
    return re.sub(r"[\\~^#$%&_{}<>|]", lambda found: special.get(found[0], f"\\{found[0]}"), line)


def generations() -> dict[str, float]:
    """3.2: texts, and numbers at each temperature."""
    r, texts = result("3.2"), []
    rows = [
        [name, m["texts"], f"{100 * m['new-trigrams']:.0f}\\%", f"{m['loss']:.1f}"]
        for name, m in r["measured"].items()
    ]
    write_table("3.2", ["temperature", "texts", "new trigrams", "loss"], rows)
    for i, prefix in enumerate(r["prefixes"]):
        shown = "\n".join(rf"\continuation{{{t}}}{{{tex(new[i])}}}" for t, new in r["texts"].items())
        texts.append(f"\\prompt{{{tex(prefix)}}}\n{shown}\n")
    (GENERATED / "3.2-bundled.tex").write_text("".join(texts[: r["bundled"]]))
    (GENERATED / "3.2-own.tex").write_text("".join(texts[r["bundled"] :]))
    return {"choices at 1": math.exp(r["measured"]["1"]["loss"])}


def sentiment() -> dict[str, float]:
    """3.5 and 3.6: the histogram of p(positive)."""
    r = result("3.5")
    p, labels = np.loadtxt(RESULTS / "3.5.csv", delimiter=",", skiprows=1).T
    plain, calibrated = r["accuracy"].values()
    half_width = 1.96 * math.sqrt(calibrated * (1 - calibrated) / r["n"])  # of the 95% interval of a share
    boundaries = {"median": (r["boundary"]["with calibration"], "-"), "empty review": (r["p-of-empty"], ":")}

    def draw(axes) -> None:
        bins = np.linspace(*np.quantile(p, [0.005, 0.995]), 31)
        inside = np.clip(p, bins[0], bins[-1])
        axes.hist(inside[labels == 0], bins, color=ORANGE, alpha=0.45, label="negative reviews")
        axes.hist(inside[labels == 1], bins, color=BLUE, histtype="step", linewidth=2, label="positive reviews")
        for name, (boundary, dashes) in boundaries.items():
            axes.axvline(boundary, color="#333333", linestyle=dashes, label=f"{name}: {boundary:.3f}")
        axes.set(xlabel='p(positive): share of " good" against " bad" as the next token', ylabel="reviews")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    figure("3.6", draw)
    numbers = {name: boundary for name, (boundary, _) in boundaries.items()}
    numbers |= {"accuracy": plain, "calibrated accuracy": calibrated, "plus or minus": half_width}
    numbers |= {"called positive": (p > 0.5).mean(), "AUC": r["auc"], "reviews": r["n"]}
    counts = {name: r[f"{name}-in-c4"] for name in ("good", "bad")}
    numbers |= {"share of good in C4": counts["good"] / sum(counts.values())}
    numbers |= {"accuracy with the empty review's threshold": ((p > r["p-of-empty"]) == labels).mean()}
    return numbers | counts


QUESTIONS = {"2.2": schedules, "2.3": lengths, "2.4": faults, "2.5": tuning, "2.6": final}
QUESTIONS |= {"3.2": generations, "3.5": sentiment}


def sources_digest() -> str:
    """sha256 of everything that answers.pdf is made from; the pdf names it, so that an old one is noticed."""
    paths = [REPORT / "answers.tex", *sorted(GENERATED.iterdir()), *sorted((REPORT / "configs").iterdir())]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def main() -> None:
    """Do what the module's docstring says."""
    for question, draw in QUESTIONS.items():
        print(f"\n{question}")
        for name, value in draw().items():
            print(f"  {name:50} {value:.4f}")
    if shutil.which("pdflatex") is None:
        sys.exit("pdflatex is not installed; see the top of report/answers.py")
    source = rf"\pdfobjcompresslevel=1\pdfinfo{{/Subject (sources {sources_digest()})}}\input{{answers}}"
    command = ["pdflatex", "-halt-on-error", f"-output-directory={OUTPUTS}", "-jobname=answers", source]
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=REPORT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pdflatex failed, see {OUTPUTS / 'answers.log'}:\n{done.stdout[-800:]}")
    shutil.copyfile(OUTPUTS / "answers.pdf", REPORT / "answers.pdf")
    print("Saved to report/answers.pdf.")


if __name__ == "__main__":
    main()
