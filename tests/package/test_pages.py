"""The pages: the commands printed there are typed, the Python there is run."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny_run import ROOT, TinyRun

# Not typed: installing, what other long tests run, and what needs a PDF or a GPU.
LEFT_OUT = re.compile(r"venv|pip install|^pytest tests/$|mutants\.py|submit|pdflatex|^srun")


def test_python_of_the_page_runs(tmp_path, monkeypatch, quick):
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


@pytest.mark.soak
@pytest.mark.parametrize("page", ["README.md", "instructor/starter_README.md"])
def test_soak_commands_of_a_page_work(page, tmp_path):
    """The lines of code blocks, and the commands in the last column of tables, without their comments."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    )?((?:python|pytest|cp) [^\n]*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"\| `(pytest [^`]*)` \|$", text, flags=re.MULTILINE)
    commands = [line.partition("  #")[0].strip() for line in lines]
    commands = [command for command in commands if not LEFT_OUT.search(command)]
    assert len(commands) >= 3
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        # GPT-tiny takes minutes: a few of its steps show that the command works.
        long = r"(train\.py configs/(GPT-tiny|mine)\.yaml)(?!.*(--dry|--evaluate))"
        quick = re.sub(long, r"\1 --set num_training_steps=12", command)
        done = subprocess.run(["bash", "-c", quick], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
