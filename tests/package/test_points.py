"""The table of points: a group gives all or nothing, a skip is neutral, a broken file costs its own groups."""

import json
import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.question("1.3", "embed")
class TestEmbed:
    def test_one(self):
        pass

    def test_two(self):
        {body}
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("body", "score", "line"),
    [
        ("pass", 5, "1.3 * embed * 2 of 2 * 5 / 5"),
        ("assert 1 == 2, 'expected 2, got 1'", 0, "1.3 * embed * 1 of 2 * 0 / 5"),
        ("pytest.skip('no such thing here')", 5, "1.3 * embed * 1 of 1 * 5 / 5"),
        ("raise NotImplementedError('question 1.3: not written yet')", 0, "1.3 * embed * 1 of 2 * 0 / 5 *"),
    ],
)
def test_table_of_points(pytester, body, score, line):
    shutil.copy(Path(__file__).resolve().parents[1] / "points.py", pytester.path / "conftest.py")
    files = {name: "import student" for name in ("test_train", "test_generate", "test_classify")}
    pytester.makepyfile(test_model=TESTS.format(body=body), student="x = 1\ny = (", **files)
    screen = pytester.runpytest_subprocess("--points-json", "points.json").stdout
    reason = "student.py, line 2: SyntaxError: '(' was never closed"
    screen.fnmatch_lines([line, "2.1 * train * 0 / 4", f" *{reason}"])
    assert screen.str().count(reason) == 1 and ("expected 2, got 1" in screen.str()) == ("expected" in body)
    points = json.loads((pytester.path / "points.json").read_text())
    assert points["score"] == score and points["tests"][0]["max_score"] == 5
