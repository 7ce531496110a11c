"""Grade a folder of hand-ins.

    python instructor/grade.py HAND_INS --out grades --test-tokens test.npz

HAND_INS has a .zip for each, as `python tests/submit.py` packs them. Writes grades/grades.csv, grades/grades.md
and a file for each hand-in. Run again, it grades those that are new or changed, or all if the tests changed.

Each file of tests runs in a process of its own, by `pytest --junitxml`, in a fresh folder with the tests and the
four files. A hand-in can still cheat there: use a container, and look at flagged code (docs/grading.md).
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path, PurePosixPath

import pytest
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import points  # noqa: E402
from child import COPIED, fresh_folder, in_report, run_python, run_tests, why_it_ended  # noqa: E402
from submit import CODE, PACKAGES, inspect_code  # noqa: E402
from table import plain, total, write_table  # noqa: E402

from support.data import read_tokens  # noqa: E402
from support.errors import ArgumentParser, exit_on_user_error, first_line, positive_int, require  # noqa: E402
from support.files import write_atomically  # noqa: E402
from support.screen import show_note  # noqa: E402
from support.tokenizer import get_tokenizer  # noqa: E402

FILES = list(dict.fromkeys(file for _, file in points.GROUPS.values()))
SECONDS_FILE, SECONDS_GROUP, SECONDS_PERPLEXITY = 300, 60, 1800  # of wall-clock time
MOST_BYTES = dict.fromkeys(CODE, 1 << 20) | {"config.yaml": 1 << 20, "model.pt": 200 << 20}  # unpacked
MOST_PERPLEXITY = 50  # question 2.6
FEW_TOKENS = 50_000  # to measure it on
CONTAINERS = "/.dockerenv", "/run/.containerenv", "/run/systemd/container", "/var/run/secrets/kubernetes.io"


def expected_tests() -> dict[str, list[str]]:
    """{"question part": node ids of the tests that give its points}, collected from the package's own files."""
    if (stored := HERE / "expected.json").exists():  # in the autograder, which has no solution
        return json.loads(stored.read_text())
    found = {" ".join(group): [] for group in points.GROUPS}

    class Collector:
        def pytest_collection_finish(self, session):
            for item in session.items:
                if marker := item.get_closest_marker("question"):
                    found[" ".join(marker.args)].append(item.nodeid)

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        files = [str(ROOT / "tests" / file) for file in FILES]
        pytest.main(["--collect-only", "-q", f"--rootdir={ROOT}", *files], plugins=[Collector()])
    missing = [group for group, nodes in found.items() if not nodes]
    require(not missing, f"no tests of {', '.join(missing)} can be collected; run pytest tests/ to see why")
    return found


