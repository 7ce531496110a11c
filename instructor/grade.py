"""Grade a folder of hand-ins.

    python instructor/grade.py HAND_INS --out grades --test-tokens test.npz

HAND_INS has a .zip for each, as `python tests/submit.py` packs them. Writes grades/grades.csv, grades/grades.md
and a file for each hand-in. Run again, it grades those that are new or changed, or all if the tests changed.

This process neither reads nor runs a hand-in. examine.py unpacks and reads it; child.py runs the tests on it, in
a fresh folder, and reports over a pipe with a code that the hand-in cannot compute. Each graded test must be
reported once. Each test file also gets tests that must fail, with new names each time; if they pass, it gives no
points.
"""

import argparse
import csv
import ctypes
import hashlib
import hmac
import json
import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import points  # noqa: E402
from child import report_code  # noqa: E402
from submit import CODE  # noqa: E402

from support.errors import exit_on_user_error, first_line, require  # noqa: E402
from support.files import write_atomically  # noqa: E402

FILES = list(dict.fromkeys(file for _, file in points.GROUPS.values()))
SECONDS, SECONDS_LOADING = 60, 90  # without a report: while a test runs, and while a file is loaded
SECONDS_STARTING = 120  # before any code of the hand-in runs
SECONDS_IN_ALL, SECONDS_PERPLEXITY = 900, 1800  # for all tests of a hand-in; for its perplexity
MEMORY_BYTES, FILE_BYTES, PROCESSES, FIRST_USER = 4 << 30, 64 << 20, 256, 61_000
MOST_PERPLEXITY = 50  # question 2.6
CONTROLS = """

import checks as checks_, pytest as pytest_
@pytest_.mark.question({group[0]!r}, {group[1]!r})
@pytest_.mark.parametrize("call", ids="01234", argvalues=[
    lambda: checks_.check_close([1.0, 2.0], [1.0, 3.0], "x"),
    lambda: checks_.check_equal(1, 2, "x"),
    lambda: checks_.check_shape(1.0, (2,), "x"),
    lambda: pytest_.raises(ValueError, float, "1"),
    lambda: int("one"),
])
def {name}(call):
    call()
"""
TAMPERED = "tests that must fail did not: the hand-in changes what the tests do; look at its code"
lock, started = threading.Lock(), set()  # of processes that this one started and waits for


def user_of(slot: int | None) -> dict:
    """Arguments of Popen for the user of this slot; None: the same user as this process."""
    return {} if slot is None else {"user": FIRST_USER + slot, "group": FIRST_USER + slot, "extra_groups": []}


def environment(home: Path) -> dict:
    """All that a hand-in sees of the environment."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"HOME": str(home), "TMPDIR": str(home), "USER": "student", "LANG": "C.UTF-8"}
    off = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"PATH": os.defpath, **one_thread, **own, **off}


def stop(process: subprocess.Popen) -> None:
    """Kill a child with its process group, and every process that left it and was orphaned (Linux)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with lock:
        started.discard(process.pid)
        for _ in range(100):
            orphans = []
            for path in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    parent = int(path.read_text(errors="replace").rpartition(") ")[2].split()[1])
                    if parent == os.getpid() and int(path.parent.name) not in started:
                        orphans.append(int(path.parent.name))
            for pid in orphans:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            if not orphans:
                return


