"""The pages: the commands printed there are typed, the Python there is run."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_run import ROOT, TinyRun

PAGES = {name: ROOT / name for name in ("README.md", "instructor/starter_README.md", "docs/grading.md")}
# Not typed: installing, what other long tests run, and what needs a container, a PDF or a GPU.
LEFT_OUT = re.compile(r"venv|pip install|^pytest tests/$|mutants\.py|submit|pdflatex|docker|podman|^[!%#.]|^srun")


def test_python_of_the_page_runs(tmp_path, monkeypatch, capsys, quick):
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    use, compare = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(use, names)
    assert len(names["texts"]) == 2 and all(names["texts"]) and set(names["labels"]) <= {0, 1}
    pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    tiny = TinyRun(tmp_path)
    assert tiny.main() == 0
    for run in re.findall(r'"(outputs/\S+?)"', compare):
        shutil.copytree(tiny.out, tmp_path / run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    exec(compare, {})


def commands(page: Path) -> list[str]:
    """The lines of code blocks, and the commands in the last column of tables, without their comments."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    )?((?:python|pytest|cp) [^\n]*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"\| `(pytest [^`]*)` \|$", text, flags=re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in lines if not LEFT_OUT.search(line)]


@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES)
def test_soak_commands_of_a_page_work(page, tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "my_texts.jsonl").write_text('{"text": "A text about a city and its people."}\n' * 200)
    (tmp_path / "HAND_INS").mkdir()
    with zipfile.ZipFile(tmp_path / "HAND_INS/student.zip", "w") as archive:
        for name in ("model.py", "train.py", "generate.py", "classify.py"):
            archive.write(ROOT / name, name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert len(commands(PAGES[page])) >= 3
    for command in commands(PAGES[page]):
        # GPT-tiny takes minutes: a few of its steps show that the command works.
        quick = re.sub(r"(train\.py configs/(GPT-tiny|mine)\.yaml)$", r"\1 --set num_training_steps=12", command)
        done = subprocess.run(["bash", "-c", quick], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
