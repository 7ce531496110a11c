"""The three commands end to end on a tiny model: their files, their flags, and every mistake in their input."""

import csv
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_configuration import COURSE_YAML
from tiny_run import ROOT, TinyRun, assert_refused, files, python, random_tokens, status

import classify
import generate
import train
from model import DecoderLM

OUT = Path("outputs/course")
DATA = ("course.yaml", "--data", "tokens.npz", "--set", "device=cpu")
QUICK = {generate: ("--prompt", "a", "--max-new-tokens", "1"), classify: ("--data", "reviews.csv")}
both = pytest.mark.parametrize("script", QUICK, ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder in which the course's YAML has been trained, word for word, on a small token file."""
    folder = tmp_path_factory.mktemp("run")
    np.savez(folder / "tokens.npz", train=random_tokens(900), val=random_tokens(300, seed=4))
    for name, text in {
        "course.yaml": COURSE_YAML,
        "reviews.csv": "text,label\nit is a,1\nit is b,0\nit is c,1\n",
        "bad.jsonl": '"good"\n{"text": "bad"}\n',
    }.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert status(train, *DATA) == 0
    return folder


@pytest.fixture
def inside(run_folder, monkeypatch, quick):
    """The same folder as the current one."""
    monkeypatch.chdir(run_folder)
    return run_folder


def generated(*arguments, folder=OUT) -> list[tuple[str, str]]:
    """The prefixes and their continuations that generate.py writes."""
    assert status(generate, *arguments) == 0
    lines = (folder / "generation.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return [(line["prefix"], line["generation"]) for line in map(json.loads, lines)]


def classified(*arguments, folder=OUT) -> list[dict]:
    """The rows of the table that classify.py writes."""
    assert status(classify, *arguments) == 0
    return list(csv.DictReader((folder / "classification.csv").open(encoding="utf-8")))


# --- train.py --------------------------------------------------------------------------------------------


def test_a_run_writes_what_the_readme_lists(run_folder):
    out = run_folder / OUT
    for name in ("config.yaml", "metrics.csv", "model.pt", "eval.json", "curve.png", "run.json"):
        assert (out / name).stat().st_size > 0, f"{name} is empty"
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [(row["step"], row["tokens"]) for row in rows] == [("0", "128"), ("1", "256"), ("2", "384")]
    evaluation, run = (json.loads((out / name).read_text()) for name in ("eval.json", "run.json"))
    # 300 tokens hold 9 rows of 32, each with 31 predictions; an incomplete last batch counts too.
    assert (evaluation["tokens-predicted"], evaluation["seq_len"]) == (9 * 31, 32)
    assert evaluation["val-perplexity"] == pytest.approx(math.exp(evaluation["val-loss"]))
    assert run["tokens-per-second"] == pytest.approx(384 / run["seconds"], rel=0.01)
    model = DecoderLM(50257, **yaml.safe_load((out / "config.yaml").read_text())["model_config"])
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))


def test_evaluation_does_not_depend_on_the_batch_size_and_writes_nothing(inside, capsys):
    before, losses = files(inside), set()
    for batch_size in (1, 2, 64):
        assert status(train, *DATA, "--evaluate", OUT, "--set", f"batch_size={batch_size}") == 0
        losses.add(re.search(r"validation loss\W+([\d.]+)", capsys.readouterr().out)[1])
    loss = json.loads((OUT / "eval.json").read_text())["val-loss"]
    assert len(losses) == 1 and float(losses.pop()) == pytest.approx(loss, abs=1e-3)
    assert status(train, *DATA, "--dry-run", "--set", "output_dir=new") == 0
    out = capsys.readouterr().out
    for fact in ("FLOPs", "parameters", "384", "model.pt"):
        assert fact in out, f"the dry run does not say '{fact}'"
    assert files(inside) == before


def raising(error):
    def fail(*args, **keys):
        raise error

    return fail