def run_child(folder: Path, job: dict, deadline: float, slot: int | None) -> tuple[list[list[str]], str]:
    """Run child.py on a folder. Returns its genuine reports in their order, and a sentence on how it ended."""
    key, (read, write) = secrets.token_bytes(32), os.pipe()
    limits = {"memory": MEMORY_BYTES, "file_bytes": FILE_BYTES, "processes": None if slot is None else PROCESSES}
    job = {"fd": write, "key": key.hex(), "loading": SECONDS_LOADING, "seconds": SECONDS, **limits, **job}
    with lock:
        process = subprocess.Popen(
            [sys.executable, "-IB", "child.py"],
            cwd=folder,
            env=environment(folder / "home"),
            pass_fds=[write],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **user_of(slot),
        )
        started.add(process.pid)
    os.close(write)
    reports, buffer, errors, why, seconds = [], b"", b"", "", SECONDS_STARTING
    base, heard = hashlib.blake2b(key=key), time.monotonic()
    try:
        with selectors.DefaultSelector() as selector, suppress(BrokenPipeError):
            selector.register(read, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
            while selector.get_map() and not why:
                events = selector.select(timeout=0.2)
                for event, _ in events:
                    chunk = os.read(event.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(event.fileobj)
                    elif event.fd != read:
                        errors = (errors + chunk)[-8192:]
                    else:
                        *lines, buffer = (buffer + chunk)[-(1 << 17) :].split(b"\n")
                        for line in lines:
                            code, _, body = line.partition(b"\t")
                            number, *fields = body.decode(errors="replace").split("\t")
                            genuine = hmac.compare_digest(code, report_code(base, body))
                            if genuine and number == str(len(reports)):  # not one that was copied
                                reports.append(fields)
                                heard = time.monotonic()
                if not events and process.poll() is not None:
                    break
                if reports:  # else it still starts
                    seconds = job["seconds" if reports[-1][0] == "start" else "loading"]
                if time.monotonic() > min(deadline, heard + seconds + 1):
                    why = f"no answer in {seconds:g} s: is there an endless loop?"
                    if time.monotonic() > deadline:
                        why = "the time for one hand-in is over"
    finally:
        if not why:  # it ended by itself, or is about to
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        stop(process)
        os.close(read)
        process.stderr.close()
    if not why:
        status = abs(process.returncode)
        name = signal.strsignal(status % 128) if status > 128 or process.returncode < 0 else None
        why = f"the process ended: {name or f'exit status {status}'}"
    files = "|".join(re.escape(name) for name in CODE)
    place = re.findall(rf'File "[^"]*?({files})", line (\d+)', errors.decode(errors="replace"))
    return reports, (f"{place[0][0]}, line {place[0][1]}: " if place else "") + why


def prepare(folder: Path, slot: int | None, source: Path) -> dict[str, list[str]]:
    """Put tests, support code and the files of `source` into a new folder; return the tests that must fail."""
    for pattern in ("tests/*.py", "tests/mistakes/*.py", "support/*.py"):
        for path in ROOT.glob(pattern):
            (folder / path.relative_to(ROOT).parent).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(ROOT))
    shutil.copyfile(HERE / "child.py", folder / "child.py")
    (folder / "pytest.ini").write_text("[pytest]\n")
    controls = {}
    for file in FILES:
        name, group = f"test_{secrets.token_hex(8)}", next(g for g, of in points.GROUPS.items() if of[1] == file)
        controls[file] = [f"tests/{file}::{name}[{i}]" for i in range(5)]
        with (folder / "tests" / file).open("a") as test_file:
            test_file.write(CONTROLS.format(group=group, name=name))
    for name in CODE:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    (folder / "home").mkdir()
    if slot is not None:  # readable for this user alone; only home is writable
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 0, FIRST_USER + slot)
            path.chmod(0o770 if path.name == "home" else 0o750)
    return controls


def expected_tests() -> dict[str, tuple[str, str]]:
    """{node id: group} of all graded tests, collected without any hand-in."""
    if (stored := HERE / "expected.json").exists():  # in the autograder, which has no solution
        return {node: tuple(group) for node, group in json.loads(stored.read_text()).items()}
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        controls = prepare(Path(folder), None, ROOT)
        job = {"files": FILES, "tests": None}
        reports, why = run_child(Path(folder), job, time.monotonic() + 300, None)
    own = {node for nodes in controls.values() for node in nodes}
    found = {f[1]: (f[2], f[3]) for f in reports if f[0] == "test"}
    missing = {part for _, part in points.GROUPS} - {part for _, part in found.values()}
    require(own <= set(found) and not missing, f"the package's own tests cannot be collected: {why}")
    return {node: group for node, group in found.items() if node not in own}


