"""The commands of the README and of the student's and the instructor's pages, typed as they are printed there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from submit import CODE

import train

ROOT = Path(train.__file__).parent
PAGES = {
    "README": ROOT / "README.md",
    "the student's page": ROOT / "instructor/starter_README.md",
    "the instructor's page": ROOT / "docs/grading.md",
}
# Not typed: installing, what other long tests run (all tests, the mutants), and what needs a PDF or a GPU.
LEFT_OUT = re.compile(r"venv|pip install|^pytest tests/$|mutants\.py|tests/submit|pdflatex|^[!%#.]|^srun")


def commands(page: Path) -> list[str]:
    """The lines of code blocks, and the commands in the last column of tables, without their comments."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    )?((?:python|pytest|cp) [^\n]*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"\| `(pytest [^`]*)` \|$", text, flags=re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in lines if not LEFT_OUT.search(line)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_commands(page):
    assert len(commands(PAGES[page])) >= (4 if page == "the instructor's page" else 5)


@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_work(page, tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "my_texts.jsonl").write_text('{"text": "A text about a city and its people."}\n' * 200)
    (tmp_path / "HAND_INS").mkdir()
    with zipfile.ZipFile(tmp_path / "HAND_INS/student.zip", "w") as archive:
        for name in CODE:
            archive.write(ROOT / name, name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    for command in commands(PAGES[page]):
        # GPT-tiny takes minutes: a few of its steps show that the command works.
        quick = re.sub(r"(train\.py configs/(GPT-tiny|mine)\.yaml)$", r"\1 --set num_training_steps=12", command)
        done = subprocess.run(["bash", "-c", quick], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if page == "the instructor's page":
        assert "student" in (tmp_path / "grades/grades.csv").read_text()
