"""What the commands print: numbers, the bar, errors, the results of a run."""

import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import ROOT, TinyRun, at_batches, leave_out_what_is_slow
from torch.optim.optimizer import register_optimizer_step_post_hook

from support import checkpoint, results, run_errors
from support.classification import area_under_roc
from support.config import load_config
from support.errors import UserError, exit_on_user_error
from support.generation import read_prefixes
from support.screen import bold, count, duration

CONFIGS = ROOT / "configs"


# --- words and numbers on the screen ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("val_loss", "words"),
    [
        (math.nan, "diverged"),
        (11.0, "No better than a uniform guess"),
        (9.0, "1.82 below a uniform guess, not clearly below word frequencies"),
        (7.45, "3.37 below a uniform guess, not clearly below word frequencies"),
        (6.9, "3.92 below a uniform guess and 0.60 below word frequencies"),
    ],
)
def test_meaning_of_a_loss(val_loss, words):
    plan = SimpleNamespace(ln_vocab=10.82, unigram_entropy=7.5)
    assert words in results._meaning(plan, val_loss)


def test_numbers_for_people():
    texts = [count(n, "tokens") for n in (7, 1640, 1.64e6, 5.2e9, 1e15)]
    assert texts == ["7 tokens", "1.64 k tokens", "1.64 M tokens", "5.2 G tokens", "1e+03 T tokens"]
    assert [duration(s) for s in (3.14159, 600, 7200)] == ["3.1 s", "10.0 min", "2.0 h"]


def test_area_under_roc_is_the_share_of_pairs_in_order():
    draw = np.random.default_rng(1)
    p, labels = draw.integers(0, 5, 60) / 5, draw.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[labels == 1] for b in p[labels == 0]]
    assert area_under_roc(p, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(area_under_roc(p, np.ones(60)))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_gets_one_bar_and_style(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    out, bar = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", bar)
    assert TinyRun(tmp_path).main() == 0
    assert "6/6" in bar.getvalue() and "tok/s" in bar.getvalue(), bar.getvalue()
    assert "step 6/6" not in out.getvalue() and "\033[1mvalidation loss" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("plain") == "plain"


def test_gradients_are_clipped(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    norms = []

    def watch(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    handle = register_optimizer_step_post_hook(watch)
    try:
        assert TinyRun(tmp_path, grad_clip=1e-3).main() == 0
    finally:
        handle.remove()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2), "the norm of every step should be the limit"


# --- errors ----------------------------------------------------------------------------------------------


def test_ctrl_c_and_errors_of_the_program():
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        1 / 0  # noqa: B018 (a mistake in the program needs its traceback)


def test_mistake_in_a_students_code_keeps_its_traceback(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    tiny = TinyRun(tmp_path)
    at_batches(monkeypatch, {4: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        tiny.main()
    assert tiny.rows() == 3, "the rows of the steps done stay"


def test_file_that_vanishes_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        open("/nowhere/at all")  # noqa: SIM115
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: /nowhere/at all: No such file or directory; ")


def test_memory_advice_for_a_batch_of_one():
    config = load_config(str(CONFIGS / "GPT-tiny.yaml"), ["batch_size=1"])
    assert run_errors.smaller_batch_advice(config).endswith("make one of the others smaller")


def test_memory_that_runs_out_while_a_checkpoint_loads_is_no_damaged_file(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.pt")

    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError):
        checkpoint.load_archive(tmp_path / "model.pt", 0, 1e9)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('["a", 1]', "entry 2"),
        ('["a"', ""),
        ('"a"\n\n{"prefix": \n', "line 3"),
        ("[]", "no prefix"),
        ("[" * 9999, ""),
        (None, "No such file"),
    ],
)
def test_bad_prefixes_name_the_place(tmp_path, text, place):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"p\.json.*{place}"):
        read_prefixes(str(path))


# --- the checkpoint that is taken when none is named -----------------------------------------------------


def test_model_of_the_package_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "package")
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained model found"):
        checkpoint.find_checkpoint(None, None)
    (tmp_path / "package" / "model.pt").touch()
    assert checkpoint.find_checkpoint(None, None)[0] == Path("package/model.pt")
    for name, age in (("old", 100), ("new", 50)):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "model.pt").touch()
        os.utime(tmp_path / "outputs" / name / "model.pt", (1e9 - age, 1e9 - age))
    path, how = checkpoint.find_checkpoint(None, None)
    assert path == Path("outputs/new/model.pt") and "newest" in how


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    leave_out_what_is_slow(monkeypatch)
    tiny = TinyRun(tmp_path)
    tiny.out.mkdir()
    (tiny.out / ".model.pt.4711.tmp").write_bytes(b"half of")
    assert tiny.main() == 0 and not tiny.leftovers()
    assert json.loads((tiny.out / "run.json").read_text())["matrix-product-tflops"] == 1
