"""Points per question: a pytest plugin for the student's tests.

A test counts for a group when it, or its class, carries `@pytest.mark.question("1.3", "embed")`. A group
gives all its points if all its tests pass, otherwise none; skipped tests are ignored.
`pytest tests/` ends with the table of questions and the first failure of each group that lost its points;
`--points-json FILE` also writes it in the form of Gradescope's results.json.
"""

import json
import signal
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# (question, part) -> (points, test file); questions and totals are the handout's.
GROUPS = {
    ("1.3", "q_kT_v"): (5, "test_model.py"),
    ("1.3", "self_attention"): (5, "test_model.py"),
    ("1.3", "FeedForward and DecoderBlock"): (5, "test_model.py"),
    ("1.3", "embed"): (5, "test_model.py"),
    ("1.3", "DecoderLM"): (5, "test_model.py"),
    ("2.1", "train"): (4, "test_train.py"),
    ("2.1", "random_batch_sampler"): (4, "test_train.py"),
    ("2.1", "sequential_batch_sampler"): (4, "test_train.py"),
    ("2.1", "cosine_lr_schedule"): (4, "test_train.py"),
    ("2.1", "compute_language_modeling_loss"): (4, "test_train.py"),
    ("3.1", "softmax_with_temperature"): (4, "test_generate.py"),
    ("3.1", "generate"): (6, "test_generate.py"),
    ("3.4", "score"): (6, "test_classify.py"),
    ("3.4", "classify_binary_sentiment"): (4, "test_classify.py"),
}
PERPLEXITY_POINTS = 20  # question 2.6, graded on a test set that students do not have
# In the order of the questions: mistakes in the model are shown before the failures that they cause.
FILES = ["test_env.py", *dict.fromkeys(file for _, file in GROUPS.values())]
NOT_WRITTEN = " is not written yet"  # how the NotImplementedErrors of the student's edition end
CPU_SECONDS_PER_TEST = 30  # for the tests in FILES (the slowest takes about one), against endless loops


def pytest_addoption(parser):
    parser.addoption("--points-json", metavar="FILE", help="also write the points as Gradescope's results.json")


def pytest_configure(config):
    config.addinivalue_line("markers", "question(number, part): the test counts for this group of points")
    # A file that cannot be imported must not cost the points of the others.
    config.option.continue_on_collection_errors = True
    config.pluginmanager.register(Tally(config), "points-tally")


