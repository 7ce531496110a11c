"""Points per question: a pytest plugin for the student's tests.

A test counts for a group when it, or its class, carries `@pytest.mark.question("1.3", "embed")`. A group
gives all its points if all its tests pass, otherwise none; skipped tests are ignored. A test with
`@pytest.mark.advice("1.3", "embed")` gives no points: what it asks for is optional.
`pytest tests/` ends with the table of questions, the first failure of each group that lost its points, and the
advice; `--points-json FILE` also writes the rows of the table.
"""

import json
import re
import shutil
import signal
import textwrap
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("model.py", "train.py", "generate.py", "classify.py")
SHOWN = (ROOT, ROOT / "tests", ROOT / "tests" / "mistakes")  # the folders whose lines a traceback shows

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
NOT_WRITTEN = "not written yet"
CPU_SECONDS_PER_TEST = 30  # for the tests in FILES (the slowest takes about one), against infinite loops


def pytest_addoption(parser):
    parser.addoption("--points-json", metavar="FILE", help="also write the table of points to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "question(number, part): the test counts for this group of points")
    config.addinivalue_line("markers", "advice(number, part): optional, no points")
    config.option.continue_on_collection_errors = True  # a file that fails costs the points of no other
    config.pluginmanager.register(Tally(config), "points-tally")


class Tally:
    """Collects the outcomes of the tests and prints the table at the end."""

    def __init__(self, config):
        self.config = config
        self.group_of = {}  # node id of a test with points -> group
        self.advice_for = {}  # node id of a test without -> question and part
        self.outcomes = {}  # node id -> "passed", "failed" or "skipped"
        self.messages = {}  # node id -> first line of the failure
        self.deselected = set()  # groups with deselected tests
        self.seconds = CPU_SECONDS_PER_TEST
        self.broken = {}  # test file that could not be loaded -> the reason, with file and line

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: FILES.index(item.path.name) if item.path.name in FILES else len(FILES))
        for item in items:
            for name, groups in (("question", self.group_of), ("advice", self.advice_for)):
                if marker := item.get_closest_marker(name):
                    groups[item.nodeid] = marker.args

    def pytest_deselected(self, items):
        self.deselected |= {self.group_of.pop(i.nodeid) for i in items if i.nodeid in self.group_of}

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        try:
            report, error = (yield), None
        except SystemExit as exit_at_import:
            error, reason = exit_at_import, f"the code exits when it is imported: {exit_at_import}"
            report = pytest.CollectReport(collector.nodeid, "failed", reason, [])
        if report.failed and collector.path.name in FILES[1:]:
            reason = report.longrepr = _why_it_does_not_load(error or report.call.excinfo.value)
            if reason in self.broken.values():  # every test file imports model.py: it is enough to say so once
                report.outcome, report.longrepr, report.result = "passed", None, []
            self.broken[collector.path.name] = reason
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.excinfo and item.path.name in FILES:  # PyTorch's and pytest's own lines help no student
            lines = call.excinfo.traceback
            call.excinfo.traceback = lines.filter(lambda line: Path(line.path).parent in SHOWN) or lines
        report = yield
        crash = getattr(report.longrepr, "reprcrash", None)
        report.sections = [section for section in report.sections if "log" not in section[0]]  # W&B's
        if report.failed and crash and not _is_not_written(crash.message):
            crash.message = _first_line(report) + _place_in_the_code(call.excinfo.value)
        return report

    def pytest_report_teststatus(self, report):
        if report.failed and _is_not_written(_first_line(report)):  # no traceback: the table names the function
            return "not written", "-", ("NOT WRITTEN", {"yellow": True})
        if report.failed and report.nodeid in self.advice_for:  # listed under the table
            return "advice", "a", ("ADVICE", {"yellow": True})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if item.path.name not in FILES or not hasattr(signal, "SIGVTALRM"):  # Windows has none
            return (yield)

        def stop(*_, seconds=self.seconds):
            __tracebackhide__ = True
            self.seconds = CPU_SECONDS_PER_TEST / 10  # the next ones may hang, too
            raise AssertionError(f"no result after {seconds:g} s: is there an infinite loop?")

        signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.messages.setdefault(report.nodeid, _first_line(report))
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def failures(self, nodes) -> list[str]:
        """What the failed tests among these say, and their names; or what is not written yet."""
        found = {node.split("::", 1)[1]: self.messages[node] for node in nodes if node in self.messages}
        written = [f"{text} ({test})" for test, text in found.items() if not _is_not_written(text)]
        stubs = [text.partition("NotImplementedError: ")[2] or NOT_WRITTEN for text in found.values()]
        return written or [re.sub(r"^question [\d.]+: ", "", stub) for stub in stubs]

    def rows(self) -> list[dict]:
        """One row per group that was collected or has a broken file; points are None if undecided."""
        rows = []
        for group, (points, file) in GROUPS.items():
            nodes = [node for node, its_group in self.group_of.items() if its_group == group]
            outcomes = [o for o in map(self.outcomes.get, nodes) if o != "skipped"]
            row = {"question": group[0], "part": group[1], "max": points, "points": None, "output": ""}
            row["tests"] = f"{outcomes.count('passed')} of {len(outcomes)}"
            if file in self.broken:
                row |= {"points": 0, "output": self.broken[file]}
            elif not nodes:
                continue
            elif "failed" in outcomes:
                row |= {"points": 0, "output": "\n".join(self.failures(nodes))}
            elif None in outcomes or group in self.deselected or not outcomes:
                row["output"] = "partial: not all tests of this group were run"
            else:
                row["points"] = points
            rows.append(row)
        return rows

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        yield  # to the failures and pytest's own summary, so that the points come last
        rows, write = self.rows(), terminalreporter.write_line
        if not rows or self.config.option.collectonly:
            return
        terminalreporter.section("points")
        columns, indent = max(60, shutil.get_terminal_size().columns), " " * 10
        wrap = textwrap.TextWrapper(columns, initial_indent=indent, subsequent_indent=indent).fill
        wrap_row = textwrap.TextWrapper(columns, subsequent_indent=indent).fill
        line = "{:<10}{:<34}{:>12}{:>10}  {}".format
        write(line("question", "part", "tests passed", "points", "").rstrip())
        said = None
        for row in rows:
            points = f"{'–' if row['points'] is None else row['points']} / {row['max']}"
            failures = row["output"].splitlines() or [""]
            remark = failures[0] if row["points"] is None or _is_not_written(failures[0]) else ""
            write(wrap_row(line(row["question"], row["part"], row["tests"], points, remark).rstrip()))
            if failures[0] not in (remark, said):  # a broken file is reported once
                write(wrap(_first_of(failures)))
                said = failures[0]
        points = f"– / {PERPLEXITY_POINTS}"
        write(line("2.6", "perplexity under 50, by the course", "", points, "").rstrip())
        points = sum(row["points"] or 0 for row in rows)
        possible = sum(row["max"] for row in rows if row["points"] is not None)
        write(line("total", "", "", f"{points} / {possible}", "").rstrip())
        if self.deselected or len(rows) < len(GROUPS):
            write("partial run: some tests were left out; run pytest tests/ for all points")
        lost = [(row["question"], row["part"]) for row in rows if not row["points"]]
        for part in dict.fromkeys(self.advice_for.values()):
            failures = self.failures(node for node, of in self.advice_for.items() if of == part)
            if failures and part not in lost and not _is_not_written(failures[0]):
                write(f"optional, no points: {' '.join(part)}")
                write(wrap(_first_of(failures)))
        if path := self.config.getoption("points_json"):
            Path(path).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _first_of(failures: list[str]) -> str:
    return failures[0] + f", and {len(failures) - 1} more" * (len(failures) > 1)