def run_tests(folder: Path, controls: dict, expected: dict, refused: set, slot: int | None) -> points.Tally:
    """The outcome of every expected test, with a reason for each failure.

    After an early end the tests continue in a new process without the group, or the file, that ended it. The
    outcomes of a file count only if its controls failed in the same process.
    """
    tally = points.Tally(None)
    tally.group_of = dict(expected)
    file_of = {node: node.split("::")[0].rpartition("/")[2] for node in expected}
    lost_groups, todo = set(), [file for file in FILES if file not in refused]
    seconds, deadline = SECONDS, time.monotonic() + SECONDS_IN_ALL
    while todo:
        wanted = {file: [] for file in todo}
        for node, group in expected.items():
            if file_of[node] in todo and group not in lost_groups:
                wanted[file_of[node]].append(node)
        tests = [node for file in todo for node in wanted[file] + controls[file]]
        job = {"files": todo, "tests": tests, "seconds": seconds}
        reports, why = run_child(folder, job, deadline, slot)
        outcomes, loading, running, stray = {}, None, None, False
        for kind, *fields in reports:
            if kind == "load":
                loading = fields[0]
            elif kind == "broken":
                tally.broken[fields[0]] = fields[1]
            elif kind == "start":
                loading, running = None, fields[0]
            elif kind == "outcome":
                outcomes.setdefault(fields[0], []).append(fields[1:])
                stray |= fields[0] not in tests
                running = None
        todo = [file for file in todo if file not in tally.broken]
        for file in list(todo):
            nodes = wanted[file] + controls[file]
            if all(node in outcomes for node in nodes):
                todo.remove(file)
                once = all(len(outcomes[node]) == 1 for node in nodes) and not stray
                if not once or any(outcomes[node][0][0] != "failed" for node in controls[file]):
                    tally.broken[file] = TAMPERED
                for node in wanted[file]:
                    tally.outcomes[node], tally.messages[node] = outcomes[node][0]
                    if tally.outcomes[node] == "passed":
                        del tally.messages[node]
        if todo and running in expected and expected[running] not in lost_groups:
            lost_groups.add(expected[running])
            tally.outcomes[running], tally.messages[running] = "failed", why
        elif todo:  # while a file loaded, or between tests; what test_model.py loads, the others load too
            ended = todo if loading == FILES[0] else [loading or todo[0]]
            tally.broken |= dict.fromkeys(ended, why)
            todo = [file for file in todo if file not in ended]
        if "no answer" in why:
            seconds = SECONDS / 4  # for the tests after one that did not end
    return tally


