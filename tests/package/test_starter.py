"""The student's edition as it is handed out, with the package's solution, and with other right solutions."""

import ast
import json
import re
from pathlib import Path

import make_starter
import mutants
import points
import pytest
import right_solutions
from tiny_run import python, status

ROOT = make_starter.ROOT


@pytest.fixture
def starter(tmp_path):
    make_starter.main([str(tmp_path / "starter")])
    return tmp_path / "starter"


def graded(folder: Path) -> tuple[list[dict], str]:
    """The rows of the table of points of the folder's tests, and what was printed."""
    options = "-q", "-p", "no:cacheprovider", "--points-json", "points.json"
    result = python("-m", "pytest", *options, "tests", cwd=folder)
    assert (folder / "points.json").exists(), result.stdout + result.stderr
    return json.loads((folder / "points.json").read_text(encoding="utf-8")), result.stdout


@pytest.mark.soak
def test_handed_out_it_imports_and_scores_nothing_with_clear_failures(starter):
    imported = python("-c", "import model, train, generate, classify", cwd=starter)
    assert imported.returncode == 0, imported.stderr
    command = python("train.py", "configs/smoke.yaml", cwd=starter)
    assert command.returncode == 2 and "DecoderLM.__init__ is not written yet" in command.stderr
    assert len(command.stderr.splitlines()) == 1
    rows, printed = graded(starter)
    assert [row["points"] for row in rows] == [0] * len(points.GROUPS), "every part must be decided"
    for part in rows:
        assert "is not written yet" in part["output"], part  # its own, or the model's that it needs
    assert "Traceback" not in printed and len(printed.splitlines()) < 60, printed


OWN_MODELS = {
    "the package's own": [],
    "post-LN, untied output, sinusoidal positions": [
        *right_solutions.POST_LN,
        ("self._init_weights()\n", "self.head = nn.Linear(n_embd, n_vocab)\n"),
        ("F.linear(x, self.token_embeddings.weight)", "self.head(x)"),
        ("position_embeddings = nn.Embedding(n_positions, n_embd)", "frequencies = 10.0 ** -torch.arange(n_embd)"),
        ("self.position_embeddings(position_ids)", "torch.sin(position_ids[..., None] * self.frequencies)"),
    ],
}


@pytest.mark.soak
@pytest.mark.parametrize("model", OWN_MODELS)
def test_the_commands_work_with_a_students_own_model(starter, model):
    for name, text in mutants.right_sources("generate and score with the handout's arguments only").items():
        (starter / f"{name}.py").write_text(text)
    (starter / "model.py").write_text(mutants.apply_edits("model", OWN_MODELS[model]))
    settings = ("num_training_steps=3", "num_warmup_steps=1", "batch_size=2", "seq_len=8", "data=tiny.npz")
    settings += ("model_config.n_embd=4",)
    make_tokens = "import numpy as np; t = np.arange(90, dtype=np.uint16); np.savez('tiny', train=t, val=t)"
    for command in (
        ("-c", make_tokens),
        ("train.py", "configs/smoke.yaml", "--set", *settings),
        ("generate.py", "--max_new_tokens", "3", "--temperature", "0.7"),
        ("classify.py", "--limit", "5", "--data", "data/reviews.jsonl"),
    ):
        result = python(*command, cwd=starter)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    written = {path.name for path in (starter / "outputs" / "smoke").iterdir()}
    assert {"model.pt", "config.yaml", "eval.json", "generation.jsonl", "classification.json"} <= written
    if model == "the package's own":
        assert all(row["points"] == row["max"] for row in graded(starter)[0])


def body_lines(node: ast.FunctionDef) -> set[str]:
    """The statements of a function, a line each, without docstring, comments and spaces."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return {re.sub(r"\s", "", line) for line in "\n".join(map(ast.unparse, body)).splitlines()}


def test_no_graded_body_is_left_in_any_file(starter):
    lines, given = set(), set()
    for name in make_starter.GRADED:
        kept = dict(map(reversed, make_starter.definitions(ast.parse((starter / name).read_text()))))
        for node, path in make_starter.definitions(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":  # its docstring has this
                written = path in kept and "NotImplementedError" not in ast.unparse(kept[path])
                (given if written else lines).update(body_lines(node))
    # Shorter ones give nothing away; the shift of the labels is in support, too.
    lines = {line for line in lines - given if len(line) > 24} - {"labels=input_ids[:,1:].flatten()"}
    assert len(lines) > 60, "the comparison must have something to look for"
    for path in sorted(starter.rglob("*")):
        if path.suffix in (".py", ".md", ".tex", ".yaml", ".txt", ".toml"):
            text = re.sub(r"\s", "", path.read_text(encoding="utf-8"))
            left = sorted(line for line in lines if line in text)
            assert not left, f"{path.relative_to(starter)} gives away {left}"


def test_what_is_left_out(starter):
    files = {path.relative_to(starter).as_posix() for path in starter.rglob("*") if path.is_file()}
    expected = {"README.md", "prefixs.json", "requirements.txt", "configs/GPT-tiny.yaml", "data/sample.npz"}
    expected |= {"tests/submit.py", "tests/points.py", "tests/checks.py", "report/template.tex", "data/prepare.py"}
    expected |= {f"tests/test_{name}" for name in make_starter.GRADED} | set(make_starter.GRADED)
    assert expected <= files, f"missing: {sorted(expected - files)}"
    for word in ("instructor/", "tests/package/", "tokens.npz", "model.pt", "config.yaml", ".pdf"):
        assert not [file for file in files if word in file], f"{word}: must be left out"
    answers = sorted(f for f in files if f.startswith(("configs/", "docs/", "report/")))
    given = ["configs/GPT-tiny.yaml", "configs/smoke.yaml", "docs/assignment.md", "report/template.tex"]
    assert answers == given


def test_the_readme_is_the_homework(starter):
    readme, text = ((starter / name).read_text() for name in ("README.md", "docs/assignment.md"))
    named = set(re.findall(r"\b(?:configs|data|docs|report|support|tests)/[\w./-]*\w", readme + text))
    named -= {"data/tokens.npz", "configs/mine.yaml", "report/template.pdf"}  # fetched, or made by the student
    assert not [path for path in sorted(named) if not (starter / path).exists()]
    questions = re.findall(r"^- \*\*(\d\.\d)\*\* \((written|code), (\d+)\)", text, flags=re.MULTILINE)
    template = (starter / "report/template.tex").read_text()
    in_template = re.findall(r"\\question\{([\d.]+)\}\{(\d+) points", template)
    assert [(number, n) for number, kind, n in questions if kind == "written" or number == "2.6"] == in_template
    for number, n in [(number, int(n)) for number, kind, n in questions if kind == "code"]:
        assert n == sum(most for (q, _), (most, _) in points.GROUPS.items() if q == number) or number == "2.6"
    sections = [int(n) for n in re.findall(r"^## .*: (\d+) points$", text, flags=re.MULTILINE)]
    by_section = [sum(int(n) for number, _, n in questions if number[0] == str(i)) for i in (1, 2, 3)]
    assert sections == by_section == [35, 85, 40]


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("homework")
    assert status(make_starter, tmp_path) == 2 and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_function_that_the_tables_do_not_know_is_an_error(monkeypatch):
    monkeypatch.setattr(make_starter, "GIVEN", make_starter.GIVEN - {"keep_likely"})
    with pytest.raises(ValueError, match="keep_likely"):
        make_starter.student_source("generate.py")