def unpack(path: Path, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Unpack what is graded, and nothing else: {file: why it is not there}, and notes."""
    try:
        require(path.is_file(), "it is a folder or a broken link")
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many types for what is no zip file
        return dict.fromkeys(MOST_BYTES, f"{plain(path.name)} is not a zip file ({first_line(error)})"), []
    with archive:
        files = {PurePosixPath(entry.filename.replace("\\", "/")): entry for entry in archive.infolist()}
        files = {p: e for p, e in files.items() if p.name and p.parts[0] != "__MACOSX" and not e.is_dir()}
        places = [p.parent for p in files if p.name in CODE]
        # The folder that has most of the four files, the upper one of equals; a single file is found anywhere.
        best = min(places, key=lambda place: (-places.count(place), len(place.parts)), default=PurePosixPath())
        problems, taken = {}, {}
        for name, most in MOST_BYTES.items():
            where = [p for p in files if p.name == name]
            if (best / name not in files and len(where) != 1) or not where:
                problems[name] = f"{name} is in {len(where)} folders" if where else f"{name} is missing"
                continue
            entry = taken[name] = files[best / name if best / name in files else where[0]]
            try:
                require(not stat.S_ISLNK(entry.external_attr >> 16), "it is a link")
                with archive.open(entry) as file:
                    content = file.read(most + 1)  # whatever size the zip claims
                require(len(content) <= most, f"it has more than {most >> 20} MiB")
            except Exception as error:  # also zlib's and lzma's, for a damaged or encrypted entry
                problems[name] = f"{name} cannot be unpacked: {first_line(error)}"
                continue
            (folder / name).write_bytes(content)
    notes = [] if any(p.suffix.lower() == ".pdf" for p in files) else ["no PDF of written answers in the zip"]
    ignored = [f"{p}" for p, e in files.items() if e not in taken.values() and p.suffix.lower() != ".pdf"]
    notes += [f"ignored in the zip: {', '.join(ignored[:8])}" + " …" * (len(ignored) > 8)] if ignored else []
    return problems, notes


def outcomes_of(top: str, handed_in: Path, file: str, expected: dict) -> tuple[dict[tuple[str, str], str], str]:
    """The outcomes of a file of tests, or why there are none."""
    outcomes, _ = run_tests(fresh_folder(top, handed_in), [f"tests/{file}"], SECONDS_FILE)
    groups = [expected[" ".join(group)] for group, (_, its_file) in points.GROUPS.items() if its_file == file]
    without = [nodes for nodes in groups if any(in_report(node) not in outcomes for node in nodes)]
    if without == groups:
        module = file.removeprefix("test_").removesuffix(".py")
        code = f"import {module}; print('it can be imported')"
        status, output = run_python(fresh_folder(top, handed_in), ["-c", code], SECONDS_GROUP)
        if not output.endswith("it can be imported\n"):
            why = why_it_ended(status, output)
            why += "; does main() run at import?" if "exit status" in why else ""
            lacks = re.search(r"No module named '(\w+)'", why)
            require(not lacks or lacks[1] not in PACKAGES, f"{why}; pip install {lacks and lacks[1]}, then retry")
            return {}, f"import {module}: {why}"
    for nodes in without:  # a test ended the process: these groups again, each by itself
        found, why = run_tests(fresh_folder(top, handed_in), nodes, SECONDS_GROUP)
        outcomes |= {in_report(node): found.get(in_report(node), why) for node in nodes}
    return outcomes, ""


def grade(path: Path, expected: dict[str, list[str]], test_tokens: Path | None) -> dict:
    """Grade one zip file: {"rows": one for each group of points, "perplexity", "notes", "advice"}."""
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as top:
        handed_in = Path(top, "handed_in")
        handed_in.mkdir()
        problems, notes = unpack(path, handed_in)
        outcomes, perplexity, inspections = {}, {}, {}
        for name in [name for name in CODE if name not in problems]:
            found = inspections[name] = inspect_code(name, (handed_in / name).read_bytes())
            notes += [f"look at {line}" for line in found["flags"]]
            if found["refused"]:
                problems[name] = "; ".join(found["refused"])
                (handed_in / name).unlink()
        needed = ("model.py", "model.pt", "config.yaml")
        missing = "; ".join(dict.fromkeys(problems[name] for name in needed if name in problems))
        if missing:
            perplexity = {"error": missing}
        elif test_tokens:
            perplexity = measure(fresh_folder(top, handed_in), test_tokens)
        for unneeded in ("model.pt", "config.yaml"):  # by the tests
            (handed_in / unneeded).unlink(missing_ok=True)
        for file in FILES:
            name = file.removeprefix("test_")
            if "model.py" in problems:  # all need it
                problems[name] = problems["model.py"]
            elif name not in problems:
                found, why = outcomes_of(top, handed_in, file, expected)
                outcomes |= found
                problems |= {name: why} if why else {}
    rows = []
    for group, (most, file) in points.GROUPS.items():
        name, nodes = file.removeprefix("test_"), expected[" ".join(group)]
        results = {node.partition("::")[2]: outcomes.get(in_report(node), "did not run") for node in nodes}
        failed = [f"{test}: {message}" for test, message in results.items() if message]
        why = problems.get(name) or "; ".join(inspections[name]["ready-made"]) or "\n".join(failed)
        row = {"question": group[0], "part": group[1], "max": most, "points": 0 if why else most, "output": why}
        rows.append(row)
    rows += [perplexity_row(perplexity)] if test_tokens else []
    counted = {in_report(node) for nodes in expected.values() for node in nodes}
    advice = [f"{test[1]}: {why}" for test, why in outcomes.items() if why and test not in counted]
    return {"rows": rows, "perplexity": perplexity.get("perplexity"), "notes": notes, "advice": advice}


def measure(folder: Path, test_tokens: Path) -> dict:
    """{"perplexity": …} of model.pt, by the hand-in's own model.py, or {"error": …}."""
    shutil.copyfile(HERE / "perplexity.py", folder / "perplexity.py")
    command = ["perplexity.py", str(test_tokens.resolve()), str(ROOT / "model.pt")]
    status, output = run_python(folder, command, SECONDS_PERPLEXITY)
    with suppress(OSError, ValueError):
        return json.loads((folder / "perplexity.json").read_text())
    return {"error": why_it_ended(status, output)}


def perplexity_row(found: dict) -> dict:
    """The points of question 2.6 for a "perplexity" or an "error"."""
    reached = "error" not in found and found["perplexity"] < MOST_PERPLEXITY
    output = found.get("error") or f"perplexity {found['perplexity']:.2f}, full points under {MOST_PERPLEXITY}"
    most = points.PERPLEXITY_POINTS
    return {"question": "2.6", "part": "perplexity", "max": most, "points": most * reached, "output": output}


def main(argv: list[str] | None = None) -> None:
    """Grade what is new and write the table."""
    parser = ArgumentParser(description="Grade a folder of hand-ins.")
    parser.add_argument("hand_ins", metavar="HAND_INS", type=Path, help="a folder of .zip files")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="folder of the results (default: grades)")
    parser.add_argument("--test-tokens", type=Path, metavar="NPZ", help="measure question 2.6 on its `val` tokens")
    parser.add_argument("--jobs", type=positive_int, default=1, help="hand-ins at once (default: 1)")
    parser.add_argument("--no-container", action="store_true", help="run their code on this machine as it is")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        remedy = "start a container (docs/grading.md), or accept the risk with --no-container"
        contained = args.no_container or any(Path(path).exists() for path in CONTAINERS)
        require(contained, f"this runs other people's code: {remedy}")
        results = grade_folder(args.hand_ins, args.out, args.test_tokens, args.jobs)
        missed = [plain(name) for name, result in results.items() if not result["rows"]]
        require(not missed, f"not graded: {', '.join(missed)}; see {args.out}/grades.md, then rerun")


