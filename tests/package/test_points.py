"""The table of points: a group gives all or nothing, a skip is neutral, a broken file costs its own groups."""

import json
import shutil
from pathlib import Path

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.question("1.3", "embed")
def test_passes(): pass

@pytest.mark.question("1.3", "embed")
def test_is_skipped(): pytest.skip("no such thing here")

@pytest.mark.question("1.3", "q_kT_v")
def test_passes_too(): pass

@pytest.mark.question("1.3", "q_kT_v")
def test_fails(): assert 1 == 2, "expected 2, got 1"
"""


def test_table_of_points(pytester):
    shutil.copy(Path(__file__).resolve().parents[1] / "points.py", pytester.path / "conftest.py")
    files = {name: "import student" for name in ("test_train", "test_generate", "test_classify")}
    pytester.makepyfile(test_model=TESTS, student="x = 1\ny = (", **files)
    screen = pytester.runpytest_subprocess("--points-json", "points.json").stdout
    screen.fnmatch_lines(["1.3 * q_kT_v * 1 of 2 * 0 / 5", " *expected 2, got 1 (test_fails)"])
    screen.fnmatch_lines(["1.3 * embed * 1 of 1 * 5 / 5", "2.1 * train * 0 / 4"])
    reason = "student.py, line 2: SyntaxError: '(' was never closed"
    assert screen.str().count(f"\n{' ' * 10}{reason}") == 1, "a broken file is reported once"
    rows = json.loads((pytester.path / "points.json").read_text(encoding="utf-8"))
    assert [row["points"] for row in rows] == [0, 5] + [0] * 9
