"""The table of points: a group gives all or nothing, a skip is neutral, a partial run says so."""

import json
import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.soak  # each starts its own pytest

EMBED = """
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
    plugin = Path(__file__).resolve().parent.parent / "points.py"
    shutil.copy(plugin, pytester.path / "conftest.py")

    def run(*args, body="pass", **files):
        pytester.makepyfile(test_model=EMBED.format(body=body), **files)
        result = pytester.runpytest_subprocess("--points-json", "points.json", *args)
        path = pytester.path / "points.json"
        run.errors = result.stderr.str()
        return result.stdout, json.loads(path.read_text()) if path.exists() else None

    return run


def test_all_points_when_all_tests_pass(run):
    out, points = run()
    out.fnmatch_lines(["1.3 * embed * 2 of 2 * 5 / 5", "total * 5 / 5"])
    assert points["score"] == 5
    assert points["tests"] == [{"name": "1.3 embed", "score": 5, "max_score": 5, "output": "2 of 2 tests passed"}]


def test_no_points_when_one_fails(run):
    out, points = run(body="assert 1 + 1 == 3, 'expected 3, got 2'")
    first_line = "*TestEmbed::test_two: AssertionError: expected 3, got 2"
    out.fnmatch_lines(
        ["FAILED *", "1.3 * embed * 1 of 2 * 0 / 5", first_line, "total * 0 / 5"]
    )  # the points come last
    assert points["tests"][0]["output"].startswith("TestEmbed::test_two: AssertionError: expected 3, got 2")


def test_a_skip_is_neutral(run):
    out, _ = run(body="pytest.skip('no such thing here')")
    out.fnmatch_lines(["1.3 * embed * 1 of 1 * 5 / 5"])


def test_a_deselected_test_leaves_its_group_undecided(run):
    out, points = run("-k", "test_one")
    out.fnmatch_lines(
        ["1.3 * embed * 1 of 1 * – / 5 * partial*", "total * 0 / 0", "partial run: tests were chosen*"]
    )
    assert points["score"] == 0 and points["tests"] == []


def test_a_file_that_does_not_load_costs_only_its_own_groups(run):
    out, points = run(test_train="this is not Python")
    reason = " *test_train.py, line 1: NameError: name 'this' is not defined"
    out.fnmatch_lines(["1.3 * embed * 5 / 5", "2.1 * train * 0 / 4", reason, "total * 5 / 25"])
    assert points["score"] == 5


def test_a_graded_file_that_does_not_load_is_told_once_with_its_line(run):
    files = {name: "import student" for name in ("test_train", "test_generate", "test_classify")}
    out, points = run(student="x = 1\ny = (", **files)
    reason = "student.py, line 2: SyntaxError: '(' was never closed"
    out.fnmatch_lines(["1.3 * embed * 5 / 5", "2.1 * train * 0 / 4", f" *{reason}", "total * 5 / 45"])
    assert out.str().count(reason) == 1 and out.str().count("ERROR collecting") == 1, out.str()
    assert [part["output"] for part in points["tests"]].count(reason) == 9


def test_the_table_counts_the_failures_of_a_group(run):
    body = "assert False, 'the second'\n\n    def test_three(self):\n        assert False, 'the third'"
    out, _ = run(body=body)
    out.fnmatch_lines(["1.3 * embed * 1 of 3 * 0 / 5", " *first of 2 failures: TestEmbed::test_two: *the second*"])


def test_what_is_not_written_yet_takes_one_line_in_the_table_and_no_traceback(run):
    out, points = run(body="raise NotImplementedError('question 1.3: embed is not written yet')")
    out.fnmatch_lines(["1.3 * embed * 1 of 2 * 0 / 5", "          question 1.3: embed is not written yet"])
    out.fnmatch_lines(["*1 passed, 1 not written in *"])
    assert out.str().count("is not written yet") == 1 and "FAILED" not in out.str(), out.str()
    assert points["score"] == 0 and "NotImplementedError: question 1.3" in points["tests"][0]["output"]


TRAIN = """
import pytest

@pytest.mark.question("2.1", "train")
def test_loop():
    {body}
"""


def test_files_run_in_the_order_of_the_questions_and_the_model_comes_first(run):
    out, _ = run(body="assert False", test_train=TRAIN.format(body="assert False"), test_env="def test_e(): pass")
    out.fnmatch_lines(["test_env.py .*", "test_model.py .F*", "test_train.py F*", "a mistake in the model *"])


def test_a_loop_without_end_fails_its_test_only(run, monkeypatch):
    plugin = Path(__file__).resolve().parent.parent / "points.py"
    text = plugin.read_text(encoding="utf-8").replace("PER_TEST = 30", "PER_TEST = 0.2")
    Path("conftest.py").write_text(text, encoding="utf-8")
    assert "PER_TEST = 0.2" in text
    out, points = run(test_train=TRAIN.format(body="while True: pass"))
    out.fnmatch_lines(["*no result after 0.2 s: is there an endless loop?*", "total * 5 / 9"])


def test_an_unknown_group_is_an_error(run):
    run(test_other="import pytest\n@pytest.mark.question('9.9', 'x')\ndef test_x(): pass")
    assert "unknown group of points" in run.errors