def check_test_tokens(path: Path) -> None:
    """Raise UserError if the file has no tokens; print a note if it has few."""
    require(path.is_file(), f"{path}: no such file")
    _, val = read_tokens(path, get_tokenizer().n_vocab)
    if len(val) < FEW_TOKENS:
        show_note(
            f"{path} has {len(val):,} tokens: perplexity on so few is mostly chance; use {FEW_TOKENS:,} or more."
        )


def grade_folder(hand_ins: Path, out: Path, test_tokens: Path | None = None, jobs: int = 1) -> dict[str, dict]:
    """Grade each zip file of the folder that is new; return all results by name. UserError if there is none."""
    zips = sorted(path for path in hand_ins.glob("*") if path.suffix.lower() == ".zip")
    require(bool(zips), f"{hand_ins}: no .zip file in this folder")
    if test_tokens:
        check_test_tokens(test_tokens)
    (out / "details").mkdir(parents=True, exist_ok=True)
    expected = expected_tests()
    rules = [path for pattern in (*COPIED, "instructor/*.py") for path in sorted(ROOT.glob(pattern))]
    rules += [test_tokens] if test_tokens else []

    def result_of(path: Path) -> dict:
        contents = [file.read_bytes() for file in [path, *rules] if file.is_file()]
        key = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
        stored = out / "details" / f"{path.name}.json"
        with suppress(OSError, ValueError):
            if (result := json.loads(stored.read_text()))["key"] == key:
                return result
        try:
            result = {"key": key, **grade(path, expected, test_tokens)}
            write_atomically(stored, json.dumps(result, indent=2) + "\n")
            return result
        except Exception as error:  # of this machine: the others are graded, and this one again next time
            notes = [f"NOT GRADED: {type(error).__name__}: {first_line(error)}"]
            return {"rows": [], "perplexity": None, "notes": notes, "advice": []}

    results = {}
    with ThreadPoolExecutor(jobs) as pool:
        graded = pool.map(result_of, zips)
        for path, result in zip(zips, tqdm(graded, total=len(zips), unit=" hand-ins"), strict=True):
            name = path.stem if path.stem not in results else path.name
            results[name] = result
            got = "{} of {}".format(*total(result)) if result["rows"] else "NOT GRADED"
            tqdm.write(f"{plain(name):<24} {got}")
            write_table(out, results)
    print(f"{out}/grades.md, {out}/grades.csv: {len(results)} hand-in{'s' * (len(results) != 1)}")
    return results


if __name__ == "__main__":
    main()
