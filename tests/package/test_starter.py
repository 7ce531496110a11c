"""The student's edition as it is handed out, with the package's solution, and with its functions filled in."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import make_starter
import points
import pytest

ROOT = Path(make_starter.__file__).resolve().parents[1]
SOLUTIONS = Path(make_starter.__file__).parent / "solutions"
FULL_POINTS = sum(points for points, _ in points.GROUPS.values())


@pytest.fixture
def starter(tmp_path):
    make_starter.main([str(tmp_path / "starter")])
    return tmp_path / "starter"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def graded(folder: Path) -> tuple[dict, str]:
    """The points of the folder's tests, as the autograder's file has them, and what was printed."""
    files = [f"tests/test_{Path(name).stem}.py" for name in make_starter.GRADED]
    result = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "--points-json", "points.json")
    assert (folder / "points.json").exists(), result.stdout + result.stderr
    return json.loads((folder / "points.json").read_text(encoding="utf-8")), result.stdout


@pytest.mark.soak
def test_handed_out_it_imports_and_scores_nothing_with_clear_failures(starter):
    names = [Path(name).stem for name in make_starter.GRADED]
    imported = run(starter, "-c", f"import {', '.join(names)}")
    assert imported.returncode == 0, imported.stderr
    command = run(starter, "train.py", "configs/smoke.yaml")
    assert (command.returncode, command.stderr) == (
        2,
        "error: question 1.3: DecoderLM.__init__ is not written yet\n",
    )
    result, printed = graded(starter)
    assert result["score"] == 0
    assert len(result["tests"]) == len(points.GROUPS), "every part must be decided"
    for part in result["tests"]:
        assert "NotImplementedError: question " in part["output"], part  # its own, or the model's that it needs
    assert printed.count("is not written yet") == len(points.GROUPS), printed  # a line each, and no tracebacks
    assert "FAILED" not in printed and "ERROR" not in printed and len(printed.splitlines()) < 50, printed


@pytest.mark.soak
def test_with_our_solution_it_gets_all_points(starter):
    for name in make_starter.GRADED:
        shutil.copyfile(ROOT / name, starter / name)
    result, printed = graded(starter)
    assert result["score"] == FULL_POINTS and "skipped" not in printed, printed


def functions_of(text: str) -> dict[str, ast.FunctionDef]:
    found = make_starter.definitions(ast.parse(text))
    return {path: node for node, path in found if isinstance(node, ast.FunctionDef)}


def unwritten(node: ast.FunctionDef) -> bool:
    return "NotImplementedError" in ast.unparse(node)


def statements(node: ast.FunctionDef) -> list[ast.stmt]:
    """The body without the docstring."""
    return node.body[1:] if ast.get_docstring(node) else node.body


def solution_texts(name: str) -> list[str]:
    """The package's solution of a graded file, and those in solutions/; later ones do not need its helpers."""
    paths = [ROOT / name, *sorted(SOLUTIONS.glob(f"{Path(name).stem}_*.py"))]
    return [path.read_text(encoding="utf-8") for path in paths]


def filled(name: str) -> str:
    """The student's file with the body of each unwritten function taken from the last solution that has it."""
    text = make_starter.student_source(name)
    bodies = {}
    for solution in solution_texts(name):
        for path, node in functions_of(solution).items():
            body = statements(node)
            bodies[path] = solution.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    lines = text.splitlines()
    for path, node in reversed(functions_of(text).items()):
        if unwritten(node):
            lines[statements(node)[0].lineno - 1 : node.end_lineno] = bodies[path]
    return "\n".join(lines) + "\n"


