"""The hand-in, with a tiny solution: a good one is packed, and each fault is named."""

import shutil
import zipfile
from pathlib import Path

import pytest
import submit
import torch
import yaml
from tiny_run import KEYS, status

from model import DecoderLM

ROOT = submit.ROOT
NAMES = {*submit.CODE, "model.pt", "config.yaml", "ada.pdf"}


@pytest.fixture
def solution(tmp_path, monkeypatch):
    """A folder with a trained model, answers and the four files, where the tests of the questions are not run."""
    root = tmp_path / "solution"
    (root / "report").mkdir(parents=True)
    for name in submit.CODE:
        shutil.copyfile(ROOT / name, root / name)
    torch.save(DecoderLM(50257, **KEYS["model_config"]).state_dict(), root / "model.pt")
    (root / "config.yaml").write_text(yaml.safe_dump(KEYS | {"output_dir": "out"}))
    (root / "report" / "answers.pdf").write_bytes(b"%PDF-1.5 ...")
    monkeypatch.setattr(submit, "ROOT", root)
    monkeypatch.setattr(submit, "check_alone", lambda files: "not run")
    monkeypatch.chdir(root)
    return root


def outcome(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed, of `submit.py ada --checkpoint model.pt …`."""
    ended = status(submit, "ada", "--checkpoint", "model.pt", *arguments)
    captured = capsys.readouterr()
    return ended, captured.out + captured.err


def test_a_good_solution_is_packed_under_the_exact_names(solution, capsys):
    ended, printed = outcome(capsys)
    assert ended == 0 and "[FAIL]" not in printed and printed.count("[OK]") == 4, printed
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


# ruff: noqa: E501 (one fault, one line)
# fmt: off
FAULTS = {
    "a missing file": (lambda root: (root / "generate.py").unlink(), "generate.py"),
    "a syntax error": (edit("classify.py", "def score(", "def score(("), "is not valid Python"),
    "new packages": (edit("model.py", "import math\n", "import jax, math\nfrom . import x\n"), "imports '.' (line"),
    "a ready-made layer": (edit("model.py", "nn.Linear(n_embd, n_embd)", "nn.MultiheadAttention(n_embd, n_head)"), "MultiheadAttention"),
    "no checkpoint": (lambda root: (root / "model.pt").unlink(), "model.pt: no such"),
    "another model's configuration": (edit("config.yaml", "n_embd: 8", "n_embd: 16"), "n_embd"),
    "too much training": (edit("config.yaml", "num_training_steps: 6", "num_training_steps: 2000000000"), "1e17"),
    "no PDF": (lambda root: (root / "report/answers.pdf").write_bytes(b"hello"), "answers.pdf is not a PDF"),
}
# fmt: on


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_packed_without_force(solution, capsys, fault):
    damage, sentence = FAULTS[fault]
    damage(solution)
    ended, printed = outcome(capsys)
    failed = [line for line in printed.splitlines() if line.startswith("[FAIL]")]
    assert len(failed) == 1 and sentence in failed[0], printed
    assert ended == 2 and not Path("ada.zip").exists()
    ended, printed = outcome(capsys, "--force")
    assert ended == 0 and "WARNING" in printed and Path("ada.zip").exists()


LINES = {  # of the code: whether a grader looks at it
    "import einops, omegaconf": False,
    "if __name__ == '__main__':\n    model.eval(); main()": False,
    **dict.fromkeys(("import importlib", "os._exit(0)", "torch.allclose = print", "main()", "eval('1')"), True),
}


@pytest.mark.parametrize("line", LINES)
def test_what_is_allowed_and_what_is_looked_at(line):
    flags = [f"train.py, line 1: {line}"] * LINES[line]
    assert submit.inspect_code("train.py", line.encode()) == {"refused": [], "ready-made": [], "flags": flags}


def test_a_large_checkpoint_is_refused(solution, capsys, monkeypatch):
    monkeypatch.setattr(submit, "MOST_MEGABYTES", 1)
    assert "[FAIL] model.pt has 1." in outcome(capsys)[1]


def test_an_andrew_id_is_a_plain_name(capsys):
    assert status(submit, "../ada") == 2 and "Andrew ID" in capsys.readouterr().err


LOST = "61 of 65 points, lost: 3.4 classify_binary_sentiment"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edit("model.py", "import math\n", "import math\nimport support\n"), "support"),
        pytest.param(edit("classify.py", "def classify_", "def other_"), LOST, marks=pytest.mark.soak),
    ],
    ids=["a file needs others", "a group is lost"],
)
def test_the_four_files_with_only_the_tests_beside_them(tmp_path, change, sentence):
    files = {name: Path(shutil.copyfile(ROOT / name, tmp_path / name)) for name in submit.CODE}
    change(tmp_path)
    with pytest.raises(submit.UserError, match=sentence):
        submit.check_alone(files)
