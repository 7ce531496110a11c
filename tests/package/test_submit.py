"""The hand-in, with a tiny solution: a good one is packed, and each fault is named."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
import submit
import torch
from tiny_run import KEYS, TinyRun

from model import DecoderLM
from support.config import dump_config, load_config

ROOT = submit.ROOT
NAMES = {*submit.CODE, "model.pt", "config.yaml", "ada.pdf"}


@pytest.fixture
def solution(tmp_path, monkeypatch):
    """A folder with a trained model, answers and the four files, where the tests of the questions are not run."""
    run = TinyRun(tmp_path)
    root = tmp_path / "solution"
    (root / "report").mkdir(parents=True)
    for name in submit.CODE:
        shutil.copyfile(ROOT / name, root / name)
    model = DecoderLM(50257, **KEYS["model_config"])
    torch.save(model.state_dict(), root / "model.pt")
    (root / "config.yaml").write_text(dump_config(load_config(str(run.config))))
    (root / "report" / "answers.pdf").write_bytes(b"%PDF-1.5 ...")
    monkeypatch.setattr(submit, "ROOT", root)
    monkeypatch.setattr(submit, "check_alone", lambda files: "not run")
    monkeypatch.chdir(root)
    return root


def outcome(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed, of `submit ada --checkpoint model.pt …`."""
    try:
        submit.main(["ada", "--checkpoint", "model.pt", *arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_good_solution_is_packed_under_the_exact_names(solution, capsys):
    status, printed = outcome(capsys)
    assert status == 0 and "[FAIL]" not in printed and printed.count("[OK]") == 4, printed
    with zipfile.ZipFile("ada.zip") as archive:
        assert set(archive.namelist()) == NAMES
        assert archive.read("model.pt") == (solution / "model.pt").read_bytes()
        assert archive.read("ada.pdf") == (solution / "report" / "answers.pdf").read_bytes()


def edit(name: str, old: str, new: str):
    def change(root: Path):
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def put(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


# ruff: noqa: E501 (one fault, one line)
# fmt: off
FAULTS = {
    "a missing file": (lambda root: (root / "generate.py").unlink(), "generate.py is missing"),
    "a syntax error": (edit("classify.py", "def score(", "def score(("), "classify.py, line 27, is not valid Python ('(' was never closed)"),
    "a new package": (edit("model.py", "import math\n", "import einops, math\n"), "imports 'einops'"),
    "a package at level": (edit("model.py", "import math\n", "from . import math\n"), "imports '.'"),
    "a call that leaves the process": (edit("train.py", "import math\n", "import math, os\nos._exit(0)\n"), "uses os._exit: not allowed"),
    "a module that reaches the tests": (edit("train.py", "import math\n", "import importlib, math\n"), "imports 'importlib'"),
    "a ready-made layer": (edit("model.py", "nn.Linear(n_embd, n_embd)", "nn.MultiheadAttention(n_embd, n_head)"), "uses MultiheadAttention"),
    "ready-made attention": (edit("model.py", "F.softmax(", "F.scaled_dot_product_attention("), "uses scaled_dot_product_attention"),
    "ready-made, imported": (edit("model.py", "from torch import nn\n", "from torch import nn\nfrom torch.nn import TransformerDecoder\n"), "uses TransformerDecoder"),
    "no checkpoint": (lambda root: (root / "model.pt").unlink(), "model.pt: no such checkpoint"),
    "no configuration": (lambda root: (root / "config.yaml").unlink(), "no config.yaml beside it"),
    "a foreign checkpoint": (put("model.pt", b"<html>"), "web page instead of a PyTorch checkpoint"),
    "another model's configuration": (edit("config.yaml", "n_embd: 8", "n_embd: 16"), "n_embd = 8"),
    "too much training": (edit("config.yaml", "num_training_steps: 6", "num_training_steps: 6000000000"), "more than the 1e17 allowed"),
    "no answers": (lambda root: (root / "report" / "answers.pdf").unlink(), "the PDF of your answers is missing"),
    "two PDFs": (put("notes.pdf", b"%PDF-"), "several PDFs"),
    "answers that are not a PDF": (put("report/answers.pdf", b"hello"), "is not a PDF"),
}
# fmt: on


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_packed(solution, capsys, fault):
    damage, sentence = FAULTS[fault]
    damage(solution)
    status, printed = outcome(capsys)
    failed = [line for line in printed.splitlines() if line.startswith("[FAIL]")]
    assert len(failed) == 1 and sentence in failed[0], printed
    assert status == 2 and "1 check failed, nothing is packed; fix it, or pack" in printed
    assert not Path("ada.zip").exists()


@pytest.mark.parametrize(("fault", "missing"), [("no answers", {"ada.pdf"}), ("a ready-made layer", set())])
def test_force_packs_what_there_is_with_a_warning(solution, capsys, fault, missing):
    FAULTS[fault][0](solution)
    status, printed = outcome(capsys, "--force")
    assert status == 0 and "WARNING: 1 check failed, packed anyway" in printed
    with zipfile.ZipFile("ada.zip") as archive:
        assert set(archive.namelist()) == NAMES - missing


def test_a_large_checkpoint_is_refused(solution, capsys, monkeypatch):
    monkeypatch.setattr(submit, "MOST_MEGABYTES", 1)
    _, printed = outcome(capsys)
    assert "[FAIL] model.pt has 1." in printed and "the course takes under 1;" in printed


def test_the_model_that_comes_with_the_package_is_refused(solution, capsys, monkeypatch):
    digest = hashlib.sha256((solution / "model.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(submit, "SHIPPED_SHA256", frozenset({digest}))
    assert "[FAIL] model.pt came with the package" in outcome(capsys)[1]


@pytest.mark.skipif(not (ROOT / "model.pt").exists(), reason="no model.pt at the top level, so none to know again")
def test_the_shipped_model_is_known():
    digest = hashlib.sha256((ROOT / "model.pt").read_bytes()).hexdigest()
    assert digest in submit.SHIPPED_SHA256, f"add {digest} to submit.SHIPPED_SHA256"


def test_code_that_raises_fails_its_check_only(solution, capsys, monkeypatch):
    def broken(files):
        raise NotImplementedError("question 1.3")

    monkeypatch.setattr(submit, "check_alone", broken)
    _, printed = outcome(capsys)
    assert "[FAIL] your code raised NotImplementedError('question 1.3')" in printed
    assert printed.count("[OK]") == 3


@pytest.mark.parametrize("name", ["", "Ada", "../ada", "ada.zip"])
def test_an_andrew_id_is_a_plain_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        submit.main([name])
    assert stop.value.code == 2 and "not an Andrew ID" in capsys.readouterr().err


class TestAlone:
    """The four files in an empty folder, with only the tests beside them."""

    @pytest.mark.soak
    def test_points_and_lost_groups_are_reported(self, tmp_path):
        for name in submit.CODE:
            shutil.copyfile(ROOT / name, tmp_path / name)
        files = {name: tmp_path / name for name in submit.CODE}
        edit("classify.py", "def classify_binary_sentiment(", "def classify(")(tmp_path)
        with pytest.raises(submit.UserError, match="61 of 65 points, lost: 3.4 classify_binary_sentiment; run"):
            submit.check_alone(files)

    @pytest.mark.parametrize("other", ["my_helpers", "support"])
    def test_a_file_that_needs_others_is_named(self, tmp_path, other):
        for name in submit.CODE:
            shutil.copyfile(ROOT / name, tmp_path / name)
        edit("model.py", "import math\n", f"import math\nimport {other}\n")(tmp_path)
        with pytest.raises(submit.UserError, match=f"the files do not run alone .*{other}"):
            submit.check_alone({name: tmp_path / name for name in submit.CODE})