def examine(*arguments, seconds: float) -> dict:
    """What examine.py says; it has the package in reach, and runs no code of the hand-in."""
    command = [sys.executable, "-B", str(HERE / "examine.py"), *map(str, arguments)]
    try:
        with lock:
            pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen(command, text=True, errors="replace", **pipes)
            started.add(process.pid)
        out, errors = process.communicate(timeout=seconds)
        return json.loads(out.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {seconds} s"}
    except ValueError:
        return {"error": f"cannot be read ({(errors.strip().splitlines() or ['no message'])[-1][:200]})"}
    finally:
        process.kill()
        process.communicate()
        with lock:
            started.discard(process.pid)


def grade(path: Path, expected: dict, test_tokens: Path | None, slot: int | None) -> dict:
    """Grade one zip file: {"rows": one for each group of points, "perplexity", "notes"}."""
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as top:
        handed_in, folder = Path(top, "handed_in"), Path(top, "graded")
        handed_in.mkdir(mode=0o700)
        folder.mkdir()
        if slot is not None:
            os.chmod(top, 0o711)
        found = examine("unpack", path, handed_in, seconds=SECONDS_STARTING)
        problems, notes = found.get("problems", {}), found.get("notes", [])
        missing = [problems[name][0] for name in ("model.pt", "config.yaml") if name in problems]
        perplexity = {"error": found["error"]} if "error" in found else {"error": missing[0]} if missing else {}
        if test_tokens and not perplexity:
            perplexity = examine("perplexity", handed_in, test_tokens.resolve(), seconds=SECONDS_PERPLEXITY)
        refused = {}  # test file -> why the file that it tests does not run
        for name, (sentence, runs) in problems.items():
            if name in CODE and not runs:
                (handed_in / name).unlink(missing_ok=True)
                for file in FILES if name == "model.py" else [f"test_{name}"]:
                    refused.setdefault(file, sentence)
        if "error" in found:
            refused = dict.fromkeys(FILES, found["error"])
        controls = prepare(folder, slot, handed_in)
        shutil.rmtree(handed_in)  # the tests need no weights
        tally = run_tests(folder, controls, expected, set(refused), slot)
    for file, reason in tally.broken.items():
        if needed := re.search(r"No module named '(\w+)'", reason):  # the reason is that of the other file
            tally.broken[file] = problems.get(f"{needed[1]}.py", [reason])[0]
    tally.broken |= refused
    rows = [row for row in tally.rows() if (row["question"], row["part"]) in expected.values()]
    for row in rows:
        file = points.GROUPS[row["question"], row["part"]][1]
        sentence, runs = problems.get(file.removeprefix("test_"), ("", False))
        if runs:
            row |= {"points": 0, "output": sentence}
        elif file in tally.broken:
            row |= {"points": 0, "output": tally.broken[file]}
        elif row["points"] is None:
            row |= {"points": 0, "output": "no test of this group ran"}
    if test_tokens:
        rows.append(perplexity_row(perplexity))
    return {"rows": rows, "perplexity": perplexity.get("perplexity"), "notes": notes}


def perplexity_row(found: dict) -> dict:
    """The points of question 2.6 for what examine.py found: a "perplexity" or an "error"."""
    row = {"question": "2.6", "part": "perplexity", "max": points.PERPLEXITY_POINTS, "points": 0}
    if "error" in found:
        return {**row, "output": found["error"]}
    reached = found["perplexity"] < MOST_PERPLEXITY
    output = f"perplexity {found['perplexity']:.2f}, full points under {MOST_PERPLEXITY}"
    return {**row, "points": row["max"] * reached, "output": output}


def total(result: dict) -> tuple[int, int]:
    """Points, and the most that there are."""
    return sum(row["points"] for row in result["rows"]), sum(row["max"] for row in result["rows"])


def reasons_of(result: dict) -> list[str]:
    """The first message of each lost group, with the groups in front; what they share is printed once."""
    groups, lost = {}, {}  # of each question; of each message
    for row in result["rows"]:
        groups.setdefault(row["question"], []).append(row["part"])
        if row["points"] == 0:
            lost.setdefault(row["output"].partition("\n")[0], []).append((row["question"], row["part"]))
    reasons = []
    for message, of in lost.items():
        names = []
        for question in dict.fromkeys(question for question, _ in of):
            parts = [part for q, part in of if q == question]
            names.append(question if parts == groups[question] else f"{question} {', '.join(parts)}")
        reasons.append(f"{'; '.join(names)}: {message}")
    return reasons + result["notes"]


def write_table(out: Path, results: dict[str, dict]) -> None:
    """grades.csv, a line for each hand-in, and grades.md with the reasons."""
    groups = list(dict.fromkeys((row["question"], row["part"]) for r in results.values() for row in r["rows"]))
    questions = sorted({question for question, _ in groups})
    lines = [["hand-in", "points", "of", *(" ".join(group) for group in groups), "perplexity", "messages"]]
    page = ["# Grades", "", f"| hand-in | points | {' | '.join(questions)} | perplexity |"]
    page += ["| --- " * (3 + len(questions)) + "|"]
    details = []
    for name, result in results.items():
        points_of = {(row["question"], row["part"]): row["points"] for row in result["rows"]}
        (got, most), reasons = total(result), reasons_of(result)
        value = "" if result["perplexity"] is None else f"{result['perplexity']:.2f}"
        sums = [str(sum(got for group, got in points_of.items() if group[0] == q)) for q in questions]
        page.append(f"| {name} | {got} of {most} | {' | '.join(sums)} | {value} |")
        lines.append([name, got, most, *(points_of.get(group, "") for group in groups), value, "\n".join(reasons)])
        if reasons:  # as code, because hand-ins choose parts of the messages
            details += [
                "",
                f"## {name}: {got} of {most}",
                "",
                *(f"- `{r.replace('`', chr(39))}`" for r in reasons),
            ]
    with (out / "grades.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    write_atomically(out / "grades.md", "\n".join(page + details) + "\n")


def fingerprint(paths: list[Path]) -> str:
    """A hash of these files' contents."""
    code = hashlib.sha256()
    for path in paths:
        code.update(hashlib.sha256(path.read_bytes()).digest())
    return code.hexdigest()


def separate_users(paths: list[Path]) -> bool:
    """Whether hand-ins can run as separate users, which needs root; says what they could read."""
    code = "import os, pytest, sys; print([path for path in sys.argv[1:] if os.access(path, os.R_OK)])"
    command, works = [sys.executable, "-IBc", code, *map(str, paths)], None
    if os.geteuid() == 0:
        with suppress(OSError):  # such a user may not even run this Python
            env = environment(Path("/"))
            works = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, **user_of(0))
    if works is None or works.returncode:
        why = f"other users cannot run {sys.executable}" if os.geteuid() == 0 else "you are not root"
        print(f"note: hand-ins run as your user and could read its files, since {why} (docs/grading.md)")
        return False
    if works.stdout.strip() != "[]":
        print(f"note: hand-ins can read {works.stdout.strip()}; close them with chmod 700")
    return True


def begin(test_tokens: Path | None, paths: list[Path]) -> tuple[dict, bool]:
    """The expected tests and whether users are separate; makes this process the parent of orphaned ones."""
    require(sys.platform == "linux", "grading needs Linux, for its limits on processes; use a container")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    if test_tokens:
        from support.data import read_tokens

        read_tokens(test_tokens, n_vocab=50257)
    return expected_tests(), separate_users([ROOT / "tests", *paths])


def main(argv: list[str] | None = None) -> None:
    """Grade what is new and write the table."""
    parser = argparse.ArgumentParser(description="Grade a folder of hand-ins.")
    parser.add_argument("hand_ins", metavar="HAND_INS", type=Path, help="a folder of .zip files")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="folder of the results (default: grades)")
    parser.add_argument("--test-tokens", type=Path, metavar="NPZ", help="measure question 2.6 on its `val` tokens")
    parser.add_argument("--jobs", type=int, default=1, help="hand-ins at once (default: 1)")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        grade_folder(args.hand_ins, args.out, args.test_tokens, args.jobs)


