"""Do the tests catch wrong solutions and accept right ones?

    python instructor/mutants.py                 each wrong solution must fail a test of its part
    python instructor/mutants.py --right         each right solution must get all points
    python instructor/mutants.py --only padding  those with this word in their part or description

The solutions are edits of the graded files (wrong_solutions.py, right_solutions.py). Each runs in a process of
its own, and its first failure is printed as the student would read it. The exit status is 1 if a wrong solution
survives or a right one loses a point.
"""

import argparse
import ast
import multiprocessing
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "instructor")]

import points  # noqa: E402
import pytest  # noqa: E402
import tiktoken  # noqa: E402, F401  (imported before the fork, like wandb and torch: seconds for each solution)
import torch  # noqa: E402
import wandb  # noqa: E402, F401
from right_solutions import RIGHT  # noqa: E402
from wrong_solutions import MODULE_OF, WRONG, Mutant  # noqa: E402

MODULES = ("model", "train", "generate", "classify")
TIMEOUT_SECONDS = 600  # for one solution, which takes a few


def apply_edits(module: str, edits=()) -> str:
    """The text of a graded file after the edits. ValueError if an old text does not occur exactly once."""
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    for old, new in edits:
        if (name := old.removeprefix("def ")).isidentifier():  # the whole function
            (node,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == name)
            old = ast.get_source_segment(text, node)
        if text.count(old) != 1:
            raise ValueError(f"{module}.py: expected this text once, found it {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    return text


def wrong_sources(mutant: Mutant) -> dict[str, str]:
    """The four files with a mistake."""
    return {name: apply_edits(name, mutant.edits if name == MODULE_OF[mutant.part] else ()) for name in MODULES}


def right_sources(what: str) -> dict[str, str]:
    """The four files of a right solution."""
    return {name: apply_edits(name, RIGHT[what].get(name, ())) for name in MODULES}


class OnlyPart:
    """A pytest plugin that runs the tests of one part (None: all) and keeps the tally of points.py."""

    def __init__(self, part: str | None):
        self.part, self.tally = part, None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.part is None or self.has(item)]

    def has(self, item) -> bool:
        marker = item.get_closest_marker("question")
        if self.part == "evaluate":
            return "TestEvaluate" in item.nodeid
        return not marker if self.part.startswith("advice of ") else bool(marker) and marker.args[1] == self.part

    def pytest_unconfigure(self, config):
        self.tally = config.pluginmanager.get_plugin("points-tally")


def first_failure(job: tuple[dict[str, str], str | None]) -> str:
    """Of these modules, in the tests of a part, or (None) the first lost group. Call it in a separate process."""
    sources, part = job
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name in MODULES:  # in this order: later ones import earlier ones
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(sources[name], f"<{name}.py>", "exec"), module.__dict__)
    plugin = OnlyPart(part)
    files = [str(ROOT / f"tests/test_{name}.py") for name in ([MODULE_OF[part]] if part else MODULES)]
    pytest.main([*files, *["-x"] * bool(part), "-p", "no:cacheprovider", f"--rootdir={ROOT}"], plugins=[plugin])
    if part:
        failures = [f"{node.partition('::')[2]}: {text}" for node, text in plugin.tally.messages.items()]
    else:
        rows = {row["part"]: row for row in plugin.tally.rows()}
        failures = [f"{part}: {rows[part]['output']}" for _, part in points.GROUPS if not rows[part]["points"]]
    return failures[0].splitlines()[0] if failures else ""


def main(argv: list[str] | None = None) -> None:
    """Run the wrong or the right solutions and print the outcome of each."""
    parser = argparse.ArgumentParser(description="Do the tests catch wrong solutions and accept right ones?")
    parser.add_argument("--right", action="store_true", help="right solutions, which must get all points")
    parser.add_argument("--only", default="", metavar="WORD", help="with this word in part or description")
    args = parser.parse_args(argv)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # only the tests' own plugins, for speed
    if args.right:
        jobs = {what: (right_sources(what), None) for what in RIGHT}
    else:
        jobs = {f"{m.part}: {m.what}": (wrong_sources(m), m.part) for m in WRONG}
    jobs = {what: job for what, job in jobs.items() if args.only in what}
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # forked, they share torch
    bad = 0
    with multiprocessing.get_context(method).Pool(maxtasksperchild=1) as pool:
        results = pool.imap(first_failure, jobs.values(), chunksize=1)
        for what in jobs:
            failure = results.next(timeout=TIMEOUT_SECONDS)
            good = bool(failure) != args.right
            bad += not good
            print(f"{'' if good else 'BAD: '}{what}" + (f"\n        {failure}" if failure else ""), flush=True)
    outcome = "right solutions get all points" if args.right else "wrong solutions are caught"
    print(f"\n{len(jobs) - bad} of {len(jobs)} {outcome}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
