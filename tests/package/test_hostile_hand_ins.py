"""Grading hand-ins that cheat, hang or break: none gets a point that it did not earn, and none stops the others.

All are graded in one run, against tests of one line for each group of points, so that a hand-in takes a second.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import points
import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).resolve().parents[2]
CODE = ("model.py", "train.py", "generate.py", "classify.py")
SECONDS, SECONDS_LOADING = 5, 8  # with room for a machine that is busy
HELPERS = """
def check_equal(actual, expected, what):
    assert actual == expected, f"{what}: expected {expected}, got {actual}"
check_close = check_equal
def check_shape(actual, expected, what):
    check_equal(getattr(actual, "shape", None), expected, what)
"""
CONFTEST = """
import sys
from pathlib import Path
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
pytest_plugins = ["points"]
"""
MODULES = "import os, sys, time\nmodules = vars(sys)['modules']\n"  # past the check of imports and calls
SWALLOW = (
    "while True:\n        try:\n            time.sleep(1)\n        except BaseException:\n            continue"
)


def function_of(part: str) -> str:
    return part.replace(" ", "_")


def solution(name: str, right: bool = True, **bodies: str) -> str:
    """A graded file with a function for each group of points; bodies replace those of some functions."""
    lines = ["import os, sys, time\n" if name == "model.py" else "import os, sys, time\nimport model\n"]
    for (_, part), (_, file) in points.GROUPS.items():
        if file == f"test_{name}":
            body = bodies.get(function_of(part), f"return {part!r}" if right else "return None")
            lines.append(f"def {function_of(part)}():\n    {body}\n")
    return "\n".join(lines)


def hand_in(right: bool = True, top: str = "", **files: str | None) -> dict[str, str]:
    """The files of a zip: right or wrong ones, `top` in front of model.py, others replaced or (None) left out."""
    texts = {name: solution(name, right) for name in CODE}
    texts |= {"model.py": top + texts["model.py"], "answers.pdf": "%PDF-"}
    texts |= {f"{name}.py": text for name, text in files.items()}
    return {name: text for name, text in texts.items() if text is not None}


def cheat(top: str) -> dict[str, str]:
    """A wrong hand-in that does something at import to get points."""
    return hand_in(right=False, top=MODULES + top)


def sick(**bodies: str) -> dict[str, str]:
    """A right hand-in but for the bodies of some functions of model.py."""
    return hand_in(model=MODULES + solution("model.py", **bodies))


def in_folder(files: dict, folder: str) -> dict:
    return {f"{folder}/{name}": text for name, text in files.items()}


TAMPERED = "tests that must fail did not"
READ_SOLUTION = """
from pathlib import Path
here = Path(__file__).resolve()
roots = [*here.parents, *map(Path, sys.path), *(Path(v) for v in os.environ.values() if v.startswith("/"))]
for path in [root / "model.py" for root in roots]:
    if path.exists() and path != here:
        getattr(modules["builtins"], "exec")(path.read_text())
"""
FORGE = """
for fd in range(3, 30):
    for code in (b"", b"0" * 128):
        try:
            os.write(fd, code + b"\\t0\\toutcome\\ttests/test_model.py::test_embed\\tpassed\\t\\n" * 3)
        except OSError:
            continue
"""
NAP = f"{100_000 + os.getpid()}"  # seconds; known again in the list of processes
DAEMON = f"""
if getattr(os, "fork")() == 0:
    getattr(os, "set" + "sid")()
    if getattr(os, "fork")() == 0:
        os.execv("/bin/sleep", ["sleep", "{NAP}"])
    getattr(os, "_" + "exit")(0)
time.sleep(0.5)
"""
AT_EXIT = """
def rewrite():
    open(os.environ["HOME"] + "/results.json", "w").write('{"score": 65}')
