"""The table of points: a group gives all or nothing, a skip is neutral, a partial run decides nothing."""

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


@pytest.fixture
def run(pytester):
    """Run pytest on this test file, and others; return the screen and the points' json."""
    shutil.copy(Path(__file__).resolve().parents[1] / "points.py", pytester.path / "conftest.py")

    def run(*arguments, body="pass", **files):
        pytester.makepyfile(test_model=TESTS.format(body=body), **files)
        result = pytester.runpytest_subprocess("--points-json", "points.json", *arguments)
        return result.stdout, json.loads((pytester.path / "points.json").read_text())

    return run


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
def test_a_group_gives_all_or_nothing_and_a_skip_is_neutral(run, body, score, line):
    out, points = run(body=body)
    out.fnmatch_lines([line, f"total * {score} / 5"])
    assert points["score"] == score and points["tests"][0]["max_score"] == 5
    assert ("expected 2, got 1" in out.str()) == ("expected" in body)


def test_a_graded_file_that_does_not_load_costs_only_its_own_groups_and_is_told_once(run):
    files = {name: "import student" for name in ("test_train", "test_generate", "test_classify")}
    out, points = run(student="x = 1\ny = (", **files)
    reason = "student.py, line 2: SyntaxError: '(' was never closed"
    out.fnmatch_lines(["1.3 * embed * 5 / 5", "2.1 * train * 0 / 4", f" *{reason}"])
    assert out.str().count(reason) == 1 and points["score"] == 5
