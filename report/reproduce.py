"""Repeat the experiments of report/answers.md, and put their figures and tables into place. From the root:

    python report/reproduce.py 2.5                     train what is not trained yet, measure, draw
    python report/reproduce.py 2.5 --draw              draw again from report/results, without any training
    python report/reproduce.py all --draw
    python report/reproduce.py train 1.1-untied --seed 1         one run by itself
    python report/reproduce.py pdf                     report/answers.pdf (needs pandoc and TeX, see below)

The data of 2.5 and 2.6 come first: data/README.md says how to build outputs/report/mixture.

Questions: 1.1 2.2 2.3 2.4 2.5 2.6 gpt2 3.2 3.3 3.6. A run is a file report/configs/QUESTION-SETTING.yaml, trained
by train.py into outputs/report/QUESTION-SETTING; an interrupted one continues. What it measured is kept in
report/results/. A figure goes to report/figures/, a table between its two markers in report/answers.md.
The pdf needs Debian's pandoc, texlive-latex-recommended, texlive-fonts-recommended and lmodern.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
sys.path[:0] = [str(ROOT), str(REPORT)]

import downstream  # noqa: E402
import tables  # noqa: E402
from tables import ANSWERS, CONFIGS, OUTPUTS, RESULTS  # noqa: E402
from variants import GPT2, UntiedLM  # noqa: E402

import train  # noqa: E402
from data.build import HELD_OUT, MIXTURE  # noqa: E402
from model import DecoderLM  # noqa: E402
from support.chunked_loss import ChunkedLanguageModelingLoss  # noqa: E402
from support.config import load_config  # noqa: E402
from support.errors import exit_on_user_error, require  # noqa: E402
from support.files import write_atomically  # noqa: E402
from support.metrics import read_metrics  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

VARIANTS = {"1.1-untied": UntiedLM, "1.1-untied-same-count": UntiedLM, "gpt2-gpt2": GPT2, "gpt2-tuned": GPT2}
THREE_SEEDS = (  # of all other settings there is one run
    "1.1-tied",
    "1.1-untied",
    "1.1-untied-same-count",
    "2.2-1-cosine",
    "2.2-2-constant",
    "2.2-3-no-warmup",
    "gpt2-gpt2",
    tables.RIVALS_OF,
)


# ---------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------


def train_run(setting: str, seed: int, fresh: bool) -> None:
    """Train report/configs/SETTING.yaml with this seed by train.py, which continues an interrupted run."""
    argv = [str(CONFIGS / f"{setting}.yaml"), *["--fresh"] * fresh]
    if seed:
        argv += ["--set", f"seed={seed}", f"output_dir={OUTPUTS / tables.run_name(setting, seed)}"]
    with mock.patch.object(train, "DecoderLM", VARIANTS.get(setting, DecoderLM)):
        train.main(argv)


def is_trained(run: str) -> bool:
    """Whether the run's results are there, and no interrupted one stands beside them."""
    return (OUTPUTS / run / "eval.json").exists() and not (OUTPUTS / run / "training_state.pt").exists()


def measure_run(setting: str, run: str) -> None:
    """Keep what a run measured: report/results/RUN.json, and its curve, thinned, in RUN.csv."""
    folder = OUTPUTS / run
    config = load_config(str(folder / "config.yaml"))
    model = VARIANTS.get(setting, DecoderLM)(get_tokenizer().n_vocab, **vars(config.model_config))
    of_run = json.loads((folder / "run.json").read_text())
    result = {
        **json.loads((folder / "eval.json").read_text()),
        **{key: of_run[key] for key in ("flops", "seconds", "device", "torch")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": dataclasses.asdict(config),
    }
    if config.data and (ROOT / config.data) == MIXTURE:  # the loss of the run itself is on held-out C4
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))  # of a variant, too
        wikipedia, loss_fn = np.load(HELD_OUT)["val"], ChunkedLanguageModelingLoss(model)
        batches = train.sequential_batch_sampler(wikipedia, "cpu", 8, config.seq_len, drop_last=False)
        result["wikipedia-loss"] = train.evaluate(model, batches, loss_fn=loss_fn)["val-loss"]
    write_atomically(RESULTS / f"{run}.json", json.dumps(result, indent=1) + "\n")

    metrics = read_metrics(folder / "metrics.csv")
    n_steps = len(metrics["step"])
    kept = [i for i in range(n_steps) if i < 50 or i % -(-n_steps // 500) == 0 or i == n_steps - 1]
    lines = [f"{metrics['step'][i]:.0f},{metrics['train-loss'][i]:.4f}\n" for i in kept]
    write_atomically(RESULTS / f"{run}.csv", "step,train-loss\n" + "".join(lines))


def train_question(question: str, fresh: bool) -> None:
    """Train and measure the runs of a question that are not there yet, all of them with `fresh`."""
    for setting in tables.settings(question):
        for seed in range(3 if setting in THREE_SEEDS else 1):
            run = tables.run_name(setting, seed)
            if fresh or not is_trained(run):
                train_run(setting, seed, fresh)
            if fresh or not (RESULTS / f"{run}.json").exists():
                measure_run(setting, run)


def draw_question(question: str) -> None:
    """Draw the figure of a question from report/results, and put its tables into the answers."""
    try:
        drawn = tables.DRAW[question]()
    except tables.NotMeasured as missing:
        print(f"{question}: not drawn, {missing}")
        return
    text = ANSWERS.read_text(encoding="utf-8")
    for name, table in drawn.items():
        place = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
        if not place.search(text):
            print(f"{question}: report/answers.md has no place for '{name}':\n\n{table}")
        text = place.sub(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text)
    write_atomically(ANSWERS, text)


def make_pdf() -> None:
    """report/answers.pdf from report/answers.md."""
    command = ["pandoc", "answers.md", "-o", "answers.pdf", "--from", "markdown-implicit_figures"]
    subprocess.run([*command, "-V", "colorlinks=true"], cwd=REPORT, check=True)


def main(argv: list[str] | None = None) -> None:
    """Do what the module's docstring lists."""
    parser = argparse.ArgumentParser(description="Repeat the experiments of report/answers.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("train", help="train and measure one run")
    one.add_argument("setting", help="name of a file in report/configs, without .yaml")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--fresh", action="store_true", help="start over")
    commands.add_parser("pdf", help="make report/answers.pdf")
    for question in [*tables.DRAW, "all"]:
        command = commands.add_parser(
            question, help=f"question {question}" if question != "all" else "all of them"
        )
        command.add_argument("--draw", action="store_true", help="only draw again what was measured")
        command.add_argument("--fresh", action="store_true", help="train and measure again")
    args = parser.parse_args(argv)

    with exit_on_user_error():
        if args.command == "pdf":
            make_pdf()
        elif args.command == "train":
            there = (CONFIGS / f"{args.setting}.yaml").exists()
            require(there, f"report/configs/{args.setting}.yaml does not exist; see that folder for the names")
            train_run(args.setting, args.seed, args.fresh)
            measure_run(args.setting, tables.run_name(args.setting, args.seed))
        else:
            for question in tables.DRAW if args.command == "all" else [args.command]:
                if not args.draw:
                    train_question(question, args.fresh)
                    if question in downstream.MEASURE:
                        downstream.MEASURE[question]()
                draw_question(question)


if __name__ == "__main__":
    main()
