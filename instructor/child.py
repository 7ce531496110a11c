"""Runs the tests on one hand-in and reports every outcome; grade.py starts it in the hand-in's folder.

The job, one line of JSON on stdin, is read before any code of the hand-in is loaded. A report is a line on the
descriptor `fd`: a code that only who has the key can compute, a running number, and the fields. The key is not
kept, only the hash object made from it, and what the reports need is bound before the hand-in could change it.
"""

import faulthandler
import hashlib
import itertools
import json
import os
import resource
import sys

import pytest

FIELD_CHARACTERS, REPORT_BYTES = 1000, 3500  # short enough for a pipe to take a report in one piece


def limit(memory_bytes: int, file_bytes: int, processes: int | None = None) -> None:
    """Limit this process's memory and the files that it writes, and the processes of its user if given."""
    limits = {"RLIMIT_DATA": memory_bytes, "RLIMIT_FSIZE": file_bytes, "RLIMIT_CORE": 0}
    if processes:
        limits["RLIMIT_NPROC"] = processes
    for name, most in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def report_code(base, body: bytes) -> bytes:
    """The code that authenticates a report; base is blake2b with the key, in C: a hand-in cannot replace it."""
    code = base.copy()
    code.update(body)
    return code.hexdigest().encode()


def reporter(fd: int, key: bytes):
    """report(*fields), which writes one report to fd from this process, but not from a copy that forks off."""
    base, numbers, write, getpid = hashlib.blake2b(key=key), itertools.count(), os.write, os.getpid
    owner, code_of = getpid(), report_code

    def report(*fields) -> None:
        if getpid() == owner:
            texts = [f"{field}"[:FIELD_CHARACTERS].replace("\t", " ") for field in fields]
            body = "\t".join([f"{next(numbers)}", *texts]).replace("\n", " ")
            body = body.encode(errors="replace")[:REPORT_BYTES]
            write(fd, code_of(base, body) + b"\t" + body + b"\n")

    return report


class Reports:
    """A pytest plugin: runs the wanted tests (None: all that give points) and reports what happens."""

    def __init__(self, report, job: dict):
        self.report, self.wanted = report, job["tests"] and set(job["tests"])
        self.loading, self.seconds = job["loading"], job["seconds"]
        self.failed = {}  # node id -> True, False, or missing while its call was not reported

    def pytest_configure(self, config):
        self.config = config

    @property
    def tally(self):
        return self.config.pluginmanager.get_plugin("points-tally")  # of tests/points.py: the first lines

    def pytest_collectstart(self, collector):
        if isinstance(collector, pytest.Module):
            self.report("load", collector.path.name)
            faulthandler.dump_traceback_later(self.loading)  # to stderr: the line where the code hangs

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report):
        if (file := report.nodeid.rpartition("/")[2]) in self.tally.broken:
            self.report("broken", file, self.tally.broken[file])

    def pytest_collection_modifyitems(self, items):
        graded = [item for item in items if item.get_closest_marker("question")]
        items[:] = [item for item in graded if self.wanted is None or item.nodeid in self.wanted]

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.report("test", item.nodeid, *item.get_closest_marker("question").args)

    def pytest_runtest_logstart(self, nodeid):
        self.report("start", nodeid)
        faulthandler.dump_traceback_later(self.seconds)

    def pytest_runtest_logreport(self, report):
        # A test of the package may skip itself; a hand-in's code may not.
        in_tests = report.skipped and os.path.dirname(str(report.longrepr[0])) == os.path.abspath("tests")
        if report.failed or (report.skipped and not in_tests) or hasattr(report, "wasxfail"):
            self.failed[report.nodeid] = True
        elif report.skipped or report.when == "call":
            self.failed.setdefault(report.nodeid, False)

    def pytest_runtest_logfinish(self, nodeid):
        if nodeid in self.failed:
            outcome = "failed" if self.failed[nodeid] else "passed"
            self.report("outcome", nodeid, outcome, self.tally.messages.get(nodeid, "skipped by the hand-in"))


def main() -> None:
    """Fork, so that the hand-in's parent is not the grader, and run the tests in the new process."""
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    job = json.loads(sys.stdin.readline())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit(job["memory"], job["file_bytes"], job["processes"])
    faulthandler.enable()
    plugin = Reports(reporter(job["fd"], bytes.fromhex(job["key"])), job)
    options = ["-q", "-s", "--tb=short", "-c", "pytest.ini", "--rootdir=.", "-p", "no:cacheprovider"]
    options += ["-p", "no:faulthandler", *(["--collect-only"] if job["tests"] is None else [])]
    files = [f"tests/{file}" for file in job["files"]]
    del job
    pytest.main([*options, *files], plugins=[plugin])


if __name__ == "__main__":
    main()