modules["atexit"].register(rewrite)
"""
RESULTS = "open(os.environ['HOME'] + '/results.json', 'w').write('{\"score\": 65}')\n"
FREE = {
    name: "def pytest_runtest_call(item): item.obj = lambda: None" for name in ("conftest.py", "sitecustomize.py")
}
FREE |= {"pytest.ini": "[pytest]\naddopts = --collect-only", "tests/test_model.py": "def test(): pass"}

# name: (files, points, what the page says)
CASES = {
    "right": (hand_in(), 65, None),
    "in_a_folder": (in_folder(hand_in(), "ada"), 65, None),
    "wrong": (hand_in(right=False), 0, "test_embed: AssertionError: embed: expected embed, got None"),
    # what costs points without running
    "syntax_error": (hand_in(model="import os\ndef f(:\n"), 0, "model.py, line 2, is not valid Python"),
    "no_classify": (hand_in(classify=None), 55, "classify.py is missing"),
    "imports_pytest": (hand_in(generate="import pytest\n"), 55, "generate.py, line 1, imports 'pytest'"),
    "calls_exit": (hand_in(top="import os\nos._exit(0)\n"), 0, "model.py, line 2, uses os._exit"),
    "ready_made": (hand_in(top="use = lambda nn: nn.TransformerEncoder\n"), 40, "uses TransformerEncoder"),
    # cheats
    "writes_results": (cheat(RESULTS + "getattr(os, '_ex' + 'it')(0)\n"), 0, "the process ended: exit status 0"),
    "at_exit": (cheat(AT_EXIT), 0, "got None"),
    "changes_tally": (cheat("modules['points'].Tally.rows = lambda self: 1 / 0\n"), 0, "got None"),
    "no_runtest": (cheat("modules['_pytest.python'].Function.runtest = lambda self: None\n"), 0, TAMPERED),
    "no_check": (cheat("modules['checks'].check_equal = lambda *a, **k: None\n"), 0, TAMPERED),
    "skips": (
        hand_in(model=MODULES + solution("model.py", embed="modules['pytest'].skip('no')")),
        60,
        "skipped by the hand-in",
    ),
    "reads_solution": (cheat(READ_SOLUTION), 0, "got None"),
    "forges_reports": (cheat(FORGE), 0, "got None"),
    "own_pytest_files": (
        hand_in(right=False) | FREE,
        0,
        "ignored in the zip: conftest.py, sitecustomize.py, pytest.ini",
    ),
    # what hangs or breaks
    "hangs_at_import": (hand_in(train="while True: pass\n"), 45, "train.py, line 1: no answer in"),
    "sleeps": (sick(embed="time.sleep(100000)"), 60, "line 15: no answer in"),
    "swallows_exceptions": (sick(embed=SWALLOW), 60, "no answer in"),
    "exits_in_a_function": (
        sick(embed="getattr(os, '_ex' + 'it')(0)"),
        60,
        "test_embed: the process ended: exit status 0",
    ),
    "stops_at_import": (hand_in(generate="import sys\nsys.exit()\n"), 55, "the process ended"),
    "thread": (
        hand_in(top=MODULES + "modules['threading'].Thread(target=time.sleep, args=(1e5,)).start()\n"),
        65,
        None,
    ),
    "daemon": (hand_in(top=MODULES + DAEMON), 65, None),
    "forks": (hand_in(top=MODULES + "getattr(os, 'fork')()\n"), 65, None),
    "memory": (sick(embed="return len(bytearray(64 << 30))"), 60, "MemoryError"),
    "output": (sick(embed="while True:\n        os.write(2, b'x' * 65536)"), 60, "no answer in"),
    "kills_parent": (
        cheat("getattr(os, 'ki' + 'll')(getattr(os, 'getp' + 'pid')(), 9)\n"),
        0,
        None,
    ),
    # not a proper zip file
    "outside": (hand_in() | {"../outside.py": ""}, 0, "a path outside its folder"),
    "bomb": (hand_in(generate="#" * (100 << 20)), 55, "generate.py has more than 1 MiB"),
    "no_zip": (None, 0, "File is not a zip file"),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Details by name, the page, and the folder; the grading command runs twice."""
    folder = tmp_path_factory.mktemp("class")
    fake, zips = folder / "package", folder / "hand_ins"
    (fake / "tests").mkdir(parents=True)
    zips.mkdir()
    tests = {"conftest.py": CONFTEST, "checks.py": HELPERS, "points.py": (ROOT / "tests/points.py").read_text()}
    for name in CODE:
        (fake / name).write_text(solution(name))
        tests[f"test_{name}"] = f"import pytest\nfrom checks import check_equal\nimport {name[:-3]} as m\n"
    for (question, part), (_, file) in points.GROUPS.items():
        function = function_of(part)
        tests[file] += f"@pytest.mark.question({question!r}, {part!r})\ndef test_{function}():\n"
        tests[file] += f"    check_equal(m.{function}(), {part!r}, {part!r})\n"
    for name, text in tests.items():
        (fake / "tests" / name).write_text(text)
    for name, (files, _, _) in CASES.items():
        if files is None:
            (zips / f"{name}.zip").write_bytes(b"PK, but no zip file")
            continue
        with zipfile.ZipFile(zips / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in files.items():
                archive.writestr(file, text)
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "instructor")!r})
import grade
grade.ROOT, grade.SECONDS, grade.SECONDS_LOADING = Path({str(fake)!r}), {SECONDS}, {SECONDS_LOADING}
grade.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(zips), "--out", str(folder / "grades"), "--jobs", "3"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    return folder, command


def sections(folder: Path) -> dict[str, str]:
    """{hand-in: "points of 65" and the reasons} of the page."""
    parts = (folder / "grades" / "grades.md").read_text().split("\n## ")
    return {part.partition(":")[0]: part.partition(":")[2] for part in parts[1:]}


@pytest.mark.parametrize("name", CASES)
def test_points_and_reasons(graded, name):
    folder, _ = graded
    _, expected, reason = CASES[name]
    details = json.loads((folder / "grades" / "details" / f"{name}.json").read_text())
    got = {row["part"]: row["points"] for row in details["rows"]}
    section = sections(folder).get(name, "")
    assert len(got) == len(points.GROUPS) and sum(got.values()) == expected, section
    if reason:
        assert reason in section, section
        assert ".py, line" not in reason or section.count(reason) == 1, f"reported more than once: {section}"


def test_the_table_has_all_hand_ins(graded):
    folder, _ = graded
    table = (folder / "grades" / "grades.csv").read_text()
    assert all(f"\n{name}," in table for name in CASES)
    assert f"\nright,65,65,{','.join(str(of) for of, _ in points.GROUPS.values())},," in table


def test_nothing_is_left_behind(graded):
    folder, _ = graded
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != "self"]
    assert not [command for command in commands if NAP.encode() in command.split(b"\0")], "a process still runs"
    assert not list(folder.rglob("outside.py"))


def test_run_again_it_grades_what_is_new(graded):
    folder, command = graded
    details = {path: path.stat().st_mtime_ns for path in (folder / "grades" / "details").iterdir()}
    with zipfile.ZipFile(folder / "hand_ins" / "wrong.zip", "w") as archive:
        for name in CODE:
            archive.writestr(name, solution(name))
        archive.writestr("ada.pdf", "%PDF-")
    subprocess.run(command, check=True, capture_output=True)
    changed = [path.stem for path, time in details.items() if path.stat().st_mtime_ns != time]
    assert changed == ["wrong"]
    assert "wrong" not in sections(folder), "all points now, so no reasons"