def grade_folder(hand_ins: Path, out: Path, test_tokens: Path | None = None, jobs: int = 1) -> dict[str, dict]:
    """Grade each zip file of the folder that is new; return all results by name. UserError if there is none."""
    zips = sorted(hand_ins.glob("*.zip"))
    require(bool(zips), f"{hand_ins}: no .zip file in this folder")
    require(jobs >= 1, f"--jobs {jobs}: must be at least 1")
    (out / "details").mkdir(parents=True, exist_ok=True)
    expected, separate = begin(test_tokens, [*zips[:1], out / "details"])
    rules = [
        *sorted(ROOT.glob("tests/*.py")),
        *sorted(ROOT.glob("tests/mistakes/*.py")),
        *sorted(HERE.glob("*.py")),
        *([test_tokens] if test_tokens else []),
    ]
    version = fingerprint(rules)
    slots = list(range(jobs))

    def result_of(path: Path) -> dict:
        stored, key = out / "details" / f"{path.stem}.json", fingerprint([path]) + version
        with suppress(OSError, ValueError):
            if (result := json.loads(stored.read_text()))["key"] == key:
                return result
        slot = slots.pop()
        try:
            result = {"key": key, **grade(path, expected, test_tokens, slot if separate else None)}
        except Exception as error:  # whatever happens, the others are graded; this one again next time
            return {
                "rows": [],
                "perplexity": None,
                "notes": [f"NOT GRADED: {type(error).__name__}: {first_line(error)}"],
            }
        finally:
            slots.append(slot)
        write_atomically(stored, json.dumps(result, indent=2) + "\n")
        return result

    results = {}
    with ThreadPoolExecutor(jobs) as pool:
        for path, result in zip(
            zips, tqdm(pool.map(result_of, zips), total=len(zips), unit=" hand-ins"), strict=True
        ):
            results[path.stem] = result
            tqdm.write(f"{path.stem:<24} {'{} of {}'.format(*total(result))}")
            write_table(out, results)
    print(f"{out}/grades.md, {out}/grades.csv: {len(results)} hand-ins")
    return results


if __name__ == "__main__":
    main()