def test_unfinished_student_code_costs_only_what_it_does(tmp_path, monkeypatch, quick):
    """A train() without the package's extras, and generate() not written yet, as in the starter edition."""
    originals = train.train, train.sequential_batch_sampler, train.evaluate
    original_train, original_batches, original_evaluate = originals

    def plain_train(model, batches, optimizer, schedule, autocast, steps, accumulation):
        original_train(model, batches, optimizer, schedule, autocast, steps, accumulation)
        train.wandb.log({"train-loss": 1.0})  # also without a login

    monkeypatch.setattr(train, "train", plain_train)
    monkeypatch.setattr(train, "evaluate", lambda a, b, c: original_evaluate(a, b, c))
    monkeypatch.setattr(train, "sequential_batch_sampler", lambda a, b, c, d: original_batches(a, b, c, d))
    monkeypatch.setattr(generate, "generate", raising(NotImplementedError("question 3.1: not written yet")))
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    assert json.loads((tiny.out / "eval.json").read_text())["val-loss"] > 0
    monkeypatch.setattr(train, "train", raising(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):  # a mistake in a student's code keeps its traceback
        tiny.main("--fresh")


def test_wandb_that_fails_is_a_note_and_memory_that_runs_out_one_sentence(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(train.wandb, "init", raising(RuntimeError("the server is on fire")))
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    assert "on fire" in capsys.readouterr().out
    monkeypatch.setattr(train, "train", raising(MemoryError()))
    assert tiny.main("--fresh") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memory" in error and "batch_size" in error


def test_terminal_of_80_columns_and_commands_that_can_be_pasted(tmp_path, monkeypatch, quick):
    out, bar = io.StringIO(), io.StringIO()
    out.isatty = bar.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", bar)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ["a sample"])
    monkeypatch.chdir(tmp_path)
    assert TinyRun(tmp_path, output_dir="outputs/a run").main() == 0
    lines = re.sub(r"\033\[\d*m", "", out.getvalue()).split("\n")
    assert not [line for line in lines if len(line) > 80 and str(tmp_path) not in line and "python" not in line]
    bars = [part for part in re.split(r"[\r\n]", bar.getvalue()) if "6/6" in part]
    assert bars and all(len(part) <= 80 for part in bars), bars
    commands = [line for line in lines if "generate.py" in line]
    assert commands and all("'outputs/a run" in command for command in commands), commands


# --- generate.py and classify.py -------------------------------------------------------------------------


def test_generate_finds_the_newest_model_and_writes_beside_it(inside, tmp_path, capsys, monkeypatch):
    texts = generated("--prefixes", ROOT / "prefixs.json", "--max_new_tokens", 4)
    assert [prefix for prefix, _ in texts] == json.loads((ROOT / "prefixs.json").read_text())
    out = capsys.readouterr().out
    assert str(OUT / "model.pt") in out and re.search(r"in [\d.]+ \w+, written to ", out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n\nThe city\n"))
    assert status(generate, "--interactive", "--max_new_tokens", 2) == 0
    if not any((ROOT / "outputs").glob("*/model.pt")):
        monkeypatch.chdir(tmp_path)
        assert generated(*QUICK[generate], "--out", tmp_path, folder=tmp_path), (
            "the package's own is the last resort"
        )


def test_prompts_are_never_rewritten(inside, tmp_path, capsys):
    assert generated("--max-new-tokens=1", "--prompt=--well-known facts")[0][0] == "--well-known facts"
    prompts = ["--top-k", "", " a\u2028b", "word " * 200, "a" + " " * 1_000_000]  # U+2028 ends no line
    objects = "\n".join(json.dumps({"prefix": prompt}, ensure_ascii=False) for prompt in prompts) + "\r\n"
    for text in ("\ufeff" + json.dumps(prompts), objects):
        (tmp_path / "p.json").write_text(text, encoding="utf-8", newline="")
        capsys.readouterr()
        texts = generated("--max_new_tokens", 1, "--prefixes", tmp_path / "p.json")
        assert [prefix for prefix, _ in texts] == prompts
        assert "64" in capsys.readouterr().out, "nothing says that only 64 tokens of a prompt are used"


def test_sampling_repeats_by_its_seed_and_the_smallest_limits_are_greedy(inside):
    sampled = [
        generated("--temperature", 1, "--seed", n, "--num_samples", 2, "--max_new_tokens", 4) for n in (1, 1, 2)
    ]
    assert len(sampled[0]) == 6 and sampled[0] == sampled[1] != sampled[2]
    prompt = ("--prompt", "a", "--max_new_tokens", 4)
    for limit in (["--top_p", "1e-9"], ["--top-k", "1"]):
        assert generated(*prompt, "--temperature", 1, *limit) == generated(*prompt)


def test_classify_prints_both_accuracies_and_writes_the_chosen_predictions(inside, capsys):
    for flags, name in (([], "without calibration"), (["--calibrate"], "with calibration")):
        rows, out = classified(OUT / "model.pt", "--limit", 30, *flags), capsys.readouterr().out
        assert "NOT Yelp" in out, "offline, the bundled reviews stand in and the screen must say so"
        assert "without calibration" in out and "with calibration" in out and "written to" in out
        p = [float(row["p"]) for row in rows]
        boundary = sorted(p)[(len(p) - 1) // 2] if flags else 0.5
        assert [row["prediction"] for row in rows] == [str(int(x > boundary)) for x in p], name
        right = np.mean([row["prediction"] == row["label"] for row in rows])
        assert json.loads((OUT / "classification.json").read_text())["accuracy"][name] == pytest.approx(right)


def test_classify_labels_texts_without_labels(inside, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text('text\n"a, b"\nc\nd\n')
    rows = classified(OUT, "--data", tmp_path / "texts.csv", "--out", tmp_path, folder=tmp_path)
    assert [row["text"] for row in rows] == ["a, b", "c", "d"]
    assert {row["prediction"] for row in rows} <= {"0", "1"} and "accuracy" not in capsys.readouterr().out


@both
def test_checkpoint_by_path_flag_folder_or_configuration(inside, capsys, script):
    for argument in (
        OUT / "model.pt",
        OUT,
        f"--checkpoint={OUT}",
        "--config=course.yaml",
        f"--config={OUT}/config.yaml",
    ):
        assert status(script, argument, *QUICK[script]) == 0
        assert "outputs/course/model.pt" in capsys.readouterr().out


@both
def test_results_go_where_out_says_or_are_refused_before_computing(inside, tmp_path, monkeypatch, capsys, script):
    before = files(inside)
    assert status(script, OUT, *QUICK[script], "--out", tmp_path / "new folder") == 0
    assert files(inside) == before and files(tmp_path)
    assert str(tmp_path / "new folder") in capsys.readouterr().out
    monkeypatch.setattr(DecoderLM, "hidden_states", lambda *_: pytest.fail("it computed before it looked"))
    for place in (inside / "course.yaml", "/proc/nowhere"):
        assert_refused(capsys, inside, [place], script, OUT, *QUICK[script], "--out", place)


@both
def test_model_whose_logits_are_not_numbers_is_an_error(inside, tmp_path, capsys, script):
    """Finite weights can overflow: such a model would write '!!!!' and an accuracy of 55%."""
    state = torch.load(OUT / "model.pt", weights_only=True)
    state["blocks.0.ff.linear_out.weight"].fill_(3e38)
    torch.save(state, tmp_path / "model.pt")
    shutil.copy(OUT / "config.yaml", tmp_path)
    assert_refused(capsys, tmp_path, [], script, tmp_path / "model.pt", *QUICK[script], status_wanted=1)


BAD_ARGUMENTS = {
    "no yaml": (train, ["nowhere.yaml"], ["nowhere.yaml"]),
    "set unknown": (train, ["course.yaml", "--set", "lr=1", "--set", "seed=2"], ["lr"]),
    "short data": (train, [*DATA, "--set", "seq_len=301", "model_config.n_positions=999"], ["val", "300", "301"]),
    "output_dir": (train, [*DATA, "--set", "output_dir=/proc/nowhere"], ["output_dir", "/proc/nowhere"]),
    "init nothing": (train, [*DATA, "--init", "nowhere.pt", "--dry-run"], ["nowhere.pt"]),
    "cuda": (train, ["course.yaml", "--set", "device=cuda:99"], ["cuda"]),
    "temperature": (generate, ["--temperature", "-1"], ["temperature", "-1"]),
    "mistyped flag": (generate, ["--temprature", "1"], ["temprature", "temperature"]),
    "unset variable": (train, ["course.yaml", "--evaluate", ""], ["evaluate"]),
    "bad line": (generate, ["--prefixes", "bad.jsonl"], ["bad.jsonl", "line 2"]),
    "no reviews": (classify, ["--data", "nowhere.csv"], ["nowhere.csv"]),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, inside, capsys):
    script, arguments, words = BAD_ARGUMENTS[name]
    assert_refused(capsys, inside, words, script, *arguments)


# --- the machine and the files -----------------------------------------------------------------------------


def test_commands_need_no_module_of_unix(monkeypatch, tmp_path, quick):
    """As on Windows, as far as that can be simulated: some modules and signals are missing."""
    for name in ("resource", "fcntl", "termios", "pwd", "grp"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("SIGHUP", "SIGKILL", "SIGQUIT"):
        monkeypatch.delattr(f"signal.{name}")
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("train", "generate", "classify", "model", "support"):
            monkeypatch.delitem(sys.modules, name)
    tiny = TinyRun(tmp_path)
    (tmp_path / "reviews.csv").write_text("text,label\na,1\nb,0\n")
    monkeypatch.chdir(tmp_path)
    assert status(importlib.import_module("train"), tiny.config) == 0
    for script, arguments in QUICK.items():
        assert status(importlib.import_module(script.__name__), tiny.out, *arguments) == 0


def test_graded_files_need_few_files_and_none_to_be_imported(tmp_path):
    """Copied into an empty folder they import; a whole training run loads at most 14 files, each once."""
    for name in ("model.py", "train.py", "generate.py", "classify.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = python("-c", "import train, generate, classify", cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    code = f"""
import runpy, sys
sys.argv = ["train.py", {str(TinyRun(tmp_path).config)!r}]
runpy.run_path("train.py", run_name="__main__")
print(*[module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)], sep="\\n")
"""
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    own = [line for line in done.stdout.splitlines() if line.startswith(str(ROOT)) and "site-packages" not in line]
    assert str(ROOT / "train.py") not in own, "train.py was loaded twice, as __main__ and as train"
    assert 5 < len([path for path in own if "__init__" not in path]) <= 13, own  # and train.py itself
