"""report/bench.py prints its tables; the numbers mean nothing here."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "report/bench.py"


@pytest.mark.parametrize("part", ["generate", pytest.param("train", marks=pytest.mark.soak)])
def test_bench_compares_the_command_with_the_plain_code(part):
    done = subprocess.run([sys.executable, BENCH, "--tiny", "--only", part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this package" in done.stdout and "plain" in done.stdout
    assert "failed" not in done.stdout