class Tally:
    """Collects the outcome of every graded test and prints the table at the end."""

    def __init__(self, config):
        self.config = config
        self.group_of = {}  # node id -> group
        self.outcomes = {}  # node id -> "passed", "failed" or "skipped"
        self.messages = {}  # node id -> first line of the failure
        self.n_failed_without_points = 0
        self.deselected = set()  # groups with deselected tests
        self.hung = set()  # files with a test that did not end
        self.broken = {}  # test file that could not be loaded -> the reason, with file and line

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: FILES.index(item.path.name) if item.path.name in FILES else len(FILES))
        for item in items:
            if marker := item.get_closest_marker("question"):
                if marker.args not in GROUPS:
                    raise pytest.UsageError(f"{item.nodeid}: unknown group of points {marker.args}")
                self.group_of[item.nodeid] = marker.args

    def pytest_deselected(self, items):
        self.deselected |= {self.group_of.pop(i.nodeid) for i in items if i.nodeid in self.group_of}

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        if report.failed and collector.path.name in {file for _, file in GROUPS.values()}:
            reason = _why_it_does_not_load(report.call.excinfo.value)
            if reason in self.broken.values():  # every test file imports model.py: one traceback is enough
                report.outcome, report.longrepr, report.result = "passed", None, []
            self.broken[collector.path.name] = reason
        return report

    def pytest_report_teststatus(self, report):
        if report.failed and NOT_WRITTEN in _first_line(report):  # no traceback: the table names the function
            return "not written", "-", ("NOT WRITTEN", {"yellow": True})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        file = item.path.name
        if file not in FILES or not hasattr(signal, "SIGVTALRM"):  # Windows has none
            return (yield)
        # After a test that did not end, the other tests of its file get less time.
        seconds = CPU_SECONDS_PER_TEST / (10 if file in self.hung else 1)

        def stop(*_):
            self.hung.add(file)
            raise AssertionError(f"no result after {seconds:g} s: is there an endless loop?")

        before = signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)

    def pytest_runtest_logreport(self, report):
        if report.nodeid not in self.group_of or hasattr(report, "wasxfail"):
            self.n_failed_without_points += report.failed
            return
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.messages.setdefault(report.nodeid, _first_line(report))
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def rows(self) -> list[dict]:
        """One row per group that was collected or has a broken file; points are None if undecided."""
        rows = []
        for group, (points, file) in GROUPS.items():
            nodes = [node for node, its_group in self.group_of.items() if its_group == group]
            row = {"question": group[0], "part": group[1], "max": points, "points": None, "output": ""}
            outcomes = [self.outcomes.get(node) for node in nodes]
            ran = [outcome for outcome in outcomes if outcome in ("passed", "failed")]
            row["tests"] = f"{ran.count('passed')} of {len(ran)}"
            if file in self.broken:
                row |= {"tests": "0 of 0", "points": 0, "output": self.broken[file]}
            elif not nodes:
                continue
            elif "failed" in ran:
                failed = [f"{n.split('::', 1)[1]}: {self.messages[n]}" for n in nodes if n in self.messages]
                failed.sort(key=lambda message: NOT_WRITTEN in message)  # what can be fixed comes first
                row |= {"points": 0, "output": "\n".join(failed)}
            elif None in outcomes or group in self.deselected:
                row["output"] = "partial: not all tests of this group were run"
            elif not ran:
                row["output"] = "skipped"
            else:
                row["points"] = points
            rows.append(row)
        return rows

    def notes(self, rows) -> list[str]:
        notes = []
        lost = [row["question"] for row in rows if row["points"] == 0]
        if "1.3" in lost and lost[-1] != "1.3":
            notes.append("a mistake in the model (1.3) can fail the tests of 2 and 3, too: fix the model first")
        if left_out := len(GROUPS) - len(rows):
            notes.append(f"partial run: {left_out} of the {len(GROUPS)} groups of points were not run")
        if (
            self.deselected
            or any("::" in str(arg) for arg in self.config.args)
            or self.config.getoption("lf", False)
        ):
            notes.append("partial run: tests were chosen by name or mark; run all of them for the final points")
        return notes

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        yield  # to the failures and pytest's own summary, so that the points come last
        rows = self.rows()
        if not rows or self.config.option.collectonly:
            return
        terminalreporter.section("points")
        line = "{:<10}{:<34}{:>12}{:>10}  {}".format
        terminalreporter.write_line(line("question", "part", "tests passed", "points", "").rstrip())
        shown = None
        for row in rows:
            points = f"{'–' if row['points'] is None else row['points']} / {row['max']}"
            remark = row["output"] if row["points"] is None else ""
            terminalreporter.write_line(line(row["question"], row["part"], row["tests"], points, remark).rstrip())
            if row["points"] == 0 and row["output"] != shown:  # a file that does not load is reported once
                shown = row["output"]
                terminalreporter.write_line(f"          {_summary(shown)}")
        if any(row["question"] == "2.1" for row in rows):
            points, remark = f"– / {PERPLEXITY_POINTS}", "graded on the test data of the course"
            terminalreporter.write_line(line("2.6", "perplexity of model.pt under 50", "", points, remark))
        total, possible = _total(rows)
        terminalreporter.write_line(line("total", "", "", f"{total} / {possible}", "").rstrip())
        notes = self.notes(rows)
        if self.n_failed_without_points:
            notes.append(f"{self.n_failed_without_points} failures cost no points: what they test is optional")
        for note in notes:
            terminalreporter.write_line(note)
        if path := self.config.getoption("points_json"):
            Path(path).write_text(json.dumps(self.results(rows), indent=2) + "\n", encoding="utf-8")
            terminalreporter.write_line(f"points written to {path}")

    def results(self, rows) -> dict:
        """The table in the form of Gradescope's results.json; groups without a decision are left out."""
        tests = [
            {
                "name": f"{row['question']} {row['part']}",
                "score": row["points"],
                "max_score": row["max"],
                "output": row["output"] or f"{row['tests']} tests passed",
            }
            for row in rows
            if row["points"] is not None
        ]
        undecided = [f"{r['question']} {r['part']}: {r['output']}" for r in rows if r["points"] is None]
        output = "\n".join(self.notes(rows) + undecided + ["2.6 is graded on the course's test data"])
        return {"score": _total(rows)[0], "output": output, "tests": tests}


def _first_line(report) -> str:
    """The first line of a failed test's message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return ((crash.message if crash else str(report.longrepr)).splitlines() or ["failed"])[0]


def _summary(output: str) -> str:
    """One line for the failures of a group, one on each line of `output`."""
    first, *others = output.splitlines()
    if NOT_WRITTEN in first:
        return first.partition("NotImplementedError: ")[2]
    return f"first of {len(others) + 1} failures: {first}" if others else first


def _why_it_does_not_load(error: BaseException) -> str:
    """Where and why an import failed, such as "model.py, line 12: SyntaxError: '(' was never closed"."""
    while error.__cause__:  # pytest's own errors hide the student's
        error = error.__cause__
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename).name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [place for place in places if place[0].parent in (ROOT, ROOT / "tests")]
    file, line = (ours or places)[-1]
    return f"{file.name}, line {line}: {type(error).__name__}: {error}".splitlines()[0]


def _total(rows) -> tuple[int, int]:
    decided = [row for row in rows if row["points"] is not None]
    return sum(row["points"] for row in decided), sum(row["max"] for row in decided)