def _first_line(report) -> str:
    """The first line of a failed test's message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).splitlines()
    return lines[0].removeprefix("AssertionError: ") if lines else "failed"


def _is_not_written(message: str) -> bool:
    """Whether a failure comes from a stub: NotImplementedError, or the ... of the course's starter code."""
    return NOT_WRITTEN in message or "NotImplementedError" in message or "ellipsis" in message.lower()


def _place_in_the_code(error: BaseException) -> str:
    """Where in the four files an error was raised, such as " (model.py, line 12: assert x.dim() == 3)"."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (name := Path(frame.filename.strip("<>")).name) in CODE:
            return f" ({name}, line {frame.lineno}{': ' * bool(frame.line)}{frame.line})"
    return ""


def _why_it_does_not_load(error: BaseException) -> str:
    """Where and why an import failed, such as "model.py, line 12: SyntaxError: '(' was never closed"."""
    while error.__cause__:  # pytest's own errors hide the student's
        error = error.__cause__
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename).name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent in SHOWN]
    place = f"{Path((ours or frames)[-1].filename).name}, line {(ours or frames)[-1].lineno}"
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return f'{place}: runs at import; put it under if __name__ == "__main__":'
    remedy = "; pip install -r requirements.txt" if isinstance(error, ModuleNotFoundError) else ""
    return f"{place}: {type(error).__name__}: {error}".splitlines()[0] + remedy