@pytest.mark.soak
def test_filled_in_it_gets_all_points_and_the_commands_work(starter):
    for name in make_starter.GRADED:
        (starter / name).write_text(filled(name), encoding="utf-8")
    assert graded(starter)[0]["score"] == FULL_POINTS
    settings = ("num_training_steps=3", "num_warmup_steps=1", "batch_size=2", "seq_len=8", "data=tiny.npz")
    settings += ("model_config.n_embd=4",)
    make_tokens = "import numpy as np; t = np.arange(90, dtype=np.uint16); np.savez('tiny', train=t, val=t)"
    for command in (
        ("-c", make_tokens),
        ("train.py", "configs/smoke.yaml", "--set", *settings),
        ("generate.py", "--max_new_tokens", "3", "--temperature", "0.7"),
        ("classify.py", "--limit", "5", "--data", "data/reviews.jsonl"),
    ):
        result = run(starter, *command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    written = {path.name for path in (starter / "outputs" / "smoke").iterdir()}
    assert {"model.pt", "config.yaml", "eval.json", "generation.jsonl", "classification.json"} <= written


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def body_lines(node: ast.FunctionDef) -> set[str]:
    """The statements of a function, a line each, without docstring, comments and spaces."""
    lines = "\n".join(ast.unparse(statement) for statement in statements(node)).splitlines()
    return {squeezed(line) for line in lines}


def graded_lines() -> set[str]:
    """Lines that occur only in graded bodies and in helpers that are left out."""
    graded, given = set(), set()
    for name in make_starter.GRADED:
        kept = functions_of(make_starter.student_source(name))
        for text in solution_texts(name):
            for path, node in functions_of(text).items():
                written = path in kept and not unwritten(kept[path])
                (given if written else graded).update(body_lines(node))
    # Shorter ones, such as `returnloss` or `model.eval()`, give nothing away.
    return {line for line in graded - given if len(line) > 24}


# In support/chunked_loss.py, which students train with; the docstring of the graded function states the shift.
GIVEN_ANYWAY = {"labels=input_ids[:,1:].flatten()"}


def test_no_graded_body_is_left_in_any_file(starter):
    lines = graded_lines() - GIVEN_ANYWAY
    assert len(lines) > 80, "the comparison must have something to look for"
    for path in sorted(starter.rglob("*")):
        if path.suffix in (".py", ".md", ".tex", ".yaml", ".txt", ".toml"):
            text = squeezed(path.read_text(encoding="utf-8"))
            left = sorted(line for line in lines if line in text)
            assert not left, f"{path.relative_to(starter)} gives away {left}"


def test_what_is_left_out(starter):
    files = {path.relative_to(starter).as_posix() for path in starter.rglob("*") if path.is_file()}
    expected = {"README.md", "prefixs.json", "requirements.txt", "configs/GPT-tiny.yaml", "data/sample.npz"}
    expected |= {"tests/submit.py", "tests/points.py", "tests/checks.py", "tests/conftest.py"}
    expected |= {"report/template.tex", *(f"tests/mistakes/{name}" for name in make_starter.GRADED)}
    expected |= {f"tests/test_{name}" for name in make_starter.GRADED} | set(make_starter.GRADED)
    assert expected <= files, f"missing: {sorted(expected - files)}"
    for word in (
        "mutants",
        "make_starter",
        "bench",
        "solutions",
        "tokens.npz",
        "model.pt",
        "config.yaml",
        ".pdf",
    ):
        found = [file for file in files if word in file]
        assert not found, f"{word}: must be left out, got {found}"
    answers = [f for f in files if f.startswith(("configs/", "report/", "docs/"))]
    assert sorted(answers) == ["configs/GPT-tiny.yaml", "configs/smoke.yaml", "report/template.tex"]
    for name in make_starter.GRADED:
        dropped = set().union(*make_starter.DROPPED.values())
        tree = ast.parse((starter / name).read_text(encoding="utf-8"))
        names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}
        assert not names & dropped, f"{name}: still uses {names & dropped}"


def test_the_readme_names_only_what_is_there(starter):
    text = (starter / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|data|docs|report|support|tests)/[\w./-]*\w", text))
    named -= {"data/tokens.npz", "configs/mine.yaml", "report/template.pdf"}  # fetched, or made by the student
    assert {"configs/GPT-tiny.yaml", "report/template.tex"} <= named
    missing = [path for path in sorted(named) if not (starter / path).exists()]
    assert not missing, f"README.md of the student's edition names {missing}, which it does not have"
    for line in text.splitlines():
        assert len(line) <= 125 or line.startswith(("|", "    ")), f"a line too long to read in a terminal: {line}"


def test_the_readme_is_the_homework(starter):
    text = (starter / "README.md").read_text(encoding="utf-8")
    questions = re.findall(r"^\*\*(\d\.\d)\*\* \((written|code), (\d+)\)", text, flags=re.MULTILINE)
    in_template = re.findall(
        r"\\question\{([\d.]+)\}\{(\d+) points", (starter / "report/template.tex").read_text()
    )
    written = [(number, n) for number, kind, n in questions if kind == "written" or number == "2.6"]
    assert written == in_template
    coded = {number: int(n) for number, kind, n in questions if kind == "code"}
    for number, n in coded.items():
        assert n == sum(p for (q, _), (p, _) in points.GROUPS.items() if q == number) or number == "2.6"
    sections = [int(n) for n in re.findall(r"^## .*: (\d+) points$", text, flags=re.MULTILINE)]
    by_section = [sum(int(n) for number, _, n in questions if number[0] == str(i)) for i in (1, 2, 3)]
    assert sections == by_section == [35, 85, 40]
    # Each group of points has its command, which runs all of the group's tests.
    commands = re.findall(r'`pytest tests/(test_\w+\.py) -k "?([\w ]+?)"? -q`', text)
    for file in dict(commands):
        tree = ast.parse((starter / "tests" / file).read_text(encoding="utf-8"))
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and "question" in ast.unparse(n)[:40]]
        groups = {}
        for found in classes:
            groups.setdefault(ast.unparse(found.decorator_list[0]), []).append(found.name)
        assert [names.split(" or ") for f, names in commands if f == file] == list(groups.values())


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("homework")
    with pytest.raises(SystemExit) as stop:
        make_starter.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_edit_whose_text_is_gone_is_an_error(monkeypatch):
    monkeypatch.setattr(make_starter, "EDITS", [("model.py", "no such text in it", "")])
    with pytest.raises(ValueError, match=r"model\.py: expected this text once, found it 0 times"):
        make_starter.student_source("model.py")


def test_a_function_that_no_table_names_is_an_error(monkeypatch):
    monkeypatch.setitem(make_starter.DROPPED, "generate.py", make_starter.DROPPED["generate.py"] - {"left_pad"})
    with pytest.raises(ValueError, match="left_pad is in none of GRADED, GIVEN and DROPPED"):
        make_starter.student_source("generate.py")
    monkeypatch.setitem(make_starter.DROPPED, "model.py", {"gone_long_ago"})
    with pytest.raises(ValueError, match="gone_long_ago in DROPPED or GIVEN, but not in the file"):
        make_starter.student_source("model.py")
