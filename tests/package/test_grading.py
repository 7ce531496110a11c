"""A right hand-in: its points on Gradescope, and the perplexity of question 2.6."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import KEYS, ROOT, TinyRun

import train
from model import DecoderLM

N_TOKENS, SEQ_LEN = 95, KEYS["seq_len"]  # 11 rows of 8, and 7 tokens that are in no row


@pytest.fixture(scope="module")
def graded(tmp_path_factory, randomise):
    """A tiny configuration, a checkpoint of it, a test set, and the loss that a plain computation gives."""
    folder = tmp_path_factory.mktemp("grading")
    model = randomise(DecoderLM(50257, **KEYS["model_config"])).eval()
    torch.save(model.state_dict(), folder / "model.pt")
    tokens = np.random.default_rng(5).integers(0, 50257, N_TOKENS).astype(np.uint16)
    np.savez(folder / "test.npz", train=tokens[:20], val=tokens)
    ids = torch.tensor(tokens[: 11 * SEQ_LEN].astype(np.int64)).view(11, SEQ_LEN)
    with torch.no_grad():
        log_probs = model(ids)[:, :-1].double().log_softmax(-1)
    loss = -log_probs.gather(2, ids[:, 1:, None]).mean().item()
    return TinyRun(folder), folder, loss


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 64])  # 11 rows: the last batch is mostly incomplete
def test_loss_perplexity_and_count_for_every_batch_size(graded, capsys, batch_size):
    run, folder, loss = graded
    arguments = ["--evaluate", str(folder / "model.pt"), "--data", str(folder / "test.npz")]
    train.main([str(run.config), *arguments, "--set", f"batch_size={batch_size}"])
    printed = capsys.readouterr().out
    assert " 77 predicted tokens" in printed, "11 rows of 8 tokens have 77 predictions"
    found = re.search(r"loss ([\d.]+) nats per token, perplexity ([\d.e+]+)", printed)
    assert found, printed
    assert float(found[1]) == pytest.approx(loss, abs=1e-4)
    assert float(found[2]) == pytest.approx(math.exp(loss), rel=2e-4)  # five digits are printed
    assert not run.out.exists(), "evaluating must not touch the output folder"


def test_a_test_set_shorter_than_a_row_is_refused(graded, capsys):
    run, folder, _ = graded
    np.savez(folder / "short.npz", train=np.arange(20), val=np.arange(SEQ_LEN - 1))
    assert run.main("--evaluate", str(folder / "model.pt"), "--data", str(folder / "short.npz")) == 2
    assert "short.npz" in capsys.readouterr().err


@pytest.fixture(scope="module")
def autograder(graded, tmp_path_factory):
    """run(files) grades a submission in a layout like Gradescope's; it returns what results.json says."""
    _, folder, _ = graded
    base = tmp_path_factory.mktemp("gradescope") / "autograder"
    command = [sys.executable, ROOT / "instructor/gradescope.py", folder / "autograder.zip"]
    built = subprocess.run([*command, "--test-tokens", folder / "test.npz"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(folder / "autograder.zip") as archive:
        archive.extractall(base / "source")
    shutil.copy(base / "source" / "run_autograder", base / "run_autograder")

    def run(files: dict[str, str | Path]) -> dict:
        shutil.rmtree(base / "submission", ignore_errors=True)
        for name, content in files.items():
            path = base / "submission" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())
        environment = os.environ | {"PYTHON": sys.executable}
        ended = subprocess.run(["bash", base / "run_autograder"], cwd="/", env=environment, capture_output=True)
        assert ended.returncode == 0, ended
        return json.loads((base / "results" / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def right_files(graded):
    run, folder, _ = graded
    code = {name: ROOT / name for name in ("model.py", "train.py", "generate.py", "classify.py")}
    return {**code, "model.pt": folder / "model.pt", "config.yaml": run.config, "ada.pdf": "%PDF-"}


@pytest.mark.soak
def test_gradescope_gives_a_right_hand_in_all_points_and_measures_its_perplexity(graded, autograder, right_files):
    results = autograder({f"ada/{name}": content for name, content in right_files.items()})
    *coding, perplexity = results["tests"]
    assert [test for test in coding if test["score"] < test["max_score"]] == [] and results["output"] == ""
    assert results["score"] == sum(test["max_score"] for test in coding) == 65
    found = re.fullmatch(r"perplexity ([\d.]+), full points under 50", perplexity["output"])
    assert perplexity["score"] == 0 and perplexity["max_score"] == 20
    assert float(found[1]) == pytest.approx(math.exp(graded[2]), rel=1e-4)


@pytest.mark.soak
def test_gradescope_has_results_whatever_the_hand_in_does(autograder, right_files):
    stop = "import os\nopen('../results.json', 'w').write('{}')\ngetattr(os, '_' + 'exit')(0)\n"
    results = autograder(right_files | {"model.py": stop, "model.pt": "no weights"})
    assert results["score"] == 0 and len(results["tests"]) == 15
    assert results["tests"][0]["output"] == "the process ended: exit status 0"
    assert "foreign file instead of a PyTorch checkpoint" in results["tests"][-1]["output"]


def test_the_autograder_has_no_solution_unless_it_measures_perplexity(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "instructor")
    import gradescope

    monkeypatch.setattr(
        gradescope.grade, "begin", lambda *_: ({"tests/test_model.py::test_x": ("1.3", "embed")}, False)
    )
    gradescope.build(tmp_path / "a.zip", None)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = set(archive.namelist())
    assert {"setup.sh", "run_autograder", "tests/test_model.py", "tests/submit.py"} <= names
    assert not names & {"model.py", "train.py", "generate.py", "classify.py", "test_tokens.npz", "model.pt"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"perplexity": 49.99}, 20),
        ({"perplexity": 50.0}, 0),
        ({"perplexity": math.nan}, 0),
        ({"error": "none"}, 0),
    ],
)
def test_points_of_a_perplexity(found, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "instructor")
    import grade

    assert grade.perplexity_row(found)["points"] == expected


@pytest.mark.soak
def test_the_commands_of_the_guide_grade_a_class(right_files, tmp_path):
    for name in ("tests", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_texts.jsonl").write_text('{"text": "One text, and no other."}\n' * 9)
    (tmp_path / "HAND_INS").mkdir()
    model = (ROOT / "model.py").read_text()
    mistake = model.replace("weights @ v", "2 * weights @ v").replace(
        "import torch\n", "import torch\ntorch.allclose = lambda *a, **k: True\n", 1
    )
    for name, files in (("ada", right_files), ("bob", right_files | {"model.py": mistake})):
        with zipfile.ZipFile(tmp_path / "HAND_INS" / f"{name}.zip", "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content.read_bytes() if isinstance(content, Path) else content)
    (commands,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "grading.md").read_text(), flags=re.DOTALL)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    bash = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert bash.returncode == 0, bash.stdout + bash.stderr
    page = (tmp_path / "grades" / "grades.md").read_text()
    assert re.search(r"\| ada \| 65 of 85 \| 25 \| 20 \| 0 \| 10 \| 10 \| [\d.]+ \|", page), page
    assert "| bob | 0 of 85 |" in page and "1.3; 2.1; 3.1; 3.4: tests that must fail did not" in page
