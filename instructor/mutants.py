"""Do the tests tell wrong solutions from right ones?

    python instructor/mutants.py            each wrong solution must fail a test of its part
    python instructor/mutants.py --quick    one wrong solution of each family
    python instructor/mutants.py --right    each right solution must get all points

The solutions are edits of the graded files (wrong_solutions.py, right_solutions.py). Each runs in a process of
its own; a wrong one only against the tests of the part with the mistake, and the first failure is printed as the
student would read it. The exit status is 1 if a wrong solution survives or a right one loses a point.
"""

import argparse
import multiprocessing
import os
import sys
import types
from pathlib import Path

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # only the tests' own plugins, for speed

TESTS = Path(__file__).resolve().parents[1] / "tests"
SOLUTIONS = Path(__file__).resolve().parent / "solutions"
sys.path[:0] = [str(TESTS), str(Path(__file__).resolve().parent)]

import points  # noqa: E402
import pytest  # noqa: E402
import tiktoken  # noqa: E402, F401  (imported before the fork, like wandb and torch: seconds for each solution)
import torch  # noqa: E402
import wandb  # noqa: E402, F401
from right_solutions import RIGHT  # noqa: E402
from wrong_solutions import FAMILIES, MODULE_OF, Mutant  # noqa: E402

MODULES = ("model", "train", "generate", "classify")
TIMEOUT_SECONDS = 600  # for one solution, which takes a few


def source_of(module: str, edits: tuple[tuple[str, str], ...] = (), file: str | None = None) -> str:
    """The text of a graded file, or of a file in solutions/, after the edits.

    Raises ValueError if an old text does not occur exactly once.
    """
    path = SOLUTIONS / file if file else TESTS.parent / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{path.name}: expected this text once, found it {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    return text


class Watch:
    """A pytest plugin that runs the tests of one part (None: all) and keeps the first failure and the points."""

    def __init__(self, part: str | None):
        self.part = part
        self.failure = None
        self.n_tests = 0
        self.rows = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        if self.part is not None:
            items[:] = [item for item in items if self._belongs(item)]
        self.n_tests = len(items)

    def _belongs(self, item) -> bool:
        if marker := item.get_closest_marker("question"):
            return marker.args[1] == self.part
        extras = f"extras of {item.path.stem.removeprefix('test_')}"
        return self.part == ("evaluate" if "TestEvaluate" in item.nodeid else extras)

    def pytest_collectreport(self, report):
        self._keep(report, str(report.longrepr).strip().splitlines()[-1:])

    def pytest_runtest_logreport(self, report):
        crash = getattr(report.longrepr, "reprcrash", None)
        self._keep(report, (crash.message if crash else str(report.longrepr)).splitlines())

    def _keep(self, report, lines):
        if report.failed and self.failure is None:
            self.failure = report.nodeid.split("::", 1)[-1], lines[0] if lines else ""

    def pytest_unconfigure(self, config):
        self.rows = config.pluginmanager.get_plugin("points-tally").rows()


def run_tests(sources: dict[str, str], part: str | None) -> Watch:
    """Run the tests against these modules. Call it in a separate process: the modules stay imported."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name in MODULES:  # in this order: later ones import earlier ones
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(sources[name], f"<{name}.py>", "exec"), module.__dict__)
    watch = Watch(part)
    files = [MODULE_OF[part]] if part else MODULES
    arguments = [str(TESTS / f"test_{name}.py") for name in files]
    if part:
        arguments.append("-x")
    pytest.main([*arguments, "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"], plugins=[watch])
    return watch


def run_mutant(job: tuple[str, Mutant]) -> tuple[str, str, str | None, str]:
    """Family, mistake, the test that caught it (None: it survived), and the first line of the failure."""
    family, mutant = job
    module = MODULE_OF[mutant.part]
    sources = {name: source_of(name) for name in MODULES}
    sources[module] = source_of(module, mutant.edits, mutant.file)
    watch = run_tests(sources, mutant.part)
    caught_by, message = watch.failure or (None, f"all {watch.n_tests} tests of {mutant.part} pass")
    return family, mutant.what, caught_by, message


def run_right(what: str) -> tuple[str, int, str]:
    """Description, points, and the first failure if there is one."""
    changes = RIGHT[what]
    sources = {}
    for name in MODULES:
        change = changes.get(name, ())
        sources[name] = source_of(name, file=change) if isinstance(change, str) else source_of(name, change)
    watch = run_tests(sources, part=None)
    return what, sum(row["points"] or 0 for row in watch.rows), ": ".join(watch.failure or ())


def results_of(function, jobs):
    """Yield function(job) for each job, each in a separate process, as many at once as there are processors."""
    # Forked processes share one import of torch.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(maxtasksperchild=1) as pool:
        results = pool.imap(function, jobs, chunksize=1)
        for job in jobs:
            try:
                yield results.next(timeout=TIMEOUT_SECONDS)
            except multiprocessing.TimeoutError:
                raise SystemExit(f"{job}: no answer in {TIMEOUT_SECONDS} s: the tests must not hang") from None


def main(argv: list[str] | None = None) -> None:
    """Run the wrong or the right solutions and print the outcome of each."""
    parser = argparse.ArgumentParser(description="Do the tests tell wrong solutions from right ones?")
    parser.add_argument("--quick", action="store_true", help="one wrong solution of each family")
    parser.add_argument("--right", action="store_true", help="right solutions, which must get all points")
    parser.add_argument("--family", choices=FAMILIES, help="only the wrong solutions of this family")
    args = parser.parse_args(argv)
    bad = 0
    if args.right:
        full = sum(points for points, _ in points.GROUPS.values())
        for what, got, failure in results_of(run_right, list(RIGHT)):
            print(f"{got:>2} / {full}  {what}" + (f"\n         {failure}" if failure else ""), flush=True)
            bad += got != full  # a test without points may fail: the extras of the interface are optional
        print(f"\n{len(RIGHT) - bad} of {len(RIGHT)} right solutions get all points")
    else:
        families = {args.family: FAMILIES[args.family]} if args.family else FAMILIES
        mutants = [(family, m) for family, of in families.items() for m in (of[:1] if args.quick else of)]
        line = "{:<15} {:<52} {:<60} {}".format
        print(line("family", "mistake", "caught by", "the first line of the failure"))
        for family, what, caught_by, message in results_of(run_mutant, mutants):
            print(line(family, what, caught_by or "SURVIVED", message), flush=True)
            bad += caught_by is None
        print(f"\n{len(mutants) - bad} of {len(mutants)} wrong solutions in {len(families)} families are caught")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
