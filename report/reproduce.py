"""Repeat the experiments of report/answers.tex and compile the answers. From the root:

    python report/reproduce.py 2.5             train what is not trained yet, measure everything, draw
    python report/reproduce.py 2.5 --fresh     train everything again
    python report/reproduce.py 2.5 --draw      only draw again from report/results
    python report/reproduce.py 3               all questions of part 3, with the model.pt that ships
    python report/reproduce.py pdf             report/answers.pdf

Questions: 2.2 2.3 2.4 2.5 2.6 3.2 3.5 (with 3.6), a part of the homework, or all. The data of 2.2, 2.5 and 2.6
come first: data/README.md says how to build outputs/report/mixture.

A run is a file report/configs/SETTING.yaml, trained by train.py into outputs/report/SETTING (with -seed1 or
-seed2 at the end for other seeds); an interrupted one resumes. What was measured goes to report/results/, and
from there the numbers and tables of answers.tex to report/generated/, its figures to report/figures/.
The pdf needs pdflatex: apt-get install texlive-latex-recommended texlive-fonts-recommended lmodern
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
sys.path[:0] = [str(ROOT), str(REPORT)]

import downstream  # noqa: E402
import numpy as np  # noqa: E402
import tables  # noqa: E402
from tables import OUTPUTS, RESULTS  # noqa: E402

import train  # noqa: E402
from support.checkpoint import load_trained_model  # noqa: E402
from support.errors import exit_on_user_error, require  # noqa: E402
from support.files import write_atomically  # noqa: E402


def planned(question: str) -> Iterator[tuple[str, int]]:
    """(setting, seed) of the runs of a question. Those of 2.5 depend on what its first five runs measured."""
    if question == "2.2":
        yield from ((setting, seed) for setting in tables.SCHEDULES for seed in (0, 1))
        yield from ((setting, 0) for setting in tables.OTHER_RATES)
        return
    yield from ((setting, 0) for setting in tables.settings(question))
    if question == "2.5":  # for the spread: the best two, and the one of 2.2, whose seeds differ most
        cosine = next(iter(tables.SCHEDULES))
        best = sorted(tables.settings("2.5"), key=lambda setting: tables.result(setting)["val-loss"])[:2]
        yield from ((setting, seed) for setting in dict.fromkeys([*best, cosine]) for seed in (1, 2))


def is_trained(run: str) -> bool:
    """Whether the run has ended and no interrupted one is in its folder."""
    return (OUTPUTS / run / "eval.json").exists() and not (OUTPUTS / run / "training_state.pt").exists()


def measure_run(run: str) -> None:
    """Write what a finished run measured to report/results: RUN.json, and its thinned curve RUN.csv."""
    folder = OUTPUTS / run
    trained = load_trained_model(None, str(folder / "model.pt"))
    of_run = json.loads((folder / "run.json").read_text())
    result = {
        **json.loads((folder / "eval.json").read_text()),
        **{key: of_run[key] for key in ("flops", "seconds", "device", "torch")},
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "config": dataclasses.asdict(trained.config),
    }
    write_atomically(RESULTS / f"{run}.json", json.dumps(result, indent=1) + "\n")

    metrics = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    n_steps = len(metrics["step"])
    kept = [i for i in range(n_steps) if i < 50 or i % -(-n_steps // 500) == 0 or i == n_steps - 1]
    lines = [f"{metrics['step'][i]:.0f},{metrics['train-loss'][i]:.4f}\n" for i in kept]
    write_atomically(RESULTS / f"{run}.csv", "step,train-loss\n" + "".join(lines))


def run_question(question: str, fresh: bool) -> None:
    """Train the runs that are not in outputs/report, all of them if `fresh`, and measure every one."""
    for setting, seed in planned(question):
        run = tables.run_name(setting, seed)
        if fresh or not is_trained(run):
            seeded = ["--set", f"seed={seed}", f"output_dir={OUTPUTS / run}"] if seed else []
            train.main([str(tables.CONFIGS / f"{setting}.yaml"), *seeded, *["--fresh"] * fresh])
        measure_run(run)
        print(f"{question}: measured outputs/report/{run} -> report/results/{run}.json")
    if question in downstream.MEASURE:
        downstream.MEASURE[question]()


def draw_question(question: str) -> None:
    """Write the numbers, tables and figures of a question from report/results."""
    values = tables.DRAW[question]()
    lines = [f"\\setresult{{{name}}}{{{value}}}\n" for name, value in values.items()]
    header = f"% Written by python report/reproduce.py {question}\n"
    write_atomically(tables.GENERATED / f"{question}.tex", header + "".join(lines))


def sources_digest() -> str:
    """sha256 of everything that answers.pdf is made from; the pdf names it, so that an old one is noticed."""
    folders = (tables.GENERATED, tables.FIGURES, tables.CONFIGS)
    paths = [REPORT / "answers.tex", *sorted(path for folder in folders for path in folder.iterdir())]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def make_pdf() -> None:
    """Compile report/answers.pdf."""
    source = rf"\pdfobjcompresslevel=1\pdfinfo{{/Subject (sources {sources_digest()})}}\input{{answers}}"
    outputs = ROOT / "outputs/report/tex"
    outputs.mkdir(parents=True, exist_ok=True)
    require(shutil.which("pdflatex") is not None, "pdflatex is not installed; see the top of report/reproduce.py")
    command = ["pdflatex", "-halt-on-error", f"-output-directory={outputs}", "-jobname=answers", source]
    done = subprocess.run(command, cwd=REPORT, capture_output=True, text=True)
    require(done.returncode == 0, f"pdflatex failed, see {outputs / 'answers.log'}:\n{done.stdout[-800:]}")
    (REPORT / "answers.pdf").write_bytes((outputs / "answers.pdf").read_bytes())
    print("Saved to report/answers.pdf.")


def main(argv: list[str] | None = None) -> None:
    """Do what the module's docstring lists."""
    parts = {"all": list(tables.DRAW), "pdf": []}
    for question in tables.DRAW:
        parts[question] = [question]
        parts.setdefault(question[0], []).append(question)
    parser = argparse.ArgumentParser(description="Repeat the experiments of report/answers.tex.")
    parser.add_argument("what", choices=sorted(parts), help="a question, a part of the homework, all, or pdf")
    parser.add_argument("--draw", action="store_true", help="only draw again from report/results")
    parser.add_argument("--fresh", action="store_true", help="train again what is trained already")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        for question in parts[args.what]:
            if args.draw:
                print(f"{question}: drawn from report/results; nothing was trained or measured")
            else:
                run_question(question, args.fresh)
            draw_question(question)
        if args.what == "pdf":
            make_pdf()


if __name__ == "__main__":
    main()
