"""The tests tell wrong solutions from right ones: see instructor/mutants.py."""

import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).resolve().parents[2] / "instructor/mutants.py"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--quick"], marks=pytest.mark.soak),
        pytest.param([], marks=pytest.mark.soak),
        pytest.param(["--right"], marks=pytest.mark.soak),
    ],
    ids=["one mutant of each family", "all mutants", "right solutions"],
)
def test_mutants(arguments):
    run = subprocess.run([sys.executable, MUTANTS, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
